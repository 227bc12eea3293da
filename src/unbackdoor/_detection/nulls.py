"""Statistics of a zoo of models: how strong the shortcuts of clean ones are, and how often an audit raises an alarm."""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from unbackdoor._artifacts.null_table import CleanModel, NullTable
from unbackdoor._artifacts.operating_point import OperatingPointTable


@dataclass(frozen=True)
class Null:
    """Clean models that went through the same detectors.

    Args:
        models: their entries.
        detectors: those that ran and that all of these models went through, with the same settings.
        description: which models these are, for the user.
    """

    models: tuple[CleanModel, ...]
    detectors: tuple[str, ...]
    description: str

    def p_value(self, score: float) -> float:
        """How likely a clean model has a score at least as large in any of the detectors.

        Among n clean models, (1 + number with a largest score of at least this) / (n + 1). The largest over all
        detectors counts, so that more detectors do not raise the rate of false alarms.

        Args:
            score: -log10 of a nominal p-value.
        """
        as_strong = sum(strongest >= score for strongest in self._strongest())
        return (1 + as_strong) / (len(self.models) + 1)

    def score_of(self, p_value: float) -> float:
        """The score that one must exceed for a p-value of at most this.

        Args:
            p_value: of which at least 1 / (n + 1) can be reached with n models.
        """
        allowed = math.floor(p_value * (len(self.models) + 1)) - 1  # models at least as strong
        return sorted(self._strongest(), reverse=True)[allowed]

    def _strongest(self) -> list[float]:
        """The largest score of each clean model over the detectors."""
        return [max(model.scores[name] for name in self.detectors) for model in self.models]


@cache
def shipped() -> NullTable:
    """The statistics that are part of the package."""
    text = (files("unbackdoor._detection") / "nulls.json").read_text(encoding="utf-8")
    return NullTable.model_validate(json.loads(text))


def null_for(
    modality: str, arch: str, classes: int, detectors: dict[str, dict[str, Any]], table: NullTable | None = None
) -> Null | None:
    """The clean models that a suspect can be compared with; None if there are fewer than 19.

    Those of its own architecture if there are at least 39, else all of its kind of data. Detectors that the zoo did not
    go through, or with other settings, have no statistics; the others are compared without them. Images are compared
    with models that also have few classes, or many, as classes are compared with each other; words are not.

    Args:
        modality: of the suspect's data.
        arch: its `model_type`, or the name of its class.
        classes: how many it has.
        detectors: the name and all settings of each that runs.
        table: another than the package's.
    """
    table = shipped() if table is None else table
    known = tuple(name for name, settings in detectors.items() if table.detectors.get(name) == settings)
    few = classes < 5
    kin = [
        model
        for model in table.models
        if model.modality == modality
        and (modality == "text" or (model.classes < 5) == few)
        and (modality == "text" or classes < 2 * model.classes)
        and all(name in model.scores for name in known)
    ]
    same = [model for model in kin if model.arch == arch]
    chosen = same if len(same) >= 39 else kin
    if not known or len(chosen) < 19:  # with fewer models, no p-value could reach 5 %
        return None
    archs = {model.arch for model in chosen}
    which = f"{archs.pop()} networks" if len(archs) == 1 else "networks of several architectures"
    data = ", ".join(sorted({model.data for model in chosen}))
    return Null(tuple(chosen), known, f"{len(chosen)} clean {which}, trained on {data}")


@cache
def measured() -> OperatingPointTable:
    """The measured rates that are part of the package."""
    text = (files("unbackdoor._detection") / "operating_point.json").read_text(encoding="utf-8")
    return OperatingPointTable.model_validate(json.loads(text))


def operating_point(
    modality: str, detectors: dict[str, dict[str, Any]], table: OperatingPointTable | None = None
) -> dict[str, Any] | None:
    """The rates of alarms on clean models and on models with a backdoor; None if they were not measured.

    Args:
        modality: of the suspect's data.
        detectors: the name and all settings of each that can raise an alarm. The rates hold for these together.
        table: another than the package's.
    """
    table = measured() if table is None else table
    for point in table.points:
        if point.modality == modality and point.detectors == detectors:
            return point.model_dump(mode="json", include={"false_alarms", "detections", "models"})
    return None
