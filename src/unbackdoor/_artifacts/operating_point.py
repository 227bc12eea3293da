"""operating_point.json: its schema. The measured rates of alarms, which an audit reports with its verdict."""

from typing import Any, Literal

from unbackdoor._artifacts.entries import Entry, ProportionEntry


class OperatingPoint(Entry):
    """The rates of one set of detectors, with the settings that they were measured with.

    Args:
        detectors: all settings of each detector that ran.
        modality: kind of data.
        false_alarms: share of clean models with an alarm; none of them is among those that p-values come from.
        detections: share of models with a backdoor with an alarm.
        models: which models these are, in words.
    """

    detectors: dict[str, dict[str, Any]]
    modality: Literal["images", "text"]
    false_alarms: ProportionEntry
    detections: ProportionEntry
    models: str


class OperatingPointTable(Entry):
    """All sets of detectors that rates were measured of."""

    points: list[OperatingPoint]
