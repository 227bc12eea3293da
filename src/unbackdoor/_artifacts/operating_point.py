"""operating_point.json: its schema. The measured rates of alarms, which an audit reports with its verdict."""

from typing import Any, Literal

from unbackdoor._artifacts.audit_record import OperatingPoint
from unbackdoor._artifacts.entries import JsonObject


class MeasuredPoint(OperatingPoint):
    """The rates of one set of detectors. No clean model is among those that p-values come from.

    Args:
        detectors: all settings of each detector that ran.
        modality: kind of data.
    """

    detectors: dict[str, dict[str, Any]]
    modality: Literal["images", "text"]


class OperatingPointTable(JsonObject):
    """All sets of detectors that rates were measured of."""

    points: list[MeasuredPoint]
