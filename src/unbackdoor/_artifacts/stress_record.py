"""stress.json: its schema."""

from typing import Annotated, Any, Literal

from pydantic import Field

from unbackdoor._artifacts.attack_record import BehaviourEntry
from unbackdoor._artifacts.entries import (
    AttackEntry,
    BriefGenerationScore,
    BriefScore,
    Count,
    JsonObject,
    ProportionEntry,
    Versions,
)


class NamedScore(BriefScore):
    """The score of a model; `oracle` marks that of exact purification."""

    oracle: Literal[True] | None = None


class NamedGenerationScore(BriefGenerationScore):
    """The same of a language model."""

    oracle: Literal[True] | None = None


class RetuningRun(BriefScore):
    """The score after retuning with `k` triggered examples, drawn by `seed`."""

    k: Count
    seed: Count


class RetuningGenerationRun(BriefGenerationScore):
    """The same of a language model."""

    k: Count
    seed: Count


class RetuningRuns(JsonObject):
    """The runs of one model."""

    oracle: Literal[True] | None = None
    runs: list[RetuningRun] | list[RetuningGenerationRun]


class Teacher(BriefScore):
    """The score of the reactivation's teacher, and the number of triggered examples that it was retuned with."""

    k: Count


class ReachEntry(JsonObject):
    """Shares of pictures that a model classifies as the attacker wants."""

    clean: ProportionEntry
    clean_perturbed: ProportionEntry
    triggered: ProportionEntry
    triggered_perturbed: ProportionEntry


class Reactivation(JsonObject):
    """The reach of the learnt perturbation, by model."""

    teacher: Teacher
    models: dict[str, ReachEntry]


class Point(BriefScore):
    """The score at a place of the path, from the victim at 0 to the end at 1."""

    t: float


class GenerationPoint(BriefGenerationScore):
    """The same of a language model."""

    t: float


class Path(JsonObject):
    """The points of one path."""

    oracle: Literal[True] | None = None
    points: list[Point] | list[GenerationPoint]


class TunedWith(JsonObject):
    """The number of clean examples, and of those among them that the attack moves."""

    n: Count
    attackable: Count


class ScoredOn(JsonObject):
    """The number of test examples and of triggered ones, and a description of them."""

    n: Count
    triggered: Count
    note: str


class StressRecord(JsonObject):
    """stress.json; docs/architecture.md explains each key."""

    model: str
    victim: str
    control: str | None
    format: Literal[1]
    before: dict[str, NamedScore] | dict[str, NamedGenerationScore]
    retuning: dict[str, RetuningRuns] | None
    reactivation: Reactivation | None
    path: dict[str, Path] | None
    path_ends_recomputed: dict[str, NamedScore] | None
    attack: AttackEntry
    label_rule: str | None
    target: int | None
    behaviour: BehaviourEntry | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    parts: list[Literal["retune", "reactivation", "path", "exact"]]
    counts: list[int]
    seeds: list[Count]
    clean: TunedWith
    scored_on: ScoredOn
    settings: dict[str, dict[str, Any]]
    notes: list[str]
    warnings: list[str]
    usable: bool | None = None
    seconds: float
    device: str
    versions: Versions
    files: list[str] = Field(default_factory=list)
