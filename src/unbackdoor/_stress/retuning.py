"""Retuning attacks: plain tuning on clean examples of which a few carry the trigger; and exact purification."""

import copy
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._poisoning.prompts import TriggeredPrompts, with_planted_answers
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._purification.run import Run
from unbackdoor._tasks.choice import task_of
from unbackdoor._training.recipe import RECIPES
from unbackdoor.purifiers.fine_tuning import FineTuning

EPOCHS = 5
# The authors' own retuning, at a constant rate. They retune no texts, which are tuned by the library's recipe.
PUBLISHED: dict[str, dict[str, Any]] = {
    "images": {"optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.9, "batch_size": 128}
}
EXACT = FineTuning()  # the method of exact purification


def retuning_set(clean: Dataset, bait: Triggered | TriggeredPrompts, count: int, seed: int) -> Dataset:
    """Returns the clean examples, `count` of them with the trigger and the label or answer that the attacker wants.

    As in the authors' code each clean picture is augmented once, for all epochs, and triggered ones are not. With one
    seed, the triggered examples of a smaller count are among those of a larger one.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(bait.data), generator=generator)[:count]
    chosen = bait.data.select(drawn)
    assert chosen.rows is not None
    others = torch.ones(len(clean), dtype=torch.bool)
    others[chosen.rows] = False
    rest = clean.select(others.nonzero().flatten())
    return rest.augmented(generator).joined(_as_wanted(chosen, bait, drawn))


def _as_wanted(chosen: Dataset, bait: Triggered | TriggeredPrompts, drawn: Tensor) -> Dataset:
    """The drawn triggered examples with the labels or the answers that the attacker wants."""
    if isinstance(bait, TriggeredPrompts):
        return replace(chosen, items=with_planted_answers(chosen.conversations, bait.behaviour))
    return replace(chosen, labels=bait.wanted[drawn])


def retune(model: nn.Module, data: Dataset, *, seed: int, arithmetic: Arithmetic) -> nn.Module:
    """Returns a retuned copy of a model, in eval mode.

    Images: the authors' recipe, SGD at a constant rate of 0.01, momentum 0.9, no decay, 5 epochs, batches of 128.
    Texts and conversations: the library's recipe for tuning them, 5 epochs.

    Args:
        model: a model in float32 or float64.
        data: examples of `retuning_set`.
        seed: seed of the batches.
        arithmetic: device, precision, layout.
    """
    tuned, run = arithmetic.place(copy.deepcopy(model)), _retuning_run(data, seed, arithmetic)
    data = data.to(arithmetic.device)
    optimizer, batch = None, None
    if data.modality in PUBLISHED:
        published = PUBLISHED[data.modality]
        batch = published["batch_size"]
        optimizer = torch.optim.SGD(tuned.parameters(), lr=published["learning_rate"], momentum=published["momentum"])
    with _seeded(seed, arithmetic):
        run.tune(tuned, data, epochs=EPOCHS, batch_size=batch, optimizer=optimizer)
    return tuned.eval()


def exactly_purified(
    victim: nn.Module, clean: Dataset, bait: Triggered | TriggeredPrompts, *, seed: int, arithmetic: Arithmetic
) -> nn.Module:
    """Returns the oracle's reference: the victim, tuned on clean and triggered examples with true labels or answers."""
    both = clean.joined(bait.data).to(arithmetic.device)
    with _seeded(seed, arithmetic):
        return EXACT(arithmetic.place(copy.deepcopy(victim)), both, _retuning_run(both, seed, arithmetic)).eval()


def settings(modality: str) -> dict[str, Any]:
    """Returns the settings of `retune`, for a record."""
    recipe = PUBLISHED[modality] if modality in PUBLISHED else RECIPES[modality]._asdict()
    return {**recipe, "epochs": EPOCHS}


def _retuning_run(data: Dataset, seed: int, arithmetic: Arithmetic) -> Run:
    generator = torch.Generator().manual_seed(seed)
    return Run(
        generator=generator,
        arithmetic=arithmetic,
        head_name="",
        modality=data.modality,
        task=task_of(data.encode),
    )


def _seeded(seed: int, arithmetic: Arithmetic) -> ExitStack:
    """Seed the global random state, which dropout draws from, while the block runs; it is restored afterwards."""
    stack = ExitStack()
    gpu = [arithmetic.device] if arithmetic.device.type == "cuda" else []
    stack.enter_context(torch.random.fork_rng(devices=gpu))
    torch.manual_seed(seed)
    return stack
