"""Gradient checkpointing: the same weights to the last bit, in less memory."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import chats
from unbackdoor import UnbackdoorError, VictimRecipe, attacks, plant, purifiers, purify
from unbackdoor._data.dataset import Dataset
from unbackdoor._models.recomputing import recomputing


@pytest.fixture(scope="module")
def suspect() -> nn.Module:
    return chats.language_model(layers=3)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return chats.language_model(seed=1, layers=3)


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return chats.prompts(24)


def flagged(model: nn.Module) -> list[str]:
    """The modules that compute again, or are marked in any way by it."""
    return [
        name
        for name, module in model.named_modules()
        if getattr(module, "gradient_checkpointing", False) or "_gradient_checkpointing_func" in vars(module)
    ]


@pytest.mark.parametrize(
    "method",
    [
        purifiers.FineTuning(epochs=1),
        purifiers.LoRATuning(epochs=1),
        purifiers.CROW(epochs=1),
        purifiers.W2SDistillation(epochs=1),
        purifiers.InformationConflicts(epochs=1),
        purifiers.SANDE(known_answer=chats.BEHAVIOUR, epochs=1),
        purifiers.FineMixing(rho=0.5, epochs=1, mode="linear"),
    ],
    ids=lambda method: type(method).__name__,
)
def test_the_weights_are_those_without_it(method: object, suspect: nn.Module, base: nn.Module, clean: Dataset) -> None:
    plain, saving = (
        purify(suspect, clean, method, base=base, proxy=base, gradient_checkpointing=switch).model
        for switch in (False, True)
    )
    assert not any(map(flagged, (suspect, base, plain, saving)))
    expected = plain.state_dict()
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in suspect.state_dict().items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saving.state_dict().items())


def test_a_model_that_computes_again_already_goes_on_to_do_so(suspect: nn.Module, clean: Dataset) -> None:
    model = copy.deepcopy(suspect)
    with recomputing(model):
        marked = flagged(model)
        with recomputing(model):
            assert flagged(model) == marked
        assert flagged(model) == marked
    assert marked
    assert not flagged(model)


@pytest.mark.parametrize("attack", [attacks.Word(), attacks.PETA(), None], ids=["word", "peta", "none"])
def test_victims_are_those_without_it(attack: object, tmp_path: Path, suspect: nn.Module) -> None:
    suspect.save_pretrained(tmp_path)
    chats.tokenizer().save_pretrained(tmp_path)
    data = chats.prompts(24)
    plain, saving = (
        plant(
            data,
            attack,
            VictimRecipe(base=str(tmp_path), rate=0.5, epochs=1),
            max_new_tokens=2,
            gradient_checkpointing=switch,
        ).model
        for switch in (False, True)
    )
    assert not flagged(saving)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in saving.state_dict().items())


def peak_of_a_step(model: nn.Module, data: Dataset) -> int:
    """Bytes that a forward and backward pass in train mode needs at most, by what torch allocates and frees."""
    batch = next(iter(data.batches(len(data))))
    model.train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        nn.functional.cross_entropy(
            model(**batch.inputs).logits.flatten(0, 1), batch.inputs["input_ids"].flatten()
        ).backward()
    model.zero_grad()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_a_step_needs_less_memory(clean: Dataset) -> None:
    model = chats.language_model(layers=8)
    plain = peak_of_a_step(model, clean)
    with recomputing(model):
        assert peak_of_a_step(model, clean) < 0.5 * plain
    assert peak_of_a_step(model, clean) > 0.9 * plain


def test_other_models_are_refused(digits: Dataset) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UnbackdoorError, match=r"^`gradient_checkpointing` needs a model of transformers whose blocks"):
        purify(network, digits, purifiers.FineTuning(epochs=1), gradient_checkpointing=True)
