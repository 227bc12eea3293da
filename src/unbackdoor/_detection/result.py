"""The result of an audit: a verdict, and the findings that it rests on."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from unbackdoor._detection.finding import Candidate
from unbackdoor._detection.judging import PROVEN, ExactShare, HeldOut
from unbackdoor._detection.nulls import Null
from unbackdoor._detection.prompt_judging import HeldOutPrompts
from unbackdoor._errors import printable
from unbackdoor._registry.detectors import REGISTRY

Verdict = Literal["shortcut-found", "nothing-found", "cannot-judge"]

ALARM = 0.05  # the largest p-value of an alarm
FORMAT = 1  # of audit.json


@dataclass(frozen=True, kw_only=True)
class JudgedCandidate:
    """A shortcut, judged on the held-out examples.

    Args:
        candidate: the shortcut as the detector returned it.
        target_name: of its class.
        source_names: of the source classes; empty for all.
        moved: the held-out examples that its trigger moves; None if it has no trigger.
        random: those that a random trigger of the same size moves; None if there is none.
        nominal_p: how likely it is in a clean model, if the assumptions of the detector hold.
        p_value: measured on clean models; None if none can be compared.
    """

    candidate: Candidate
    target_name: str
    source_names: tuple[str, ...]
    moved: ExactShare | None
    random: ExactShare | None
    nominal_p: float
    p_value: float | None

    @property
    def proven(self) -> bool:
        """Whether the shortcut moves most held-out examples, or needs no trigger."""
        return self.moved is None or self.moved.value >= PROVEN

    @property
    def score(self) -> float:
        """-log10 of the nominal p-value; 0 for a shortcut that the held-out examples do not confirm."""
        return max(0.0, -math.log10(max(self.nominal_p, 1e-300))) if self.proven else 0.0

    def to_json(self, unit: str, calibration: str) -> dict[str, Any]:
        """Its entry in `audit.json`.

        Args:
            unit: of its size.
            calibration: where its p-value comes from, or why there is none.
        """
        candidate = self.candidate
        sources = [
            {"number": number, "name": name} for number, name in zip(candidate.sources, self.source_names, strict=True)
        ]
        return {
            "target": {"number": candidate.target, "name": self.target_name},
            **({"sources": sources} if sources else {}),
            "moved": None if self.moved is None else self.moved.to_json(),
            "random": None if self.random is None else self.random.to_json(),
            "budget": None if candidate.size is None else {"size": candidate.size, "unit": unit},
            "abnormality": {"p_value": self.p_value, "calibration": calibration, "nominal_p": self.nominal_p},
        }


@dataclass(frozen=True, kw_only=True)
class JudgedFinding:
    """The result of one detector.

    Args:
        detector: its name.
        classes: the shortcut of each class (or pair of classes), judged.
        unit: of the sizes.
        looks_natural: whether the strongest shortcut looks like a feature of its class; None if that is not known.
        settings: all of the detector's.
        seconds: of the search.
        targets: what the shortcuts lead to: `class`, `answer` or `layer`.
    """

    detector: str
    classes: tuple[JudgedCandidate, ...]
    unit: str
    looks_natural: bool | None
    settings: dict[str, Any]
    seconds: float
    targets: str = "class"

    @property
    def strongest(self) -> JudgedCandidate:
        """The shortcut with the largest score; of equal ones, the one that moves most, and then the strongest."""

        def rank(each: JudgedCandidate) -> tuple[float, float, float]:
            return each.score, 0.0 if each.moved is None else each.moved.value, each.candidate.strength

        return max(self.classes, key=rank)

    @property
    def alarm(self) -> bool:
        """Whether the strongest shortcut is as rare as an alarm asks for, and does not look natural."""
        p_value = self.strongest.p_value
        return p_value is not None and p_value <= ALARM and self.looks_natural is not True

    def size_of(self, each: JudgedCandidate) -> str:
        """The size of a trigger with its unit; empty if it has none."""
        size = each.candidate.size
        if size is None:
            return ""
        unit = self.unit.removesuffix("s") if size == 1 and " " not in self.unit else self.unit
        return f"{size:.3g} {printable(unit)}"

    @property
    def blind(self) -> str:
        """The triggers that the detector cannot see."""
        return next((entry.blind for entry in REGISTRY if entry.name == self.detector), "") or "it does not say"

    def to_json(self, calibration: str) -> dict[str, Any]:
        """Its entry in `audit.json`, but for the files of its evidence.

        Args:
            calibration: where p-values come from, or why there are none.
        """
        return {
            "detector": self.detector,
            "alarm": self.alarm,
            **self.strongest.to_json(self.unit, calibration),
            "looks_natural": self.looks_natural,
            **({} if self.targets == "class" else {"targets": self.targets}),
            "classes": [each.to_json(self.unit, calibration) for each in self.classes],
        }


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The verdict on a suspect, and its evidence.

    Args:
        verdict: `shortcut-found`, `nothing-found` or `cannot-judge`.
        reason: one sentence.
        findings: one for each detector that ran; those with a p-value first, and the most abnormal of them.
        not_searched: the detectors that did not run, and why.
        calibration: the clean models that the p-values come from; None if there are none.
        record: the other entries of `audit.json`.
        held_out: the examples that the shortcuts were judged on; None if nothing was judged.
    """

    verdict: Verdict
    reason: str
    findings: tuple[JudgedFinding, ...] = ()
    not_searched: dict[str, str] = field(default_factory=dict)
    calibration: Null | None = None
    record: dict[str, Any] = field(default_factory=dict)
    held_out: HeldOut | HeldOutPrompts | None = field(default=None, repr=False)

    @property
    def searched(self) -> tuple[str, ...]:
        """The names of the detectors that ran."""
        return tuple(finding.detector for finding in self.findings)

    @property
    def calibrated_on(self) -> str:
        """Where the p-values come from, or why there are none."""
        if self.calibration is not None:
            return self.calibration.description
        if not self.findings:
            return "nothing was searched"
        return "no clean models of this kind went through these detectors with these settings"

    def calibration_of(self, detector: str) -> str:
        """Where the p-values of a detector come from, or why it has none."""
        if self.calibration is None or detector in self.calibration.detectors:
            return self.calibrated_on
        return "no clean models went through this detector with these settings"

    def to_json(self) -> dict[str, Any]:
        """The content of `audit.json`, but for names of files; docs/architecture.md explains each key."""
        calibration = None
        if self.calibration is not None:
            calibration = {"n": len(self.calibration.models), "description": self.calibration.description}
        measured = "no rates of false alarms and of detections were measured for this configuration"
        return {
            "format": FORMAT,
            "verdict": self.verdict,
            "reason": self.reason,
            "findings": [finding.to_json(self.calibration_of(finding.detector)) for finding in self.findings],
            "searched": [
                {
                    "detector": finding.detector,
                    "parameters": finding.settings,
                    "seconds": finding.seconds,
                    "cannot_see": finding.blind,
                }
                for finding in self.findings
            ],
            "not_searched": [{"detector": name, "reason": why} for name, why in self.not_searched.items()],
            "calibration": calibration,
            "operating_point": None,
            "operating_point_note": measured if self.findings else "nothing was searched",
            **self.record,
        }
