"""The files of a cell store: their schemas."""

from typing import Any, Literal

from pydantic import Field

from unbackdoor._artifacts.entries import (
    Count,
    ExactShareEntry,
    GenerationScoreEntry,
    ImageTextScoreEntry,
    JsonObject,
    ProportionEntry,
    ScoreEntry,
    Share,
)
from unbackdoor._artifacts.stress_record import StressRecord


class AttackSpec(JsonObject):
    """An attack, as it enters a cell's key: the fields that differ from their defaults.

    Args:
        behaviour: what it makes a language model answer, if that is not the usual sentence.
    """

    name: str
    version: int | None = None
    parameters: dict[str, Any] | None = None
    behaviour: str | None = None


class VictimSpec(JsonObject):
    """A victim, as it enters a cell's key.

    Args:
        task: the name of the task, hashes of its data, and the settings that differ from the recipe's defaults.
        attack: `none` for the clean control.
        rate: null for an existing model, and for data that others poisoned.
        seed: null for an existing model.
        model: hash of an existing model.
        factory: hash of its factory.
        trigger: hash of its attack.json, or of its triggered examples, as of data that others poisoned.
    """

    task: dict[str, Any]
    attack: AttackSpec
    rate: float | None
    seed: Count | None
    model: str | None = None
    factory: str | None = None
    trigger: str | None = None


class MethodSpec(JsonObject):
    """A method, a trainer or a guard, as it enters a cell's key: the fields that differ from their defaults.

    Args:
        kind: absent for a method.
        false_alarms: of a guard, the shares that it is measured at; absent if none moves its threshold.
    """

    name: str
    version: int | list[int] | None = None
    parameters: dict[str, Any] | list[dict[str, Any]] | None = None
    kind: Literal["trainer", "guard"] | None = None
    false_alarms: list[Share] | None = None


class CellSpec(JsonObject):
    """A description of what is measured; its SHA-256 is the key of the cell."""

    victim: VictimSpec
    method: MethodSpec
    clean: dict[str, Any] | None
    seed: Count
    proxy: str | None = None
    unlabelled: str | None = None
    reference: str | None = None


class DescribedMethod(JsonObject):
    """A method, a trainer or a guard: its value as Python shows it, and all of its fields."""

    repr: str
    parameters: dict[str, Any] | list[dict[str, Any]]


class AuditedClass(JsonObject):
    """The shortcut to one class, or to the named answer or layer of a language model; see `unbackdoor._detection`."""

    target: Count
    name: str | None = None
    sources: list[Count]
    strength: float
    size: float | None
    nominal_p: Share
    moved: ExactShareEntry | None
    random: ExactShareEntry | None


class AuditFinding(JsonObject):
    """The result of one detector."""

    detector: str
    unit: str
    looks_natural: bool | None
    seconds: float
    classes: list[AuditedClass]


class AuditEntry(JsonObject):
    """An audit, without p-values: these follow from it and from clean models.

    Args:
        findings: one for each detector that ran, the most abnormal first.
        doubt: why none ran; empty otherwise.
        accuracy_on_clean: of the suspect; null for a language model.
        judged_on: the number of held-out examples.
        seconds: of all of it.
    """

    findings: list[AuditFinding]
    doubt: str
    accuracy_on_clean: ProportionEntry | None
    judged_on: Count
    seconds: float


class DistrustEntry(JsonObject):
    """The rows that a trainer distrusts.

    Args:
        share: their share of the training data.
        measure: what their scores are.
        precision: share of them that are poisoned; null if there are none.
        recall: share of the poisoned rows that are distrusted; null of a clean control.
    """

    share: ProportionEntry
    measure: str
    precision: ProportionEntry | None
    recall: ProportionEntry | None


class AreaEntry(ProportionEntry):
    """The area under the curve of a guard's scores, with the numbers of clean and of triggered inputs."""

    clean: Count
    triggered: Count


class CostEntry(JsonObject):
    """Forward passes of an input, on average over n: of the model, and of the reference."""

    value: float
    reference: float
    n: Count


class GuardScoreEntry(JsonObject):
    """The score of a guard in front of a classifier; without triggered examples those of the attack are null."""

    false_alarms: ProportionEntry
    missed_attacks: ProportionEntry | None
    auc: AreaEntry | None
    accuracy_of_what_passes: ProportionEntry | None
    accuracy_without_guard: ProportionEntry
    attack_success: ProportionEntry | None
    attack_success_without_guard: ProportionEntry | None
    forwards_per_input: CostEntry
    label_rule: str | None


class PromptGuardScoreEntry(JsonObject):
    """The score of a guard in front of a language model."""

    false_alarms: ProportionEntry | None
    missed_attacks: ProportionEntry | None
    auc: AreaEntry | None
    behaviour_of_what_passes: ProportionEntry | None
    attack_success: ProportionEntry | None
    attack_success_without_guard: ProportionEntry | None
    answers_kept: ProportionEntry
    forwards_per_input: CostEntry
    behaviour: str | None
    template: str
    max_new_tokens: Count


class GuardedEntry(JsonObject):
    """A guard at one share of false alarms.

    Args:
        false_alarms: the share that was asked for; null if none moves the threshold.
        threshold: null for a guard that changes every input.
        score: on examples that the guard was not fitted on.
    """

    false_alarms: Share | None
    threshold: float | None
    score: GuardScoreEntry | PromptGuardScoreEntry


class GuardEntry(JsonObject):
    """A guard in front of a victim.

    Args:
        measure: what a score of an input is.
        fitted_on: the number of clean examples that fitted it.
        threshold_on: the number of others that set the threshold.
        fitting_seconds: of both.
        at: one for each share of false alarms, the smallest first.
    """

    measure: str
    fitted_on: Count
    threshold_on: Count
    fitting_seconds: float
    at: list[GuardedEntry]


class Provenance(JsonObject):
    """Machine, time and software of a measurement, and the labels of attack and method in its grid.

    The device is not known if the worker died.
    """

    commit: str | None
    versions: dict[str, str]
    device: str | None
    date: str | None
    grid: str | None
    labels: dict[str, str] = Field(default_factory=dict)


class Measured(JsonObject):
    """The result of a successful measurement."""

    status: Literal["done"]
    score: ScoreEntry | GenerationScoreEntry | ImageTextScoreEntry
    implanted: bool | None
    flips: dict[str, ProportionEntry] | None = None
    second_test: ScoreEntry | GenerationScoreEntry | ImageTextScoreEntry | None = None
    method: DescribedMethod | None
    seconds: float
    scoring_seconds: float | None
    training_seconds: float | None
    peak_memory_bytes: Count | None
    examples_seen: Count | None
    held_out: Count
    notes: list[str]
    warnings: list[str]
    usable: bool | None = None
    stress: StressRecord | None = None
    audit: AuditEntry | None = None
    distrusted: DistrustEntry | None = None
    guard: GuardEntry | None = None
    provenance: Provenance


class Failed(JsonObject):
    """The result of a failed measurement."""

    status: Literal["failed"]
    message: str
    traceback: str | None
    provenance: Provenance


class Cell(JsonObject):
    """A file of `cells/` or `failed/`."""

    version: Literal[1]
    spec: CellSpec
    result: Measured | Failed


class Rows(JsonObject):
    """A file of `rows/`: the numbers of the drawn examples in the data."""

    version: Literal[1]
    spec: dict[str, Any]
    rows: list[Count]


class VictimFiles(JsonObject):
    """`files.json` of a victim: its description, whose SHA-256 is its key, and the SHA-256 of each file by name."""

    version: Literal[1]
    spec: dict[str, Any]
    files: dict[str, str]


class Mark(JsonObject):
    """`store.json`, which marks a folder as a store."""

    version: Literal[1]
