"""Entries that several of the written formats share, as schemas."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class JsonObject(BaseModel):
    """A JSON object with these keys and no others; a key with a default may be absent."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ProportionEntry(JsonObject):
    """A share with its sample size and its 95 % Wilson interval."""

    value: Share
    n: Annotated[int, Field(ge=1)]
    low: Share
    high: Share


class ExactShareEntry(JsonObject):
    """A share with its sample size, which may be 0, and its exact 95 % interval."""

    value: Share
    n: Count
    low: Share
    high: Share


class ClassEntry(JsonObject):
    """A class: its number and its name."""

    number: Count
    name: str


class BriefScore(JsonObject):
    """The shares of a score."""

    clean_accuracy: ProportionEntry
    attack_success: ProportionEntry | None = None
    recovered_accuracy: ProportionEntry | None = None
    clean_model_flip_rate: ProportionEntry | None = None


class AnswerLossEntry(JsonObject):
    """A loss per answer token, in nats, with its 95 % interval and the numbers of answers and of their tokens."""

    value: float
    n: Annotated[int, Field(ge=1)]
    low: float
    high: float
    tokens: Annotated[int, Field(ge=1)]


class BriefGenerationScore(JsonObject):
    """The loss and the shares of a language model's score."""

    clean_loss: AnswerLossEntry | None = None
    attack_success: ProportionEntry | None = None
    false_activation: ProportionEntry | None = None
    empty: ProportionEntry | None = None
    clean_model_flip_rate: ProportionEntry | None = None


class ScoreEntry(BriefScore):
    """A score: its shares, the label rule of the attack, and the clean accuracy of each class."""

    label_rule: str | None = None
    per_class: dict[str, ProportionEntry]


class GenerationScoreEntry(BriefGenerationScore):
    """The score of a language model; see docs/language-models.md."""

    behaviour: str | None = None
    template: str
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


class PairLossEntry(JsonObject):
    """A contrastive loss, in nats, with its 95 % interval, the number of pairs, and of those compared at a time.

    A single pair has no interval.
    """

    value: float
    n: Annotated[int, Field(ge=1)]
    low: float | None
    high: float | None
    batch: Annotated[int, Field(ge=2)]


class ImageTextScoreEntry(JsonObject):
    """The score of a model of images and texts; see docs/image-text.md."""

    zero_shot_accuracy: ProportionEntry | None = None
    image_to_text_recall_at_1: ProportionEntry
    image_to_text_recall_at_5: ProportionEntry
    text_to_image_recall_at_1: ProportionEntry
    text_to_image_recall_at_5: ProportionEntry
    contrastive_loss: PairLossEntry
    attack_success: ProportionEntry | None = None
    recovered_accuracy: ProportionEntry | None = None
    label_rule: str | None = None
    clean_model_flip_rate: ProportionEntry | None = None
    per_class: dict[str, ProportionEntry] | None = None


class AttackEntry(JsonObject):
    """An attack: its name, and all of its fields."""

    name: str
    parameters: dict[str, Any]


class MethodEntry(JsonObject):
    """A method: its name, all of its fields (of a composition those of each step), and its value as Python shows it."""

    name: str
    parameters: dict[str, Any] | list[dict[str, Any]]
    repr: str


class Versions(JsonObject):
    """The versions that a result depends on."""

    unbackdoor: str
    torch: str
    python: str
