"""The report on a store as JSON: its schema. `unbackdoor.Report` explains each key."""

from typing import Annotated, Literal

from pydantic import Field

from unbackdoor._artifacts.entries import Count, JsonObject, Share

Sample = Annotated[int, Field(ge=1)]


class SpreadEntry(JsonObject):
    """Several measurements of one setting; `interval` is that of a single share or loss."""

    mean: float
    sd: float | None
    n: Sample
    least: float
    most: float
    interval: tuple[float, float] | None


class SettingEntry(JsonObject):
    """One setting: everything that determines a result except the seeds; a number that was not measured is null."""

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
    clean_accuracy: SpreadEntry | None
    attack_success: SpreadEntry | None
    recovered_accuracy: SpreadEntry | None
    accuracy_lost: SpreadEntry | None
    flip_rate: SpreadEntry | None
    control_accuracy: SpreadEntry | None
    second_accuracy: SpreadEntry | None
    second_success: SpreadEntry | None
    seconds: SpreadEntry | None
    memory: SpreadEntry | None
    clean_loss: SpreadEntry | None
    loss_added: SpreadEntry | None
    false_activation: SpreadEntry | None
    empty: SpreadEntry | None
    control_loss: SpreadEntry | None
    second_loss: SpreadEntry | None
    distrusted: SpreadEntry | None
    distrust_precision: SpreadEntry | None
    distrust_recall: SpreadEntry | None
    clean_n: Sample | None
    triggered_n: Sample | None
    counted: Count
    not_implanted: Count
    unknown: Count
    failed: Count
    unusable: Count
    seeds: list[Count]
    victim_seeds: list[Count]


class TableEntry(JsonObject):
    """Methods by attacks, of one task and one clean budget; `cells` holds the numbers of rows, from 0."""

    task: str
    budget: str
    apart: bool
    columns: list[str]
    methods: list[str]
    cells: list[list[Count | None]]
    over: list[SpreadEntry | None]


class CellLineEntry(JsonObject):
    """One cell: its key, the row that it is part of, from 0, and the grid that repeats it."""

    key: str
    row: Count
    victim_seed: Count | None
    seed: Count
    status: Literal["done", "left out", "failed"]
    grid: str


class LeftOutEntry(JsonObject):
    """A victim in which the attack did not implant, and the number of its cells that are left out of averages."""

    task: str
    attack: str
    rate: float | None
    seed: Count | None
    success: Share | None
    cells: Sample


class FailureEntry(JsonObject):
    """A cell without a result, and why."""

    key: str
    row: Count
    victim_seed: Count | None
    seed: Count
    message: str


class RetunedEntry(JsonObject):
    """Attack success after tuning with `k` triggered examples, over `n` draws."""

    k: Count
    mean: Share
    sd: float | None
    n: Sample


class StressTestEntry(JsonObject):
    """The stress test of one model."""

    source: str
    model: Literal["victim", "purified", "exact_oracle", "control"]
    clean_accuracy: Share | None
    clean_loss: float | None
    attack_success: Share | None
    retuned: list[RetunedEntry]
    reactivated: Share | None


class GuardSettingEntry(JsonObject):
    """A guard in front of the victims of an attack, at the share of false alarms that was asked for."""

    task: str
    attack: str
    rate: float | None
    budget: str
    guard: str
    control: bool
    asked: Share | None
    missed: SpreadEntry | None
    false_alarms: SpreadEntry | None
    area: SpreadEntry | None
    attack_success: SpreadEntry | None
    attack_success_without: SpreadEntry | None
    accuracy: SpreadEntry | None
    accuracy_without: SpreadEntry | None
    answers_kept: SpreadEntry | None
    forwards: SpreadEntry | None
    reference_forwards: SpreadEntry | None
    clean_n: Sample | None
    triggered_n: Sample | None
    counted: Count
    not_implanted: Count
    failed: Count
    messages: list[str]
    seeds: list[Count]
    victim_seeds: list[Count]


class StoreReport(JsonObject):
    """A report on a store."""

    format: Literal[1]
    store: str
    rows: list[SettingEntry]
    blocks: list[TableEntry]
    cells: list[CellLineEntry]
    left_out: list[LeftOutEntry]
    failures: list[FailureEntry]
    stress: list[StressTestEntry]
    guards: list[GuardSettingEntry]
    victim_seconds: dict[str, SpreadEntry]
    machines: dict[str, Sample]
    commits: dict[str, Sample]
    versions: dict[str, Sample]
    dates: list[str]
    notes: list[str]
