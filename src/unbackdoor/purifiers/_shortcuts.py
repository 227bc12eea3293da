"""The shortcuts that an audit found, as far as `Auto` counts them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.audit import audit
from unbackdoor._detection.judging import ExactShare, HeldOut
from unbackdoor._detection.result import ALARM, Audit, JudgedCandidate, JudgedFinding
from unbackdoor._errors import UnbackdoorError, listed
from unbackdoor._progress import silent
from unbackdoor._purification.run import Run
from unbackdoor._registry.detectors import REGISTRY as DETECTORS
from unbackdoor._registry.entries import find


@dataclass(frozen=True)
class Shortcut:
    """A shortcut that an audit found, and the name of the detector."""

    detector: str
    judged: JudgedCandidate

    @property
    def target(self) -> int:
        """The class that it leads to."""
        return self.judged.candidate.target

    @property
    def beyond_chance(self) -> float:
        """The share of unseen examples that it moves more than a random trigger does; 1 if it has no trigger to try."""
        moved, random = self.judged.moved, self.judged.random
        return 1.0 if moved is None else moved.value - (0.0 if random is None else random.value)

    @property
    def sentence(self) -> str:
        """The detector, the class and the share of unseen examples that move, in words."""
        moved = "" if self.judged.moved is None else f", which moves {self.judged.moved.value:.0%} of unseen examples"
        return f"{self.detector} found one to class {self.judged.target_name}{moved}"

    def to_json(self) -> dict[str, Any]:
        """Returns the entries of the record."""
        shares = {"moved": self.judged.moved, "random": self.judged.random}
        return {
            "detector": self.detector,
            "target": {"number": self.target, "name": self.judged.target_name},
            **{name: share and share.to_json() for name, share in shares.items()},
            "nominal_p": self.judged.nominal_p,
            "p_value": self.judged.p_value,
        }

    def moving(self, held_out: HeldOut) -> tuple[ExactShare, ExactShare] | None:
        """Returns how many held-out examples its trigger moves, and a random one; None if it has no trigger."""
        candidate = self.judged.candidate
        if candidate.trigger is None or candidate.control is None:
            return None
        return held_out.moved(candidate.trigger, candidate), held_out.moved(candidate.control, candidate)


def audited(model: nn.Module, clean: Dataset, run: Run, names: tuple[str, ...] | None) -> Audit | str:
    """Returns the audit of a model in a run's arithmetic; the reason if the examples do not allow one.

    Args:
        model: the suspect, or a result.
        clean: examples.
        run: of the purification.
        names: of detectors; None takes all that fit.

    Raises:
        UnbackdoorError: there is no detector of a name, or it does not serve this kind of examples.
    """
    chosen = None
    if names is not None:
        entries = [find(name, DETECTORS, "detector", "detectors") for name in dict.fromkeys(names)]
        for entry in entries:
            if clean.modality not in entry.modality:
                raise UnbackdoorError(
                    f"Auto.detectors must serve {clean.modality}, got {entry.name}, which serves "
                    f"{listed(entry.modality)}. See unbackdoor list detectors."
                )
        chosen = [entry.resolve()() for entry in entries]
    try:
        return audit(
            model,
            clean,
            detectors=chosen,
            base=run.base,
            seed=run.seed,
            head=run.head_name,
            device=str(run.arithmetic.device),
            precision="bf16" if run.arithmetic.bf16 else "fp32",
            progress=run.progress is not silent,
        )
    except UnbackdoorError as problem:
        return str(problem)


def counting(report: Audit | str) -> list[Shortcut]:
    """Returns the shortcuts of an audit that count, one for each detector at most; see `Auto`.

    If clean models can be compared with, alarms count; else shortcuts that stand out.
    """
    if isinstance(report, str):
        return []
    return [
        Shortcut(finding.detector, finding.strongest)
        for finding in report.findings
        if (finding.alarm if finding.strongest.p_value is not None or report.calibration else _stands_out(finding))
    ]


def _stands_out(finding: JudgedFinding) -> bool:
    """Returns whether the strongest shortcut is proven, beats a random trigger, and is rare among the classes."""
    strongest = finding.strongest
    if finding.looks_natural or not strongest.proven or strongest.nominal_p > ALARM:
        return False
    if strongest.moved is None or strongest.random is None:
        return True
    return strongest.moved.interval[0] > strongest.random.interval[1]


def summary(report: Audit, shortcuts: list[Shortcut]) -> str:
    """Returns what an audit found, or why it could not search, as a sentence."""
    if shortcuts:
        return "; ".join(each.sentence for each in shortcuts) + "."
    return "no shortcut stands out." if report.findings else report.reason


def described(report: Audit | str, shortcuts: list[Shortcut]) -> dict[str, Any]:
    """Returns an audit as the record has it."""
    verdict, reason = ("cannot-judge", report) if isinstance(report, str) else (report.verdict, report.reason)
    return {"verdict": verdict, "reason": reason, "shortcuts": [each.to_json() for each in shortcuts]}
