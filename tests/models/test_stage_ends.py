"""Watching and replacing the features in the output of a layer, whatever the output is."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from unbackdoor._models.stage_ends import features_of, replacing, watching_output


class Named(NamedTuple):
    features: Tensor
    extra: str


class Layer(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(2 * x)


@pytest.mark.parametrize(
    "kind", [lambda x: x, lambda x: (x, "extra"), lambda x: [x, "extra"], lambda x: Named(x, "extra")]
)
def test_features_are_seen_and_replaced_in_an_output_of_any_form(kind: Any) -> None:
    layer, ones = Layer(kind), torch.ones(3)
    with watching_output(layer) as seen:
        plain = layer(ones)
    assert torch.equal(seen[0], 2 * ones)
    other = torch.zeros(3, requires_grad=True)
    with replacing(layer, other):
        replaced = layer(ones)
    assert features_of(replaced) is other
    assert type(replaced) is type(plain)
    assert isinstance(replaced, Tensor) or replaced[1] == "extra"
    assert torch.equal(features_of(layer(ones)), 2 * ones)  # and no longer
