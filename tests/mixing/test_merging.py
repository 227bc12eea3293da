"""Merges of two models from one base, by known answers."""

import pytest
import torch

from unbackdoor._mixing.merging import share_at, sign_elected


def test_the_elected_sign_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    first = base + torch.tensor([4.0, -3.0, 2.0, 0.1])
    second = base + torch.tensor([2.0, 1.0, 0.2, 5.0])
    # Half of each change stays: 4 and -3 of the first, 2 and 5 of the second.
    assert torch.allclose(sign_elected(base, [first, second], 0.5), base + torch.tensor([3.0, -3.0, 0.0, 5.0]))
    # All of them: 4 and 2 agree, -3 beats 1, 2 and 0.2 agree, 0.1 and 5 agree.
    assert torch.allclose(sign_elected(base, [first, second], 1.0), base + torch.tensor([3.0, -3.0, 1.1, 2.55]))


def test_one_model_with_all_of_its_change_is_itself_and_without_any_it_is_the_base() -> None:
    base, model = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sign_elected(base, [model], 1.0), model, rtol=0, atol=1e-6)
    assert torch.equal(sign_elected(base, [model], 0.0), base)
    assert sign_elected(base.bfloat16(), [model.bfloat16()], 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 0.0),
        ("model.layers.8.self_attn.o_proj.weight", 1.0),
        ("model.layers.3.self_attn.q_proj.weight", 0.4),  # halfway between 0.5 and 0.3
        ("model.layers.0.mlp.up_proj.weight", 1.0),
        ("transformer.h.8.mlp.c_fc.weight", 0.0),
        ("transformer.h.4.attn.c_attn.weight", 0.3),
        ("gpt_neox.layers.2.attention.dense.weight", 0.5),
        ("model.layers.0.post_attention_layernorm.weight", 0.5),
        ("model.embed_tokens.weight", 0.5),
    ],
)
def test_the_share_by_depth(name: str, share: float) -> None:
    assert share_at(name, blocks=9) == pytest.approx(share)
