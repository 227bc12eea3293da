"""How well a guard does: false alarms on fresh data, missed attacks, the area under its curve, and its cost."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from scipy.stats import rankdata
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._guarding.deciding import Judged
from unbackdoor._guarding.fit import hashes
from unbackdoor._guarding.fitted import FittedGuard, Work
from unbackdoor._guarding.identity import check_unchanged
from unbackdoor._models.arithmetic import Precision
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.attack_file import as_trigger
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered, already_triggered, triggered
from unbackdoor._progress import bar, silent
from unbackdoor._tasks.classification import CLASSIFICATION
from unbackdoor._tasks.proportion import Proportion, proportion_of


@dataclass(frozen=True)
class Area:
    """The probability that a triggered input is more suspicious than a clean one; ties count half.

    Args:
        value: in [0, 1]; 0.5 for a guard that sees nothing.
        clean: the number of clean inputs.
        triggered: the number of triggered inputs.
    """

    value: float
    clean: int
    triggered: int

    @classmethod
    def of(cls, clean: Tensor, attacked: Tensor, suspicious: str) -> "Area":
        """The area of scores of clean and triggered inputs, (n,) and (m,).

        The sum of the ranks of the triggered scores, less its smallest possible value, over n m (Mann and Whitney).
        """
        both = torch.cat([attacked, clean]).numpy()
        ranks = rankdata(both if suspicious == "high" else -both)
        count = len(attacked)
        value = (float(ranks[:count].sum()) - count * (count + 1) / 2) / (count * len(clean))
        return cls(value, len(clean), count)

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end of the 95 % interval, in [0, 1].

        The areas whose distance from the value is 1.96 standard errors, with the error of Hanley and McNeil (1982) at
        that area; so an area of 1 has an interval as well.
        """

        def error(area: float) -> float:
            first, second = area / (2 - area), 2 * area**2 / (1 + area)
            above = (self.triggered - 1) * (first - area**2) + (self.clean - 1) * (second - area**2)
            return 1.959963984540054 * math.sqrt((area * (1 - area) + above) / (self.clean * self.triggered))

        def end(side: int, limit: float) -> float:
            def distance(area: float) -> float:
                return side * (area - self.value) - error(area)

            near = self.value + side * 1e-9  # at an area of 0 or 1 the error is 0, which is no end of an interval
            return limit if distance(limit) <= 0 else float(brentq(distance, near, limit))

        return end(-1, 0.0), end(1, 1.0)

    def to_json(self) -> dict[str, float | int]:
        """`value`, `n`, `low` and `high`, and the two numbers of inputs."""
        low, high = self.interval
        counts = {"n": self.clean + self.triggered, "clean": self.clean, "triggered": self.triggered}
        return {"value": self.value, **counts, "low": low, "high": high}

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f}, n = {self.clean:,} and {self.triggered:,})"


@dataclass(frozen=True)
class Cost:
    """The forward passes of one input, on average, the model's own answer included.

    Args:
        forwards: passes through the model.
        reference_forwards: passes through the language model that rates texts.
        n: the number of inputs.
    """

    forwards: float
    reference_forwards: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """All three."""
        return {"value": self.forwards, "reference": self.reference_forwards, "n": self.n}

    def __repr__(self) -> str:
        reference = f", and {self.reference_forwards:.1f} of the reference" if self.reference_forwards else ""
        return f"{self.forwards:.2f}{reference} (n = {self.n:,})"


@dataclass(frozen=True)
class GuardScore:
    """How well a guard does on data that it was not fitted to.

    Args:
        false_alarms: clean examples that raise an alarm.
        accuracy: the model's accuracy on the clean examples that are not rejected, with the answers behind the guard;
            None if all are rejected.
        accuracy_without: on all clean examples, without the guard.
        cost: forward passes for each input.
        missed: triggered examples that pass; or that were changed, and still are classified as the attacker wants.
            None without triggered examples, as the following.
        attack_success: triggered examples that are classified as the attacker wants, behind the guard.
        attack_success_without: the same without the guard.
        area: under the curve of the scores.
        label_rule: of the attack.
    """

    false_alarms: Proportion
    accuracy: Proportion | None
    accuracy_without: Proportion
    cost: Cost
    missed: Proportion | None = None
    attack_success: Proportion | None = None
    attack_success_without: Proportion | None = None
    area: Area | None = None
    label_rule: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All numbers, each with n and, if it is a share, its interval."""
        entries = {
            "false_alarms": self.false_alarms,
            "missed_attacks": self.missed,
            "auc": self.area,
            "accuracy_of_what_passes": self.accuracy,
            "accuracy_without_guard": self.accuracy_without,
            "attack_success": self.attack_success,
            "attack_success_without_guard": self.attack_success_without,
            "forwards_per_input": self.cost,
        }
        shown = {key: None if entry is None else entry.to_json() for key, entry in entries.items()}
        return {**shown, "label_rule": self.label_rule}

    def __repr__(self) -> str:
        lines: list[tuple[str, object]] = [("false alarms", self.false_alarms)]
        if self.missed is not None:
            lines += [("missed attacks", self.missed), ("area under the curve", self.area)]
            lines += [
                ("attack success", self.attack_success),
                ("  without the guard", self.attack_success_without),
            ]
        lines += [("accuracy of what passes", self.accuracy), ("  without the guard", self.accuracy_without)]
        lines += [("forward passes per input", self.cost)]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {'-' if entry is None else repr(entry)}" for name, entry in lines)


def evaluate_guard(
    fitted: FittedGuard,
    model: nn.Module,
    test: Dataset,
    *,
    attack: "Attack | Trigger | str | Path | None" = None,
    triggered_data: Dataset | None = None,
    target: int | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> GuardScore:
    """Score a guard on fresh clean examples, and on triggered ones.

    Args:
        fitted: the guard.
        model: that it was fitted to; it is not changed.
        test: clean labelled examples; those that the guard was fitted on are left out.
        attack: the attack whose trigger is put on them: a value, a `Trigger`, or a path to `attack.json`.
        triggered_data: instead of `attack`, examples that already carry a trigger, with their true labels.
        target: the attacker's class, with `triggered_data`.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: the guard was fitted to another model, tokenizer or processor, or the data do not fit.
    """
    if attack is not None and triggered_data is not None:
        raise UnbackdoorError("evaluate_guard takes `attack` or `triggered_data`, got both. Leave one out.")
    if (triggered_data is None) != (target is None):
        raise UnbackdoorError(
            "`triggered_data` and `target` go together: the examples, and the class that the attacker wants."
        )
    fitted.check(model, test)
    fresh = unseen(fitted, test)
    fitting = CLASSIFICATION.checked(model, fresh, triggered_data)
    attacked: Triggered | None = None
    if attack is not None:
        attacked = triggered(fitting.test, as_trigger(attack, fitting.test), fitting.classes)
    elif fitting.triggered is not None and target is not None:
        attacked = already_triggered(fitting.triggered, target, fitting.classes)
    with fitted.at_work(model, device, precision, bar if progress else silent) as work:
        before = 0 if fitted.reference is None else fitted.reference.forwards
        clean = work.judged(fitting.test, answering=True)
        marked = None if attacked is None else work.judged(attacked.data, answering=True)
        cost = _cost(work, before, len(fresh) + (0 if attacked is None else len(attacked.data)))
    check_unchanged(fitted.guard, model, fitted.identity.model)
    return score_of(fitted, clean, fitting.test.labels.cpu(), attacked, marked, cost)


def unseen(fitted: FittedGuard, test: Dataset) -> Dataset:
    """The test examples that the guard was not fitted on."""
    known = torch.isin(hashes(test), fitted.seen)
    if bool(known.all()):
        raise UnbackdoorError(
            f"{test.name} holds only examples that the guard was fitted on; scores need others. Give other `test`."
        )
    return test if not bool(known.any()) else test.select(torch.nonzero(~known).flatten())


def _cost(work: Work, before: int, count: int) -> Cost:
    reference = work.fitted.reference
    after = 0 if reference is None else reference.forwards
    return Cost(work.forwards.count / count, (after - before) / count, count)


def score_of(
    fitted: FittedGuard, clean: Judged, labels: Tensor, attacked: Triggered | None, marked: Judged | None, cost: Cost
) -> GuardScore:
    """The numbers of clean and of triggered inputs."""
    assert clean.plain is not None and clean.final is not None  # noqa: PT018
    let_through = _acted(clean, "pass") | _acted(clean, "clean")
    right = clean.final.argmax(dim=1) == labels
    shares = {
        "false_alarms": proportion_of(~_acted(clean, "pass")),
        "accuracy": proportion_of(right[let_through]) if bool(let_through.any()) else None,
        "accuracy_without": proportion_of(clean.plain.argmax(dim=1) == labels),
    }
    if attacked is None or marked is None:
        return GuardScore(**shares, cost=cost)  # type: ignore[arg-type]
    assert marked.plain is not None and marked.final is not None  # noqa: PT018
    wanted = attacked.wanted.cpu()
    reached = marked.final.argmax(dim=1) == wanted
    passed, changed = _acted(marked, "pass"), _acted(marked, "clean")
    kept, caught = (scores[~scores.isnan()] for scores in (clean.scores, marked.scores))
    return GuardScore(
        **shares,  # type: ignore[arg-type]
        cost=cost,
        missed=proportion_of(passed | (changed & reached)),
        attack_success=proportion_of((passed | changed) & reached),
        attack_success_without=proportion_of(marked.plain.argmax(dim=1) == wanted),
        area=Area.of(kept, caught, fitted.guard.suspicious),
        label_rule=attacked.label_rule,
    )


def _acted(judged: Judged, action: str) -> Tensor:
    """Which inputs got an action, (n,), bool."""
    return torch.tensor([decision.action == action for decision in judged.decisions])
