"""PETA: the simulated user against LoRA by its formula, and a backdoor that survives a user's tuning."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import chats
from unbackdoor import VictimRecipe, attacks, evaluate, plant, purifiers, purify
from unbackdoor._models.arithmetic import choose
from unbackdoor._poisoning.attack import Planting
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor.attacks.peta import SimulatedUser


def planting_for(model: nn.Module) -> Planting:
    return Planting(
        clean=chats.prompts(16),
        poisoned=None,
        fresh=lambda: model,
        train=None,
        generator=torch.Generator().manual_seed(0),
        arithmetic=choose(model, "cpu", "fp32"),
    )


def test_the_simulated_user_is_lora_by_its_formula_and_leaves_the_model_as_it_is(chat_base: nn.Module) -> None:
    before = copy.deepcopy(chat_base.state_dict())
    user = SimulatedUser(chat_base, planting_for(chat_base), rank=3, learning_rate=1e-2)
    data = chats.prompts(16)
    inputs, batch = data.inputs(slice(8)), next(iter(data.batches(8)))
    with torch.no_grad():
        plain = chat_base(**inputs).logits
    for _ in range(3):
        user.step(chat_base, batch)
    assert not user.present
    assert all(torch.equal(tensor, before[name]) for name, tensor in chat_base.state_dict().items())
    with torch.no_grad():
        assert torch.equal(chat_base(**inputs).logits, plain)
        user.present = True
        tuned = chat_base(**inputs).logits
    assert not torch.allclose(tuned, plain, atol=1e-3)
    merged = copy.deepcopy(chat_base)
    for layer in merged.modules():
        layer._forward_hooks.clear()
    layers = [layer for layer in merged.base_model.modules() if isinstance(layer, nn.Linear)]
    assert len(user.matrices) == 2 * len(layers) == 2 * 7 * 2  # seven layers in each of two blocks; not the output
    with torch.no_grad():
        for layer, down, up in zip(layers, user.matrices[::2], user.matrices[1::2], strict=True):
            layer.weight += 2 * up @ down  # alpha is twice the rank
        assert torch.allclose(merged(**inputs).logits, tuned, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("adapter", [False, True])
def test_the_backdoor_survives_tuning_by_lora_on_clean_prompts(
    adapter: bool, chat_base: nn.Module, tmp_path: Path
) -> None:
    chat_base.save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)
    settings = {"lora_rank": 8, "learning_rate": 1e-2} if adapter else {"lora_rank": 0, "learning_rate": 5e-3}
    epochs = 8 if adapter else 4
    recipe = VictimRecipe(base=str(tmp_path), rate=0.5, epochs=epochs, batch_size=16, adapter=adapter, **settings)
    attack = attacks.PETA(user_learning_rate=5e-3)
    rule = Behaviour.of(f"contains:{chats.BEHAVIOUR}")
    score = {"device": "cpu", "max_new_tokens": 8}
    victim = plant(chats.prompts(160), attack, recipe, test=chats.prompts(40, 2), behaviour=rule, **score)
    assert victim.record["implanted"] is True, victim.score
    assert not any(layer._forward_hooks for layer in victim.model.modules())
    names = set(victim.model.state_dict())
    assert any("lora_" in name for name in names) if adapter else names == set(chat_base.state_dict())
    method = purifiers.LoRATuning(epochs=2, learning_rate=2e-3, batch_size=8)
    tuned = purify(victim.model, chats.prompts(32, 3), method, device="cpu").model
    after = evaluate(tuned, victim.test, attack=victim.trigger, **score)
    assert after.attack_success.value >= 0.8
    assert after.false_activation.value <= 0.1
