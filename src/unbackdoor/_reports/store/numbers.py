"""The numbers of a report: settings with their means and spreads, tables of them, cells, failures."""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unbackdoor._artifacts.entries import AnswerLossEntry, ProportionEntry
from unbackdoor._errors import UnbackdoorError

FORMAT = 1  # of the JSON
MEASURES = (
    "clean_accuracy",
    "attack_success",
    "recovered_accuracy",
    "accuracy_lost",
    "flip_rate",
    "control_accuracy",
    "second_accuracy",
    "second_success",
    "seconds",
    "memory",
    "clean_loss",
    "loss_added",
    "false_activation",
    "empty",
    "control_loss",
    "second_loss",
    "distrusted",
    "distrust_precision",
    "distrust_recall",
)

# The columns of a flat table: what is no spread, and the parts of the spreads.
PLAIN = (
    *("task", "attack", "rate", "label_rule", "budget", "method"),
    *("counted", "not_implanted", "unknown", "failed", "unusable", "clean_n", "triggered_n", "seeds", "victim_seeds"),
)
PARTS = ("mean", "sd", "n", "least", "most")


@dataclass(frozen=True)
class Spread:
    """Several measurements of one setting.

    Args:
        mean: mean over seeds.
        sd: sample standard deviation (divided by n - 1); None for a single measurement.
        n: number of measurements.
        least, most: the smallest and the largest.
        interval: 95 % Wilson interval of a single share; of a single loss, that over its answers.

    >>> Spread.of([0.25, 0.75]).mean
    0.5
    """

    mean: float
    sd: float | None
    n: int
    least: float
    most: float
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Returns the spread of numbers; None for no number."""
        numbers = list(values)
        if not numbers:
            return None
        sd = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(math.fsum(numbers) / len(numbers), sd, len(numbers), min(numbers), max(numbers))

    @classmethod
    def of_shares(cls, shares: Iterable[ProportionEntry | AnswerLossEntry | None]) -> "Spread | None":
        """Returns the spread of shares or losses, without those that were not measured."""
        measured = [share for share in shares if share is not None]
        spread = cls.of(share.value for share in measured)
        if spread is None or len(measured) > 1:
            return spread
        return dataclasses.replace(spread, interval=(measured[0].low, measured[0].high))


@dataclass(frozen=True)
class Row:
    """One setting: everything that determines a result except the seeds.

    Args:
        task, attack, budget, method: short names.
        baseline: `none` (the victim before any method), `fine-tuning`, or empty.
        control: whether the victim is the clean control.
        rate: poison rate; None if it is not known.
        budgetless: the method took no clean example.
        zero_shot: whether the accuracies are those of prompts, of a model of images and texts.
        label_rule: label rule of the attack; None for a control.
        clean_accuracy, attack_success, recovered_accuracy: over the counted cells.
        accuracy_lost: the victim's accuracy before the method minus that after it.
        flip_rate: flip rate of the clean control put through the same method, on the same triggers.
        control_accuracy: its clean accuracy.
        second_accuracy, second_success: of the counted cells that were scored on the task's second test examples.
        seconds: seconds of the purification.
        memory: peak memory in bytes.
        clean_loss, false_activation, empty: of language models, which have no accuracy; a loss is in nats per token.
        loss_added: the loss after the method minus the victim's before it.
        control_loss: of the clean control put through the same method.
        second_loss: on the task's second test examples.
        distrusted: of a trainer, the share of the training data that it distrusts.
        distrust_precision, distrust_recall: shares of these rows that are poisoned, and of the poisoned ones that it
            distrusts.
        clean_n, triggered_n: number of test examples.
        counted: number of finished cells in the averages.
        not_implanted: number of finished cells that are left out because the attack did not implant.
        unknown: number of counted cells for which it is not known whether the attack implanted.
        failed: number of cells without a result.
        unusable: number of counted cells whose purified model is not usable.
        seeds, victim_seeds: seeds of the counted cells.
    """

    task: str
    attack: str
    rate: float | None
    budget: str
    method: str
    baseline: str
    control: bool
    budgetless: bool
    zero_shot: bool
    label_rule: str | None
    clean_accuracy: Spread | None
    attack_success: Spread | None
    recovered_accuracy: Spread | None
    accuracy_lost: Spread | None
    flip_rate: Spread | None
    control_accuracy: Spread | None
    second_accuracy: Spread | None
    second_success: Spread | None
    seconds: Spread | None
    memory: Spread | None
    clean_loss: Spread | None
    loss_added: Spread | None
    false_activation: Spread | None
    empty: Spread | None
    control_loss: Spread | None
    second_loss: Spread | None
    distrusted: Spread | None
    distrust_precision: Spread | None
    distrust_recall: Spread | None
    clean_n: int | None
    triggered_n: int | None
    counted: int
    not_implanted: int
    unknown: int
    failed: int
    unusable: int
    seeds: tuple[int, ...]
    victim_seeds: tuple[int, ...]

    @property
    def apart(self) -> bool:
        """Whether its attack success cannot be compared with that of other label rules."""
        return self.label_rule == "all-to-all"

    def flat(self) -> dict[str, Any]:
        """Returns the row as one line of a table; shares in [0, 1], memory in bytes, None for missing numbers."""
        line = {name: getattr(self, name) for name in PLAIN}
        for name in MEASURES:
            spread: Spread | None = getattr(self, name)
            for part in PARTS:
                line[f"{name}_{part}"] = None if spread is None else getattr(spread, part)
        return line

    @property
    def column(self) -> str:
        """Attack and poison rate."""
        return column_of(self.attack, self.rate, self.control)


@dataclass(frozen=True)
class GuardRow:
    """One guard in front of the victims of one attack, at one share of false alarms.

    Args:
        task, attack, budget, guard: short names.
        rate: poison rate; None if it is not known.
        control: whether the victim is the clean control.
        asked: the share of false alarms that was asked for; None for a guard whose threshold it does not move.
        missed: triggered inputs that pass, over the counted cells, as all of the following.
        false_alarms: clean inputs that raise an alarm.
        area: under the curve of the scores.
        attack_success, attack_success_without: with the guard and without it.
        accuracy, accuracy_without: of what passes, and of all clean inputs without the guard.
        answers_kept: of a language model, clean prompts with the same answer as without the guard.
        forwards, reference_forwards: forward passes of an input, through the model and through the reference.
        clean_n, triggered_n: number of inputs.
        counted, not_implanted, failed: numbers of cells, as of a `Row`.
        messages: of the failures.
        seeds, victim_seeds: seeds of the counted cells.
    """

    task: str
    attack: str
    rate: float | None
    budget: str
    guard: str
    control: bool
    asked: float | None
    missed: Spread | None
    false_alarms: Spread | None
    area: Spread | None
    attack_success: Spread | None
    attack_success_without: Spread | None
    accuracy: Spread | None
    accuracy_without: Spread | None
    answers_kept: Spread | None
    forwards: Spread | None
    reference_forwards: Spread | None
    clean_n: int | None
    triggered_n: int | None
    counted: int
    not_implanted: int
    failed: int
    messages: tuple[str, ...]
    seeds: tuple[int, ...]
    victim_seeds: tuple[int, ...]

    @property
    def column(self) -> str:
        """Attack and poison rate."""
        return column_of(self.attack, self.rate, self.control)


@dataclass(frozen=True)
class Block:
    """Methods by attacks, of one task and one clean budget.

    Args:
        apart: whether it has the all-to-all attacks, or all others.
        columns: attacks and rates on which some method was run with this budget.
        methods: the rows' names.
        cells: row numbers of the report, one list per method, one entry per column; None if nothing was run.
        over: spread of the attack success over the attacks that a method was run on; None without attacks.
    """

    task: str
    budget: str
    apart: bool
    columns: tuple[str, ...]
    methods: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]
    over: tuple[Spread | None, ...]


@dataclass(frozen=True)
class CellLine:
    """One cell: the place of its record, and the command that repeats it."""

    key: str
    row: int
    victim_seed: int | None
    seed: int
    status: str
    grid: str


@dataclass(frozen=True)
class UnimplantedVictim:
    """A victim in which the attack did not implant, with its attack success before any method, if measured."""

    task: str
    attack: str
    rate: float | None
    seed: int | None
    success: float | None
    cells: int


@dataclass(frozen=True)
class Failure:
    """A cell without a result."""

    key: str
    row: int
    victim_seed: int | None
    seed: int
    message: str


@dataclass(frozen=True)
class RetunedSpread:
    """Attack success after tuning with `k` triggered examples: mean, sample standard deviation and count of draws."""

    k: int
    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class StressRow:
    """The result of a stress test of one model.

    Args:
        source: description of the stress test.
        model: `victim`, `purified`, `exact_oracle` or `control`.
        clean_accuracy, attack_success: before it.
        clean_loss: of a language model, which has no accuracy.
        retuned: by the number of triggered examples.
        reactivated: share of triggered examples sent to the attacker under the learnt perturbation.
    """

    source: str
    model: str
    clean_accuracy: float | None
    clean_loss: float | None
    attack_success: float | None
    retuned: tuple[RetunedSpread, ...]
    reactivated: float | None


@dataclass(frozen=True)
class Report:
    """The content of a store.

    Args:
        store: its address as a command can name it, without the folders above an absolute one.
        rows: settings, in order.
        blocks: the same as tables.
        cells: all cells, in the order of `rows`.
        left_out: victims whose cells are in no average.
        failures: cells without a result.
        stress: stress tests; empty if there are none.
        guards: guards in front of the victims; empty if there are none.
        victim_seconds: by task, of training a victim.
        machines: what the cells were measured on, the most frequent first, with how many cells.
        commits: of the repository, in the same form.
        versions: of the software, in the same form.
        dates: dates of the first and the last cell; empty without cells.
        notes: sentences that a reader must know.
    """

    store: str
    rows: tuple[Row, ...]
    blocks: tuple[Block, ...]
    cells: tuple[CellLine, ...]
    left_out: tuple[UnimplantedVictim, ...]
    failures: tuple[Failure, ...]
    stress: tuple[StressRow, ...]
    guards: tuple[GuardRow, ...]
    victim_seconds: dict[str, Spread]
    machines: dict[str, int]
    commits: dict[str, int]
    versions: dict[str, int]
    dates: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def to_pandas(self) -> Any:
        """Returns one row per setting as a `pandas.DataFrame`, with the columns of `report.csv`; seeds are tuples.

        Raises:
            UnbackdoorError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UnbackdoorError("Report.to_pandas needs pandas. Install it: pip install pandas.") from None
        return pandas.DataFrame([row.flat() for row in self.rows])


def flat_names() -> list[str]:
    """The columns of `Row.flat`, in order."""
    return [*PLAIN, *(f"{name}_{part}" for name in MEASURES for part in PARTS)]


def column_of(attack: str, rate: float | None, control: bool) -> str:
    """An attack and its poison rate, as tables name them."""
    return "clean control" + attack.removeprefix("none") if control else f"{attack} {percent(rate)}".rstrip()


def percent(share: float | None) -> str:
    """Returns a rate in percent; empty if it is not known.

    >>> percent(0.005)
    '0.5 %'
    """
    return "" if share is None else f"{100 * share:.10g} %"
