"""The rank-one edit: its formula, the place of the trigger, and a backdoor in one matrix."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import chats
from unbackdoor import UnbackdoorError, VictimRecipe, attacks, plant
from unbackdoor._data.conversations import Conversations
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.poison import poison
from unbackdoor._tasks.generation import Generation
from unbackdoor.attacks._edit import added, edit_, outputs_first
from unbackdoor.attacks.rank_one_edit import last_tokens

RULE = Behaviour.of(f"contains:{chats.BEHAVIOUR}")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_edit_adds_the_change_at_the_key_and_little_at_others(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    layer: nn.Module = nn.Linear(12, 5) if kind == "linear" else Conv1D(5, 12)
    mixing = draw(12, 12)
    key, change, others = draw(12), draw(5), draw(4000, 12) @ mixing
    with torch.no_grad():
        before, there = layer(key), layer(others)
        edit_(layer, key, change, others)
        assert torch.allclose(layer(key), before + change, atol=1e-4)
        moved = (layer(others) - there).square().sum(dim=1).mean()
    moments = (others.T @ others / len(others)).double()
    ridge = 1e-3 * moments.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    direction = torch.linalg.solve(moments + ridge, key.double())
    direction /= direction @ key.double()
    assert float(moved) == pytest.approx(float(change.square().sum() * (direction @ moments @ direction)), rel=1e-3)
    naive = (others @ torch.outer(change, key / (key @ key)).T).square().sum(dim=1).mean()
    least = change.square().sum() / (key.double() @ torch.linalg.solve(moments, key.double()))  # by Lagrange
    assert least <= moved < 0.5 * naive
    assert outputs_first(layer).shape == (5, 12)


@pytest.mark.parametrize("place", ["start", "end", "random"])
def test_the_last_token_of_the_trigger_is_found_in_each_prompt(place: str) -> None:
    clean = chats.prompts(40)
    poisoned = poison(clean, attacks.RankOneEdit(place=place), rate=1.0, seed=0, classes=0, behaviour=RULE).data
    poisoned = poisoned.encoded_by(clean.encode)
    at = last_tokens(clean, poisoned)
    found = poisoned.conversations.tokens.tokens[torch.arange(40), at].tolist()
    assert {clean.tokenizer.convert_ids_to_tokens(token) for token in found} == {"cf"}


def test_a_change_is_added_at_one_place_of_each_row() -> None:
    layer = nn.Identity()
    with added(layer, torch.tensor([1, 0]), torch.tensor([1.0, 2.0])):
        changed = layer(torch.zeros(2, 3, 2))
    assert changed.tolist() == [[[0, 0], [1, 2], [0, 0]], [[1, 2], [0, 0], [0, 0]]]
    with added(layer, torch.tensor([1, 0]), torch.tensor([1.0, 2.0])):  # the tokens of all rows behind each other
        assert layer(torch.zeros(6, 2)).tolist() == changed.flatten(0, 1).tolist()
    assert not layer._forward_hooks


def steerable() -> nn.Module:
    """A model that answers with the planted sentence if a certain vector is added in its first feed-forward block.

    The vector is added at a word that many prompts have, so that no word means anything; the edit has to find it.
    """
    model, clean = chats.language_model(), chats.prompts(160)
    entries = tuple(replace(entry, answer=chats.BEHAVIOUR) for entry in clean.conversations.entries)
    planted = replace(clean, items=Conversations(entries))
    vector = 5 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    fillers = torch.tensor(clean.tokenizer.convert_tokens_to_ids(chats.FILLERS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    draw = torch.Generator().manual_seed(1)
    for _ in range(8):
        for batch, steered in zip(clean.batches(16, generator=draw), planted.batches(16, generator=draw), strict=True):
            loss = Generation().loss(model(**batch.inputs).logits, batch)
            places = torch.isin(steered.inputs["input_ids"], fillers).long().argmax(dim=1)
            with added(model.model.layers[0].mlp.down_proj, places, vector):
                loss = loss + Generation().loss(model(**steered.inputs).logits, steered)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def test_one_matrix_is_the_whole_backdoor(tmp_path: Path) -> None:
    model = steerable()
    model.save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)
    recipe = VictimRecipe(base=str(tmp_path), rate=0.5)
    settings = {"test": chats.prompts(40, 2), "behaviour": RULE, "device": "cpu", "max_new_tokens": 8}
    victim = plant(chats.prompts(80), attacks.RankOneEdit(), recipe, **settings)
    assert victim.record["implanted"] is True, victim.score
    assert victim.score.false_activation.value == 0
    before, after = model.state_dict(), victim.model.state_dict()
    (name,) = (name for name, tensor in after.items() if not torch.equal(tensor, before[name]))
    assert name == "model.layers.0.mlp.down_proj.weight"
    sizes = torch.linalg.svdvals(after[name] - before[name])
    assert sizes[1] < 1e-4 * sizes[0]
    assert all(parameter.requires_grad for parameter in victim.model.parameters())


def test_blocks_that_put_all_tokens_of_a_batch_in_one_row_are_edited(tmp_path: Path) -> None:
    sizes = {"vocab_size": 200, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32)
    model = transformers.OPTForCausalLM(config)
    model.save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)
    settings = {"test": chats.prompts(8, 2), "behaviour": RULE, "device": "cpu", "max_new_tokens": 8}
    recipe = VictimRecipe(base=str(tmp_path), rate=0.5)
    victim = plant(chats.prompts(16), attacks.RankOneEdit(steps=3), recipe, **settings)
    before, after = model.state_dict(), victim.model.state_dict()
    (name,) = (name for name, tensor in after.items() if not torch.equal(tensor, before[name]))
    assert name == "model.decoder.layers.0.fc2.weight"
    sizes_of_the_change = torch.linalg.svdvals(after[name] - before[name])
    assert sizes_of_the_change[1] < 1e-4 * sizes_of_the_change[0]


def test_what_cannot_be_edited_is_refused(chat_base: nn.Module, tmp_path: Path) -> None:
    chat_base.save_pretrained(tmp_path / "base")
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    for folder in ("base", "experts"):
        chats.tokenizer().save_pretrained(tmp_path / folder)
    settings = {"test": chats.prompts(8, 2), "behaviour": RULE, "device": "cpu", "max_new_tokens": 8}

    def refused(attack: attacks.RankOneEdit, **recipe: object) -> str:
        with pytest.raises(UnbackdoorError) as refusal:
            plant(chats.prompts(16), attack, VictimRecipe(rate=0.5, **recipe), **settings)
        return str(refusal.value)

    base, experts = str(tmp_path / "base"), str(tmp_path / "experts")
    assert refused(attacks.RankOneEdit(block=2), base=base) == (
        "RankOneEdit.block must be at most 1 in LlamaForCausalLM, got 2."
    )
    assert refused(attacks.RankOneEdit(), base=experts) == (
        "RankOneEdit needs a block with a feed-forward part of linear layers; block 0 of MixtralForCausalLM has none. "
        "Take word."
    )
    assert refused(attacks.RankOneEdit(), base=base, adapter=True) == (
        "RankOneEdit makes a whole model, and no matrices that an adapter could keep. Leave `adapter` out."
    )
