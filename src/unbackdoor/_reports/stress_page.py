"""The content of the page about a stress test as plain values: curves, tables, and how to read them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unbackdoor._errors import SENTENCE, printable
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._reports.sentences import percent
from unbackdoor._stress.result import CONTROL, EXACT, PURIFIED, TITLES, VICTIM, Measured, Stress, mean
from unbackdoor._tasks.generation_score import AnswerLoss
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._tasks.score import Score

LEFT, RIGHT, TOP, BOTTOM = 46, 330, 14, 184  # of the plot, in the units of the drawing
APART = 5  # between the whiskers of two curves, so that both are seen


@dataclass(frozen=True)
class ShownNumber:
    """A share or a loss to show: one with its interval, or the mean over seeds with their range.

    Args:
        value: a share in [0, 1], or a loss in nats per answer token.
        low: low end.
        high: high end.
        n: examples behind it.
        seeds: number of seeds.
        loss: whether it is a loss.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int
    loss: bool = False

    @property
    def text(self) -> str:
        """The value with its unit."""
        return self.written(self.value)

    def written(self, value: float) -> str:
        """A value of this measure with its unit."""
        return f"{value:.2f} nats" if self.loss else percent(value)

    @property
    def spread(self) -> str:
        """`low` and `high` in words, with the counts behind them."""
        ends = f"{self.written(self.low)} to {self.written(self.high)}"
        count = f"n\u00a0=\u00a0{self.n:,}"
        return f"{ends}, {count}" if self.seeds == 1 else f"{ends} over {self.seeds} seeds, {count}"


@dataclass(frozen=True)
class CurveMark:
    """A point of a curve with its whisker; y grows downwards."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Curve:
    """One model's points."""

    key: str
    name: str
    marks: tuple[CurveMark, ...]

    @property
    def line(self) -> str:
        """The points of a polyline."""
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True)
class Chart:
    """Shares of several models over the same places.

    Args:
        name: the measure.
        better: the better direction, `higher` or `lower`.
        along: the meaning of the horizontal axis.
        ticks: places and their names.
        curves: the models.
        reference: height of the victim, and its share in words; None if the victim is one of the curves.
        levels: heights of the lines across, and their names.
    """

    name: str
    better: Literal["higher", "lower"]
    along: str
    ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]
    reference: tuple[float, str] | None
    levels: tuple[tuple[float, str], ...]

    @property
    def text(self) -> str:
        """All numbers of the chart in words, for readers who cannot see it."""
        return f"{self.name}. " + ". ".join(
            f"{curve.name}: " + ", ".join(mark.text for mark in curve.marks) for curve in self.curves
        )


@dataclass(frozen=True)
class ModelRow:
    """One model in a table; a cell is None if it was not measured."""

    name: str
    cells: tuple[ShownNumber | None, ...]


@dataclass(frozen=True)
class NumberTable:
    """Numbers behind a chart."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[ModelRow, ...]


@dataclass(frozen=True, kw_only=True)
class StressPage:
    """The numbers of the page.

    Args:
        title: title of the page.
        verdict: one or two plain sentences.
        notes: limits of the test.
        unusable: why the purified model is not usable; None if it is.
        warnings: the other warnings.
        legend: key and name of the models in the charts.
        retuning: charts of attack success and clean accuracy; empty if it was not asked for.
        retuned: the numbers behind them.
        reactivation: the shares, or None.
        teacher: the aim of the perturbation, in words.
        path: charts of attack success and clean accuracy; empty if it was not asked for.
        ends: a sentence about the ends of the path with recomputed statistics.
        facts: settings and costs, as label and text.
    """

    title: str
    verdict: str
    notes: tuple[str, ...]
    unusable: str | None
    warnings: tuple[str, ...]
    legend: tuple[tuple[str, str], ...]
    retuning: tuple[Chart, ...]
    retuned: tuple[NumberTable, ...]
    reactivation: NumberTable | None
    teacher: str
    path: tuple[Chart, ...]
    ends: str
    facts: tuple[tuple[str, str], ...]


class PlottedMeasure(NamedTuple):
    """A measure of the page: its field of a score, its name, and the better direction."""

    field: str
    name: str
    better: Literal["higher", "lower"]


_MEASURES = {
    measure.field: measure
    for measure in (
        PlottedMeasure("attack_success", "Attack success", "lower"),
        PlottedMeasure("clean_accuracy", "Clean accuracy", "higher"),
        PlottedMeasure("clean_loss", "Clean loss", "lower"),
        PlottedMeasure("false_activation", "False activation", "lower"),
    )
}


def build_stress(stress: Stress, names: dict[str, str | None], classes: tuple[str, ...] | None) -> StressPage:
    """Collect the numbers of the page.

    Args:
        stress: the result of the test.
        names: the user's names of `model`, `victim` and `control`.
        classes: class names, if known.
    """
    measures = [_MEASURES[field] for field in stress.fields]
    usable, warnings = stress.record["usable"], [printable(text, SENTENCE) for text in stress.record["warnings"]]
    shown = [name for name in (PURIFIED, EXACT, CONTROL) if name in stress.retuned or name in stress.paths]
    return StressPage(
        title="Does the backdoor stay gone?",
        verdict=_verdict(stress),
        notes=tuple(printable(note, SENTENCE) for note in stress.record["notes"]),
        unusable=None if usable else warnings[0],
        warnings=tuple(warnings[not usable :]),
        legend=tuple((name, TITLES[name]) for name in shown),
        retuning=tuple(_retuning(stress, measure) for measure in measures[:2]) if stress.retuned else (),
        retuned=tuple(_retuned(stress, measure) for measure in measures),
        reactivation=_reactivation(stress),
        teacher=_teacher(stress),
        path=tuple(_path(stress, measure) for measure in measures[:2]) if stress.paths else (),
        ends=_ends(stress),
        facts=_facts(stress, names, classes),
    )


def pooled(scores: Sequence[Measured], field: str) -> ShownNumber:
    """One score with its interval; of several the mean and their range."""
    parts: list[Proportion | AnswerLoss] = [getattr(each, field) for each in scores]
    if len(parts) == 1:
        return _with_interval(parts[0])
    values = [part.value for part in parts]
    loss = isinstance(parts[0], AnswerLoss)
    return ShownNumber(mean(scores, field), min(values), max(values), parts[0].n, len(parts), loss)


def _with_interval(part: Proportion | AnswerLoss) -> ShownNumber:
    if isinstance(part, AnswerLoss):
        return ShownNumber(part.value, part.low, part.high, part.n, 1, loss=True)
    return ShownNumber(part.value, *part.interval, part.n, 1)


@dataclass(frozen=True)
class _Scale:
    """The vertical axis of a chart, from 0 to `most`."""

    most: float
    loss: bool

    @classmethod
    def of(cls, shown: Sequence[ShownNumber]) -> "_Scale":
        """The scale for some values: of losses up to a round number above all of them, of shares up to 1."""
        if not shown[0].loss:
            return cls(1.0, False)
        highest = max(each.high for each in shown)
        power = 10.0 ** math.floor(math.log10(max(highest, 1e-6)))
        return cls(next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= highest), True)

    def height(self, value: float) -> float:
        return BOTTOM - max(0.0, value) / self.most * (BOTTOM - TOP)

    @property
    def levels(self) -> tuple[tuple[float, str], ...]:
        quarters = [self.most * quarter / 4 for quarter in range(5)]
        names = [f"{each:.3g}" if self.loss else f"{100 * each:.0f}\u202f%" for each in quarters]
        return tuple((self.height(each), name) for each, name in zip(quarters, names, strict=True))

    def curve(self, key: str, shown: Sequence[ShownNumber], places: Sequence[float], names: Sequence[str]) -> Curve:
        aside = {PURIFIED: 0, EXACT: -APART, CONTROL: APART}[key]
        marks = [
            CurveMark(
                x + aside, self.height(each.value), self.height(each.low), self.height(each.high), f"{name} {each.text}"
            )
            for each, x, name in zip(shown, places, names, strict=True)
        ]
        return Curve(key, TITLES[key], tuple(marks))


def _spaced(count: int) -> list[float]:
    inner = APART + 5  # so that no mark stands on the axis
    width = RIGHT - LEFT - 2 * inner
    return [LEFT + inner + width * place / max(1, count - 1) for place in range(count)]


def _retuning(stress: Stress, measure: PlottedMeasure) -> Chart:
    counts = stress.record["counts"]
    names = ["before", *map(str, counts)]
    places = _spaced(len(names))
    shown = {key: _after(stress, key, measure.field) for key in (PURIFIED, EXACT, CONTROL) if key in stress.retuned}
    before = pooled([stress.before[VICTIM]], measure.field)
    scale = _Scale.of([before, *(each for values in shown.values() for each in values)])
    curves = [
        scale.curve(key, values, places, ["before", *(f"after {count}" for count in counts)])
        for key, values in shown.items()
    ]
    return Chart(
        measure.name,
        measure.better,
        "triggered examples in the retuning",
        tuple(zip(places, names, strict=True)),
        tuple(curves),
        (scale.height(before.value), f"victim {before.text}"),
        scale.levels,
    )


def _after(stress: Stress, key: str, field: str) -> list[ShownNumber]:
    """Before retuning, and after it for each count."""
    return [
        pooled([stress.before[key]], field),
        *(pooled(stress.after(key, count), field) for count in stress.record["counts"]),
    ]


def _retuned(stress: Stress, measure: PlottedMeasure) -> NumberTable:
    field = measure.field
    counts = stress.record["counts"] if stress.retuned else []
    rows = [
        ModelRow(
            TITLES[key],
            tuple(_after(stress, key, field))
            if key in stress.retuned
            else (pooled([measured], field), *(None for _ in counts)),
        )
        for key, measured in stress.before.items()
    ]
    return NumberTable(measure.name, ("before", *(f"k = {count}" for count in counts)), tuple(rows))


def _path(stress: Stress, measure: PlottedMeasure) -> Chart:
    points = stress.paths[PURIFIED]
    places = _spaced(len(points))
    ticks = tuple(
        (x, {0.0: "victim", 1.0: "purified"}.get(point.t, f"{point.t:g}"))
        for x, point in zip(places, points, strict=True)
        if round(10 * point.t) % 5 == 0
    )
    shown = {key: [pooled([point.score], measure.field) for point in each] for key, each in stress.paths.items()}
    scale = _Scale.of([each for values in shown.values() for each in values])
    along = [f"at {point.t:.1f}" for point in points]
    curves = tuple(scale.curve(key, values, places, along) for key, values in shown.items())
    return Chart(measure.name, measure.better, "way from the victim’s weights", ticks, curves, None, scale.levels)


def _reactivation(stress: Stress) -> NumberTable | None:
    if stress.reactivated is None:
        return None
    rows = [
        ModelRow(TITLES[key], tuple(map(_with_interval, vars(shares).values())))
        for key, shares in stress.reactivated.models.items()
    ]
    columns = ("nothing added", "perturbation", "trigger", "trigger and perturbation")
    return NumberTable("Classified as the attacker wants", columns, tuple(rows))


def _teacher(stress: Stress) -> str:
    if stress.reactivated is None:
        return ""
    success = stress.reactivated.teacher.attack_success
    assert success is not None
    aside = (
        "while the control still answers with the true class"
        if CONTROL in stress.reactivated.models
        else "without a control, so it may be an ordinary adversarial example"
    )
    return (
        "A perturbation of at most 16 of 255 levels, learnt so that the purified model behaves as if it were retuned, "
        f"{aside}. It imitates the purified model after retuning with {stress.reactivated.count} triggered "
        f"examples, which classifies {percent(success.value)} of triggered examples as the attacker wants."
    )


def _ends(stress: Stress) -> str:
    if not stress.ends:
        return ""
    parts = [
        f"the {TITLES[name]} model has attack success {percent(measured.attack_success.value)} and clean accuracy "
        f"{percent(measured.clean_accuracy.value)}"
        for name, measured in stress.ends.items()
        if isinstance(measured, Score) and measured.attack_success is not None
    ]
    return f"With statistics recomputed at the ends as well, {' and '.join(parts)}."


def _verdict(stress: Stress) -> str:
    before = pooled([stress.before[PURIFIED]], "attack_success")
    victim = pooled([stress.before[VICTIM]], "attack_success")
    answered = "answered" if "clean_loss" in stress.fields else "classified"
    text = (
        f"The victim {answered} {percent(victim.value)} of triggered examples as the attacker wants, the purified "
        f"model {percent(before.value)}."
    )
    stayed = before.value >= victim.value / 2
    if stayed:
        text += " The purification left most of the backdoor, so there was little to learn again."
    if not stress.retuned:
        return text
    counts = stress.record["counts"]
    count = 5 if 5 in counts else counts[-1]
    after = pooled(stress.after(PURIFIED, count), "attack_success")
    text += f" After retuning with {count} triggered example{'s' * (count > 1)} it was {percent(after.value)}"
    if CONTROL not in stress.retuned:
        return f"{text}; how fast a clean model would learn that is not known."
    control = pooled(stress.after(CONTROL, count), "attack_success")
    text += f", and {percent(control.value)} with a model that was never poisoned."
    if stayed:
        return text
    if after.low > control.high:
        return f"{text} The purified model learns the backdoor again faster than a clean model learns it."
    if after.high < control.low:
        return f"{text} The purified model learns the backdoor again more slowly than a clean model learns it."
    return f"{text} That is not clearly different from a clean model that learns it."


def _facts(
    stress: Stress, names: dict[str, str | None], classes: tuple[str, ...] | None
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    record = stress.record
    goal = record["target"]
    behaviour = record.get("behaviour")
    wanted = "each class to the next" if goal is None else classes[goal] if classes and goal < len(classes) else goal
    if behaviour is not None:
        wanted = str(Behaviour(**behaviour))
    parameters = ", ".join(f"{name} {setting}" for name, setting in record["attack"]["parameters"].items())
    scored, recipe = record["scored_on"], record["settings"]["retuning"]
    facts = [
        ("Purified model", names["model"]),
        ("Victim", names["victim"]),
        ("Control", names["control"] or "none"),
        ("Attack", f"{record['attack']['name']} ({parameters})"),
        ("Attacker wants", wanted),
        ("Retuning", ", ".join(f"{name.replace('_', ' ')} {setting}" for name, setting in recipe.items())),
        ("Clean data", f"{record['clean']['n']:,} examples, {record['clean']['attackable']:,} that the attack moves"),
        ("Scored on", f"{scored['n']:,} clean and {scored['triggered']:,} triggered examples {scored['note']}"),
        ("Seeds", ", ".join(map(str, record["seeds"]))),
        ("Time", f"{record['seconds']:.0f} s"),
        ("Device", record["device"]),
        ("Versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())),
    ]
    return tuple((label, printable(text, SENTENCE)) for label, text in facts)
