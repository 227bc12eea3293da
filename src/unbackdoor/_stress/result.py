"""The results of a stress test, as values, as JSON and as a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unbackdoor._errors import SENTENCE, printable
from unbackdoor._stress.reactivation import Reach
from unbackdoor._tasks.generation_score import GenerationScore
from unbackdoor._tasks.score import Score

Measured = Score | GenerationScore

VICTIM, PURIFIED, EXACT, CONTROL = "victim", "purified", "exact_oracle", "control"
TITLES = {
    VICTIM: "victim",
    PURIFIED: "purified",
    EXACT: "exact purification (oracle)",
    CONTROL: "control (never poisoned)",
}


@dataclass(frozen=True)
class Retuned:
    """A model after retuning with `count` triggered examples, drawn by `seed`."""

    count: int
    seed: int
    score: Measured


@dataclass(frozen=True)
class Waypoint:
    """A model on the straight path from the victim, t = 0, to a purified model, t = 1."""

    t: float
    score: Measured


@dataclass(frozen=True)
class Reactivated:
    """The reach of the learnt perturbation.

    Args:
        count: the number of triggered examples that the teacher was retuned with.
        teacher: score of the teacher.
        models: shares by model: the purified model, and the control if there is one.
    """

    count: int
    teacher: Measured
    models: dict[str, Reach]


@dataclass(frozen=True, kw_only=True)
class Stress:
    """The results of a stress test of a purified model.

    The names of the models are `victim`, `purified`, `control` and `exact_oracle`. The last is the victim tuned on
    triggered examples with their true labels. Only somebody who knows the trigger can do that, so it is a reference,
    not a method.

    Args:
        before: the score of each model.
        retuned: scores of each model except the victim, by count and seed; empty if not requested.
        reactivated: result of the reactivation; None if not requested, or not possible (texts).
        paths: points from the victim to the purified model and to the oracle's; empty if not requested.
        ends: the victim and the purified model with BatchNorm statistics recomputed as inside the path; empty for
            models without BatchNorm.
        record: settings, data and versions, with `notes` and `warnings`.
    """

    before: dict[str, Measured]
    retuned: dict[str, tuple[Retuned, ...]]
    reactivated: Reactivated | None
    paths: dict[str, tuple[Waypoint, ...]]
    ends: dict[str, Measured]
    record: dict[str, Any]

    def after(self, name: str, count: int) -> list[Measured]:
        """The scores of a model after retuning with `count` triggered examples, one for each seed."""
        return [each.score for each in self.retuned.get(name, ()) if each.count == count]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; entries that were not measured are null, and those of the oracle are marked."""
        reactivation = self.reactivated and {
            "teacher": {"k": self.reactivated.count, **_brief(self.reactivated.teacher)},
            "models": {
                name: {field: share.to_json() for field, share in vars(shares).items()}
                for name, shares in self.reactivated.models.items()
            },
        }
        return {
            "format": 1,
            "before": {name: _marked(name, _brief(each)) for name, each in self.before.items()},
            "retuning": {
                name: _marked(name, {"runs": [{"k": run.count, "seed": run.seed, **_brief(run.score)} for run in runs]})
                for name, runs in self.retuned.items()
            }
            or None,
            "reactivation": reactivation,
            "path": {
                name: _marked(name, {"points": [{"t": point.t, **_brief(point.score)} for point in points]})
                for name, points in self.paths.items()
            }
            or None,
            "path_ends_recomputed": {name: _brief(each) for name, each in self.ends.items()} or None,
            **self.record,
        }

    @property
    def fields(self) -> tuple[str, ...]:
        """The figures that are shown of each score: the attack's success, and how well the model does its task."""
        if isinstance(self.before[PURIFIED], GenerationScore):
            return "attack_success", "clean_loss", "false_activation"
        return "attack_success", "clean_accuracy"

    def __str__(self) -> str:
        counts = self.record["counts"] if self.retuned else []
        lines = []
        for field in self.fields:
            unit, form = _unit_and_format(field)
            lines.append(
                f"{field.replace('_', ' ') + f', {unit}':28}  before" + "".join(f"{f'k = {k}':>8}" for k in counts)
            )
            for name, first in self.before.items():
                cells = [getattr(first, field).value]
                cells += [mean(self.after(name, count), field) for count in counts if name in self.retuned]
                lines.append(f"  {TITLES[name]:26}" + "".join(f"{form(cell):>8}" for cell in cells))
            lines.append("")
        for field in self.fields[:2] if self.paths else ():
            unit, form = _unit_and_format(field)
            steps = "".join(f"{point.t:6.1f}" for point in self.paths[PURIFIED])
            lines.append(f"{field.replace('_', ' ') + f' on the path, {unit}':32}{steps}")
            for name, points in self.paths.items():
                cells = [getattr(point.score, field).value for point in points]
                lines.append(f"  {'to ' + TITLES[name]:30}" + "".join(f"{form(cell):>6}" for cell in cells))
            lines.append("")
        if self.reactivated is not None:
            lines.append(f"{'sent to the attacker, %':28}   clean  +noise  trigger  trigger+noise")
            for name, shares in self.reactivated.models.items():
                cells = [100 * share.value for share in vars(shares).values()]
                lines.append(f"  {TITLES[name]:26}{cells[0]:8.1f}{cells[1]:8.1f}{cells[2]:9.1f}{cells[3]:15.1f}")
            lines.append("")
        scored = self.record["scored_on"]
        counted = f"n = {scored['n']:,} clean and {scored['triggered']:,} triggered examples, {scored['note']}"
        return "\n".join([*lines, *(printable(line, SENTENCE) for line in (counted, *self.record["notes"]))])


def mean(scores: Sequence[Measured], field: str) -> float:
    """The mean of a share or a loss over scores."""
    return float(sum(getattr(each, field).value for each in scores) / len(scores))


def _brief(measured: Measured) -> dict[str, Any]:
    return {key: entry for key, entry in measured.to_json().items() if isinstance(entry, dict) and key != "per_class"}


def _unit_and_format(field: str) -> tuple[str, Callable[[float], str]]:
    """The unit of a measure, and how its values are written in it."""
    if field == "clean_loss":
        return "nats", lambda loss: f"{loss:.2f}"
    return "%", lambda share: f"{100 * share:.1f}"


def _marked(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {"oracle": True, **entry} if name == EXACT else entry
