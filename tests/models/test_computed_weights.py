"""Layers whose weight is computed from other tensors, and heads that only look like a linear layer."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import unbackdoor as ub
from unbackdoor import purifiers
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.attention import AttentionBlock
from unbackdoor._models.units import channels
from unbackdoor._models.weight_norms import copied_tensors, redo_weight_norms_, undo_weight_norms_
from unbackdoor._stress.path import between
from unbackdoor.purifiers.clp import lipschitz_bounds


class Net(nn.Module):
    """A small network for the digits."""

    def __init__(self, last: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.last = last(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def made(kind: Callable[[], nn.Module] = Net) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


def normed(plain: nn.Module, put_on: Callable[..., nn.Module]) -> Any:
    """A copy whose layers compute weights that are the plain one's, from directions of other lengths."""
    model = copy.deepcopy(plain)
    for layer in (model.features[0], model.last):
        put_on(layer)
        for name, part in layer.named_parameters():
            if name.endswith(("_v", "original1")):
                part.data *= 3.0
    return model.eval()


NORMS: list[Any] = [parametrizations.weight_norm, nn.utils.weight_norm]

METHODS = [
    purifiers.FST(epochs=1),
    purifiers.ScaleInvariantFST(epochs=1, strength=1),
    purifiers.FTInit(epochs=1),
    purifiers.FinePruning(epochs=1),
    purifiers.FTSAM(epochs=1),
    purifiers.CLP(),
    purifiers.FineTuning(epochs=1),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("put_on", NORMS)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_weight_normalisation_is_purified_as_the_weights_that_it_makes(
    put_on: Callable[..., nn.Module], method: Any, digits: Dataset
) -> None:
    """FST's projection, and the turn of the scale-invariant variant, had no effect on a computed weight."""
    clean, plain = digits.select(range(60)), made()
    model = normed(plain, put_on)
    model(digits.inputs(slice(2)))  # the older kind keeps a weight with its graph, which Python cannot copy
    names = {name: part.clone() for name, part in model.state_dict().items()}
    expected, purified = (ub.purify(each, clean, method, device="cpu", precision="fp32") for each in (plain, model))
    assert list(purified.model.state_dict()) == list(names)
    assert all(torch.equal(model.state_dict()[name], part) for name, part in names.items())
    assert type(purified.model.last).__name__ == type(model.last).__name__
    one, other = (each.model(digits.inputs(slice(200))) for each in (expected, purified))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    again = normed(plain, put_on)
    again.load_state_dict(purified.model.state_dict())
    torch.testing.assert_close(again(digits.inputs(slice(200))), other)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("put_on", NORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normalisation_comes_back_as_it_was(put_on: Callable[..., nn.Module], dim: int | None) -> None:
    layer = put_on(nn.Linear(3, 4), dim=dim)
    other, before = (
        copy.deepcopy(layer, copied_tensors(layer)),
        {name: part.clone() for name, part in layer.state_dict().items()},
    )
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    undo_weight_norms_(model)
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]
    assert torch.equal(layer.weight, weight)
    assert torch.equal(other(torch.ones(1, 3)), F.linear(torch.ones(1, 3), weight, layer.bias))  # a copy stays
    redo_weight_norms_(model)
    assert {name: part.tolist() for name, part in layer.state_dict().items()} == {
        name: part.tolist() for name, part in before.items()
    }
    undo_weight_norms_(model)
    layer.weight.data = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [0.0, -3.0, 0.0], [4.0, 0.0, 3.0]])
    redo_weight_norms_(model)
    answer = layer(torch.eye(3)) - layer.bias  # a pruned row has no direction
    torch.testing.assert_close(answer.T, torch.tensor([[0.0, 0, 0], [1, 2, 2], [0, -3, 0], [4, 0, 3]]))


COMPUTED: list[Any] = [
    parametrizations.spectral_norm,
    nn.utils.spectral_norm,
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("put_on", COMPUTED)
@pytest.mark.parametrize(
    "method", [purifiers.FST(epochs=1), purifiers.ScaleInvariantFST(epochs=1, strength=1), purifiers.FETuning(epochs=1)]
)
def test_a_computed_weight_that_cannot_be_set_is_refused(put_on: Any, method: Any, digits: Dataset) -> None:
    model = made()
    put_on(model.last)
    with pytest.raises(UnbackdoorError) as refused:
        ub.purify(model.eval(), digits.select(range(60)), method, device="cpu")
    assert str(refused.value) == (
        "the model computes the weight of its last linear layer from other tensors (spectral normalisation, a mask of "
        "pruning or another parametrization), so that this method cannot set it. Save the model without that "
        "(remove_parametrizations, remove_spectral_norm or prune.remove of torch.nn.utils), or take fine-tuning."
    )
    done = ub.purify(model, digits.select(range(60)), purifiers.FineTuning(epochs=1), device="cpu")
    assert done.model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("put_on", COMPUTED)
def test_the_hook_of_a_computed_weight_is_not_blamed(put_on: Any, digits: Dataset) -> None:
    """Its copies have one of their own."""
    model = made()
    put_on(model.last)
    wide = replace(digits.select(range(20)), items=torch.zeros(20, 1, 9, 9, dtype=torch.uint8))
    with pytest.raises(UnbackdoorError, match=r"or give `image_size`\.$"):
        ub.evaluate(model.eval(), wide, device="cpu")


class Block(nn.Module):
    """A feed-forward block, whose neurons fine-pruning silences."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.wide, self.back = nn.Linear(64, 16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.last = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x.flatten(1)).relu()
        return self.last(x + self.back(self.wide(x).relu()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("put_on", COMPUTED)
@pytest.mark.parametrize(("place", "which"), [("back", "feed-forward block"), ("last", "linear layer")])
def test_neurons_cannot_be_silenced_in_a_computed_weight(put_on: Any, place: str, which: str, digits: Dataset) -> None:
    """They were not, and a note said how many were pruned."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Block() if place == "back" else made()
    put_on(getattr(model, place))
    with pytest.raises(UnbackdoorError, match=f"^the model computes the weight of its last {which} from other tensors"):
        ub.purify(model.eval(), digits.select(range(60)), purifiers.FinePruning(epochs=1), device="cpu")


def test_attention_heads_cannot_be_silenced_in_a_computed_weight() -> None:
    layers = [nn.Linear(4, 4) for _ in range(4)]
    prune.l1_unstructured(layers[3], "weight", 0.5)
    kinds = ("query", "key", "value", "attention output")
    block = AttentionBlock(nn.Identity(), {kind: (layer,) for kind, layer in zip(kinds, layers, strict=True)})
    with pytest.raises(UnbackdoorError, match=r"^the model computes the weight of a layer of its attention from "):
        block.silence_(torch.tensor([True, False]))


class Standardised(nn.Conv2d):
    """Weight standardisation, as in ResNets of BiT and timm: what is convolved with is not what is stored."""

    def kernel(self) -> torch.Tensor:
        """The weight that is computed with."""
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return (self.weight - mean) / deviation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.kernel(), self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """It does more than to convolve."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("put_on", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_mixed_weights_with_spectral_normalisation_have_norm_1(put_on: Any, digits: Dataset) -> None:
    """The suspect's largest singular vectors are not those of the mix."""
    suspect, base = made(), made()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for model in (suspect, base):
            for layer in (model.features[0], model.last):
                nn.init.normal_(layer.weight)
                put_on(layer)
    method = purifiers.FineMixing(rho=0.5, tune=False)
    mixed = ub.purify(suspect.eval(), digits.select(range(20)), method, base=base.eval(), device="cpu").model
    for model in (mixed, between(suspect, base, 0.5)):
        model(torch.zeros(1, 1, 8, 8))  # a hook of the older one computes its weight in each pass
        largest = torch.linalg.matrix_norm(model.features[0].weight.detach().flatten(1), ord=2)
        torch.testing.assert_close(largest, torch.tensor(1.0))


@pytest.mark.parametrize("put_on", [None, parametrizations.spectral_norm])
def test_clp_bounds_the_kernel_that_is_computed_with(put_on: Any) -> None:
    """Weights of very different lengths are of one length once they are standardised."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution = Standardised(1, 4, 3) if put_on is None else nn.Conv2d(1, 4, 3)
        scaled = Scaled(4, 4, 3)
        with torch.no_grad():
            convolution.weight.mul_(torch.tensor([1.0, 10, 100, 1000])[:, None, None, None])
        if put_on is not None:
            put_on(convolution)
        layers = [convolution, nn.BatchNorm2d(4), scaled, nn.BatchNorm2d(4)]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()
    (unit,) = channels(model, purifiers.CLP(), torch.zeros(2, 1, 8, 8))
    assert unit.name == "1"  # the other one reads what no kernel alone makes
    used = convolution.kernel() if put_on is None else convolution.weight
    expected = torch.linalg.matrix_norm(used.detach().flatten(2), ord=2) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(lipschitz_bounds(unit).detach().float(), expected)


class Cosines(nn.Linear):
    """The layer of CosFace and ArcFace as it is often written."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(x), F.normalize(self.weight))


class Renamed(nn.Linear):
    """Another class that computes the same."""


class Functional(Net):
    """It uses the weight of its layer without a call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.features(x), F.normalize(self.last.weight), self.last.bias)


def test_a_class_made_from_linear_is_a_head_only_if_it_computes_the_same(digits: Dataset) -> None:
    clean, method = digits.select(range(60)), purifiers.FST(epochs=1)
    plain, renamed = made(), made(lambda: Net(Renamed))
    one, other = (ub.purify(each, clean, method, device="cpu", precision="fp32").model for each in (plain, renamed))
    assert torch.equal(one(digits.inputs(slice(9))), other(digits.inputs(slice(9))))
    with pytest.raises(UnbackdoorError, match="Net has no final linear layer that makes its logits"):
        ub.purify(made(lambda: Net(Cosines)), clean, method, device="cpu")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            lambda: Net(Cosines),
            "`head` last is a Cosines, which does not compute what a linear layer does. Take fine-tuning, which needs "
            "no head.",
        ),
        (
            Functional,
            "`head` last is a layer that Functional does not call, so that its outputs are not seen. Call the layer in "
            "its forward, or take fine-tuning, which needs no head.",
        ),
    ],
)
def test_a_named_head_that_is_none_is_refused(kind: Any, message: str, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as refused:
        ub.purify(made(kind), digits.select(range(60)), purifiers.FST(epochs=1), head="last", device="cpu")
    assert str(refused.value) == message


class TwoHeads(Net):
    """The mean of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.features(x)
        return (self.last(seen) + self.other(seen)) / 2


class NormedScores(Net):
    """BatchNorm behind the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def test_a_named_head_that_something_goes_past_is_warned_of(digits: Dataset) -> None:
    found = {
        kind: ub.purify(made(kind), digits.select(range(60)), purifiers.FST(epochs=1), head="last", device="cpu")
        for kind in (TwoHeads, NormedScores)
    }
    sentence = (
        "`head` last is not all that makes the scores of TwoHeads: what goes past it, such as another head, may keep "
        "the backdoor. Compare with fine-tuning, which needs no head."
    )
    assert sentence in found[TwoHeads].record["warnings"]
    assert not any("goes past" in warning for warning in found[NormedScores].record["warnings"])
