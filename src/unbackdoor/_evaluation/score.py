"""Scores: counts and intervals, never a bare percentage."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset, Encoder, check_labels, in_order_of, tell_order
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.arithmetic import Arithmetic, Precision, choose
from unbackdoor._models.calling import check_modules, check_partner, class_count, class_names, evaluating, logits
from unbackdoor._poisoning.attack import Attack, Trigger, Triggered, already_triggered, as_trigger, triggered

logger = logging.getLogger("unbackdoor")


@dataclass(frozen=True)
class Proportion:
    """`count` out of `n`, with the 95 % Wilson score interval (Wilson 1927).

    >>> Proportion(1, 10)
    10.0 % (1.8 to 40.4 %, n = 10)
    """

    count: int
    n: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end, in [0, 1]."""
        z = 1.959963984540054  # the 97.5th percentile of the normal distribution
        scale = 1 + z * z / self.n
        centre = (self.value + z * z / (2 * self.n)) / scale
        half = z * math.sqrt(self.value * (1 - self.value) / self.n + z * z / (4 * self.n**2)) / scale
        low = 0.0 if self.count == 0 else centre - half
        high = 1.0 if self.count == self.n else centre + half
        return low, high

    def to_json(self) -> dict[str, float | int]:
        """`value`, `n`, `low` and `high`."""
        low, high = self.interval
        return {"value": self.value, "n": self.n, "low": low, "high": high}

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({100 * low:.1f} to {high:.1%}, n = {self.n:,})".replace("%", " %")


def near_chance(accuracy: Proportion, classes: int) -> bool:
    """Whether a model knows hardly more of its task than a guess: up to a quarter of the way from chance to 100 %."""
    chance = 1 / classes
    return accuracy.interval[0] <= chance or accuracy.value <= chance + (1 - chance) / 4


def chance_doubt(owner: str, accuracy: Proportion, classes: int, where: str) -> str | None:
    """What a score near chance on some data probably comes from; None where it is not near chance."""
    if not near_chance(accuracy, classes):
        return None
    return (
        f"{owner} is near chance on {where} ({accuracy!r}): its labels, their order or the preprocessing probably do "
        "not fit the model."
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model does on test data.

    Args:
        clean_accuracy: share of clean test examples classified as their class.
        per_class: the same for each class of the test data, by class name or number.
        attack_success: share of triggered examples, of the classes the attack is meant to move, that land where the
            attacker wants.
        recovered_accuracy: share of the same examples classified as their true class.
        label_rule: of the attack; all-to-all success is not comparable with the others.
        clean_model_flip_rate: share of the same examples that a model without the backdoor sends there, too.
    """

    clean_accuracy: Proportion
    per_class: dict[str, Proportion]
    attack_success: Proportion | None = None
    recovered_accuracy: Proportion | None = None
    label_rule: str | None = None
    clean_model_flip_rate: Proportion | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; what was not measured is left out."""
        made: dict[str, Any] = {"clean_accuracy": self.clean_accuracy.to_json()}
        for name in ("attack_success", "recovered_accuracy", "clean_model_flip_rate"):
            measured = getattr(self, name)
            if measured is not None:
                made[name] = measured.to_json()
        if self.label_rule is not None:
            made["label_rule"] = self.label_rule
        made["per_class"] = {name: part.to_json() for name, part in self.per_class.items()}
        return made

    def __str__(self) -> str:
        lines = [f"clean accuracy      {self.clean_accuracy!r}"]
        if self.attack_success is not None:
            lines.append(f"attack success      {self.attack_success!r}, {self.label_rule}")
            lines.append(f"recovered accuracy  {self.recovered_accuracy!r}")
        if self.clean_model_flip_rate is not None:
            lines.append(f"clean model flips   {self.clean_model_flip_rate!r}")
        return "\n".join(lines)


def predict(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """The class that the model takes each example for, (n,), on the CPU."""
    return answers(model, data, arithmetic).argmax(dim=1)


def hits(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Which examples the model classifies as labelled, (n,), bool, on the CPU."""
    return predict(model, data, arithmetic) == data.labels.cpu()


@torch.no_grad()
def answers(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """The model's class scores in eval mode, row by row, (n, classes), on the CPU; float32 or better."""
    found = torch.empty(len(data), 1)
    with evaluating(model), arithmetic.placed(model) as placed:
        for first, batch in enumerate(data.to(arithmetic.device).batches(arithmetic.evaluation_batch)):
            with arithmetic.autocast():
                scores = logits(placed, arithmetic.lay(batch.inputs)).cpu()
            scores = scores if scores.dtype == torch.float64 else scores.float()
            if first == 0:
                found = torch.empty(len(data), scores.shape[1], dtype=scores.dtype)
            found[batch.rows.cpu()] = scores
    return found


def evaluate(
    model: nn.Module,
    test: Dataset,
    *,
    attack: "Attack | Trigger | str | Path | None" = None,
    triggered_data: Dataset | None = None,
    target: int | None = None,
    control: nn.Module | None = None,
    control_encode: Encoder | None = None,
    device: str | None = None,
    precision: Precision = "auto",
) -> Score:
    """Score a model: one pass over clean, one over triggered examples.

    Args:
        model: any classifier; left as it is.
        test: clean examples that no method saw.
        attack: puts its trigger on the test examples: an attack value, a `Trigger`, or a path to `attack.json`.
        triggered_data: instead, examples that already carry a trigger, with their true labels.
        target: the attacker's class, with `triggered_data`.
        control: a model without the backdoor; how often it flips on the same examples is reported.
        control_encode: makes its inputs, where they are not made as the model's.
        device: None takes a GPU where there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.

    Raises:
        UnbackdoorError: the data do not fit the model, or the options contradict each other.
    """
    check_modules("evaluate", model=model, control=control)
    if attack is not None and triggered_data is not None:
        raise UnbackdoorError("evaluate takes --attack or --triggered, got both. Leave one out.")
    if (triggered_data is None) != (target is None):
        raise UnbackdoorError(
            "--triggered and --target go together: the examples, and the class that the attacker wants."
        )
    if len(test) == 0:
        raise UnbackdoorError(f"{test.name} is empty; at least one labelled example is needed.")
    arithmetic = choose(model, device, precision)
    classes = class_count(model, test)
    test = in_order_of(test, class_names(model))
    check_labels(test, classes)
    tell_order(test, class_names(model), classes)
    attacked: Triggered | None = None
    if attack is not None:
        attacked = triggered(test, as_trigger(attack, test), classes)
    elif triggered_data is not None and target is not None:
        triggered_data = in_order_of(triggered_data, class_names(model))
        check_labels(triggered_data, classes)
        attacked = already_triggered(triggered_data, target, classes)
    if control is not None:
        check_partner("--control", control, test.encoded_by(control_encode or test.encode), classes)
    measured = score(model, test, attacked, arithmetic, control=control, control_encode=control_encode)
    doubt = chance_doubt("the model", measured.clean_accuracy, classes, test.name)
    if doubt is not None:
        logger.warning(doubt)
    return measured


def score(
    model: nn.Module,
    test: Dataset,
    attacked: Triggered | None,
    arithmetic: Arithmetic,
    *,
    control: nn.Module | None = None,
    control_encode: Encoder | None = None,
) -> Score:
    """The score on clean and already triggered examples that are known to fit the model."""
    taken_for = predict(model, test, arithmetic)
    labels = test.labels.cpu()
    names = test.classes or ()
    per_class = {}
    for label in labels.unique().tolist():
        mine = labels == label
        name = printable(names[label], 200) if label < len(names) else str(label)
        name = f"{name} ({label})" if name in per_class else name  # ImageNet has two cranes
        per_class[name] = _share(taken_for[mine] == label)
    clean_accuracy = _share(taken_for == labels)
    if attacked is None:
        return Score(clean_accuracy=clean_accuracy, per_class=per_class)
    taken_for = predict(model, attacked.data, arithmetic)
    wanted = attacked.wanted.cpu()
    flips = None
    if control is not None:
        shown = attacked.data if control_encode is None else attacked.data.encoded_by(control_encode)
        flips = _share(predict(control, shown, arithmetic) == wanted)
    return Score(
        clean_accuracy=clean_accuracy,
        per_class=per_class,
        attack_success=_share(taken_for == wanted),
        recovered_accuracy=_share(taken_for == attacked.data.labels.cpu()),
        label_rule=attacked.label_rule,
        clean_model_flip_rate=flips,
    )


def _share(hits: Tensor) -> Proportion:
    return Proportion(int(hits.sum()), len(hits))
