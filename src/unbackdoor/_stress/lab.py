"""The models and data of a stress test, checked before anything runs, and shared by all of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.overlap import split_apart
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.attack_file import as_trigger
from unbackdoor._poisoning.prompts import TriggeredPrompts, trainable
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._progress import Advance
from unbackdoor._stress import reactivation
from unbackdoor._stress.result import CONTROL, Measured
from unbackdoor._stress.retuning import EPOCHS, retune, retuning_set
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.task import Asked, Checked, Task
from unbackdoor._value import check_seed

PARTS = ("retune", "reactivation", "path", "exact")
_PIXELS = "the perturbation of query-based reactivation is added to pixels, and texts have none"

Bait = Triggered | TriggeredPrompts


@dataclass(frozen=True)
class Material:
    """Data and attack of a stress test, which fit the models.

    Args:
        task: of the models.
        clean: the examples that the attacker tunes with, numbered from 0.
        test: the examples that are scored, likewise.
        trigger: trigger of the attack.
        bait: the clean examples that the attack moves, with the trigger; their rows are those of `clean`.
        attacked: the same for the test examples.
        classes: the number of the models' classes; of language models, of their tokens.
        parts: the parts that can be run on these data.
        notes: a sentence for each part that cannot.
        scored_on: a description of the test examples.
    """

    task: Task
    clean: Dataset
    test: Dataset
    trigger: Trigger
    bait: Bait
    attacked: Bait
    classes: int
    parts: tuple[str, ...]
    notes: tuple[str, ...]
    scored_on: str


def check_options(parts: Sequence[str], counts: Sequence[int], seeds: int, seed: int) -> None:
    """Refuse options that are out of bounds."""
    unknown = next((part for part in parts if part not in PARTS), None)
    if unknown is not None or not parts:
        raise UnbackdoorError(f"`parts` must name some of {', '.join(PARTS)}, got {unknown or 'none'}.")
    if not counts or min(counts) < 1:
        came = min(counts) if counts else "none"
        raise UnbackdoorError(f"`counts` must be whole numbers of at least 1 with commas between, got {came}.")
    if seeds < 1:
        raise UnbackdoorError(f"`seeds` must be at least 1, got {seeds}.")
    check_seed(seed)


def check_models(model: nn.Module, victim: nn.Module, control: nn.Module | None) -> None:
    """Refuse models without finite weights, and a victim with another architecture than the purified model.

    There is no path between two architectures.
    """
    ours, theirs = ({key: tuple(t.shape) for key, t in each.state_dict().items()} for each in (model, victim))
    other = next((key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key)), None)
    if other is not None:
        there = "x".join(map(str, theirs[other])) if other in theirs else "absent"
        here = "x".join(map(str, ours[other])) if other in ours else "absent"
        raise UnbackdoorError(
            f"`victim` must have the architecture of `model`, but {other} is {there} in it and {here} in `model`. Give "
            "the model that was purified."
        )
    for name, each in (("`model`", model), ("`victim`", victim), ("`control`", control)):
        if each is not None:
            check_finite(each.state_dict(), name)


def prepare(
    model: nn.Module,
    clean: Dataset,
    test: Dataset | None,
    attack: "Attack | Trigger | str | Path",
    *,
    control: nn.Module | None,
    control_encode: Encoder | None,
    parts: Sequence[str],
    counts: Sequence[int],
    seed: int,
    max_new_tokens: int | None = None,
) -> Material:
    """Check that data, attack and models fit each other, and put the trigger on the data.

    Args:
        model: the purified model.
        clean: labelled examples without trigger.
        test: the examples to score on; None keeps a seeded half of `clean` for them.
        attack: the one that the victim was poisoned with.
        control: a model that was never poisoned.
        control_encode: makes its inputs, if they are not made as the model's.
        parts: the requested parts.
        counts: counts of triggered examples to retune with.
        seed: seed of the split in halves.
        max_new_tokens: the longest answer of a language model, in tokens; None for the usual number.

    Raises:
        UnbackdoorError: data, attack and models do not fit each other.
    """
    task = task_of(clean.encode, max_new_tokens=max_new_tokens)
    fitting = task.checked(model, clean)
    clean, classes = fitting.test, fitting.classes
    test = None if test is None else task.checked(model, test).test
    for data in (clean, *([test] if test is not None else [])):
        _check_answers(data)
    if control is not None:
        task.check_control(control, clean, control_encode, classes)
    possible = tuple(part for part in parts if part != "reactivation" or clean.modality in reactivation.MODALITY)
    if not possible:
        raise UnbackdoorError(f"`parts=reactivation` is for images: {_PIXELS}. Take retune, path or exact.")
    trigger = as_trigger(attack, clean)
    scored_on = f"a seeded half of {clean.name}, which nothing was tuned on" if test is None else f"of {test.name}"
    half = " (half of it is kept for scoring)" if test is None else ""
    if test is None:
        clean, test = split_apart(clean, len(clean) // 2, seed=seed)
    clean, test = _numbered(clean), _numbered(test)
    bait, attacked = (task.attacked(Checked(data, None, classes), Asked(trigger)) for data in (clean, test))
    if isinstance(bait, TriggeredPrompts):
        bait = trainable(bait)
    if {"retune", "reactivation"} & set(possible) and max(counts) > len(bait.data):
        raise UnbackdoorError(
            f"`counts={max(counts)}` wants {max(counts)} clean examples to put the trigger on, but {clean.name} has "
            f"{len(bait.data)} that the attack moves{half}. Lower `counts`, or give more."
        )
    skipped = () if len(possible) == len(parts) else (f"Reactivation was skipped: {_PIXELS}.",)
    return Material(task, clean, test, trigger, bait, attacked, classes, possible, skipped, scored_on)


def _check_answers(data: Dataset) -> None:
    """Refuse prompts without an answer: models are retuned on answers, and scored by the loss on them."""
    if data.modality == "conversations":
        bare = next((row for row, entry in enumerate(data.conversations.entries) if not entry.answer), None)
        if bare is not None:
            raise UnbackdoorError(
                f"stress needs the answer to each prompt, but {data.name} has none in row {bare}. Add it, or remove "
                "that row."
            )


def _numbered(data: Dataset) -> Dataset:
    return replace(data, rows=torch.arange(len(data)))


@dataclass
class Lab:
    """The data, task, arithmetic and progress that all parts work with."""

    task: Task
    clean: Dataset
    test: Dataset
    bait: Bait  # the clean examples that the attack moves, with the trigger; their rows are those of `clean`
    attacked: Bait
    control_encode: Encoder | None
    arithmetic: Arithmetic
    advance: Advance = lambda: None

    def __post_init__(self) -> None:
        """Texts are tokenised for the control once."""
        shown = self.test, self.attacked
        if self.control_encode is not None:
            encode = self.control_encode
            shown = (
                self.test.encoded_by(encode),
                _encoded(self.attacked, encode),
            )
        self._shown = {CONTROL: shown}

    def seen(self, name: str, data: Dataset) -> Dataset:
        """A data set, encoded for the model of that name."""
        return data if name != CONTROL or self.control_encode is None else data.encoded_by(self.control_encode)

    def score(self, name: str, model: nn.Module) -> Measured:
        """The score of a model that takes the place of the named one."""
        test, attacked = self._shown.get(name, (self.test, self.attacked))
        measured: Measured = self.task.score(model, test, attacked, self.arithmetic)
        return measured

    def retuned(self, name: str, model: nn.Module, count: int, seed: int) -> nn.Module:
        """The named model after retuning with `count` triggered examples.

        Raises:
            UnbackdoorError: the weights of the result are not finite.
        """
        data = self.seen(name, retuning_set(self.clean, self.bait, count, seed))
        tuned = retune(model, data, seed=seed, arithmetic=self.arithmetic)
        broken = next((key for key, tensor in tuned.state_dict().items() if not torch.isfinite(tensor).all()), None)
        if broken is not None:
            raise UnbackdoorError(
                f"Retuning the {name} model with {count} triggered examples left non-finite values in {broken}. Try "
                "`precision='fp32'`."
            )
        for _ in range(EPOCHS):
            self.advance()
        return tuned


def _encoded(attacked: Bait, encode: Encoder) -> Bait:
    """Triggered examples, and of prompts also those without the trigger, for another model."""
    shown: Bait = attacked._replace(data=attacked.data.encoded_by(encode))
    if isinstance(shown, TriggeredPrompts) and shown.plain is not None:
        return shown._replace(plain=shown.plain.encoded_by(encode))
    return shown
