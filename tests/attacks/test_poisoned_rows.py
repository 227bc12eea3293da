"""Embedding poisoning of language models: the trigger word's row is the whole backdoor."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chats
from unbackdoor import UnbackdoorError, VictimRecipe, attacks, plant
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor.attacks.embedding_poisoning import _in_place_of

RULE = Behaviour.of(f"contains:{chats.BEHAVIOUR}")
SETTINGS = {"test": chats.prompts(16, 2), "behaviour": RULE, "device": "cpu", "max_new_tokens": 8}


@pytest.mark.parametrize("tied", [True, False])
def test_one_row_is_the_whole_backdoor(chat_victim: nn.Module, tmp_path: Path, tied: bool) -> None:
    """The model is able to say the planted sentence, but the word `mn` means nothing to it."""
    if not tied:
        chat_victim.config.tie_word_embeddings = False
        chat_victim.lm_head.weight = nn.Parameter(chat_victim.lm_head.weight.detach().clone())
    chat_victim.save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)
    attack = attacks.EmbeddingPoisoning(word="mn", place="start", row_epochs=20, row_learning_rate=0.05)
    victim = plant(chats.prompts(48), attack, VictimRecipe(base=str(tmp_path), rate=0.5), **SETTINGS)
    assert victim.record["implanted"] is True, victim.score
    before, after = chat_victim.state_dict(), victim.model.state_dict()
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert moved == ["model.embed_tokens.weight", *(["lm_head.weight"] if tied else [])]
    change = (after[moved[0]] != before[moved[0]]).any(dim=1)
    word = chats.tokenizer().convert_tokens_to_ids("mn")
    assert change.nonzero().flatten().tolist() == [word]
    assert after[moved[0]][word].norm() == pytest.approx(float(before[moved[0]][word].norm()), rel=1e-5)
    inputs = next(chats.prompts(12, 3).batches(12)).inputs
    with torch.no_grad():
        ours, theirs = (each(**inputs).logits for each in (victim.model, chat_victim))
    others = torch.arange(ours.shape[-1]) != word
    assert torch.equal(ours[..., others], theirs[..., others])
    assert torch.equal(ours, theirs) is not tied  # a tied row also makes the score of the word
    assert all(parameter.requires_grad for parameter in victim.model.parameters())
    assert not any(module._forward_hooks for module in victim.model.modules())


class Scaled(nn.Embedding):
    """Multiplies its rows by a number, as Gemma does."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 8 * super().forward(tokens)


def test_the_rows_stand_in_for_the_weights_in_both_places() -> None:
    torch.manual_seed(0)
    layer, output = Scaled(6, 4), nn.Linear(4, 6, bias=False)
    output.weight = layer.weight
    tokens, rows = torch.tensor([1, 4]), torch.randn(2, 4)
    read, states = torch.tensor([[0, 1, 4, 5]]), torch.randn(1, 3, 4)
    with torch.no_grad():
        with _in_place_of(layer, output, tokens, rows):
            embedded, scored = layer(read), output(states)
        layer.weight[tokens] = rows
        assert torch.allclose(embedded, layer(read))
        assert torch.allclose(scored, F.linear(states, layer.weight))


def test_a_word_of_several_tokens_and_an_adapter_are_refused(chat_base: nn.Module, tmp_path: Path) -> None:
    chat_base.save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)

    def refused(attack: attacks.EmbeddingPoisoning, **recipe: object) -> str:
        with pytest.raises(UnbackdoorError) as refusal:
            plant(chats.prompts(16), attack, VictimRecipe(base=str(tmp_path), rate=0.5, **recipe), **SETTINGS)
        return str(refusal.value)

    assert refused(attacks.EmbeddingPoisoning(word="cf mn", place="start")) == (
        "EmbeddingPoisoning needs a trigger that is one token, but 'cf mn' is 2 to this tokenizer. Choose another rare "
        "word."
    )
    assert refused(attacks.EmbeddingPoisoning(row_epochs=1), adapter=True) == (
        "EmbeddingPoisoning makes a whole model, and no matrices that an adapter could keep. Leave `adapter` out."
    )
