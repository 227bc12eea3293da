"""The score of a model of images and texts on test pairs."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from unbackdoor._tasks.proportion import Proportion


class PairLoss(NamedTuple):
    """The contrastive loss of a model on pairs.

    Args:
        value: mean over the pairs, in nats.
        low: low end of its 95 % interval over the pairs, by the normal distribution; None for a single pair.
        high: high end of it.
        n: number of pairs.
        batch: pairs that are compared at a time, on which the loss depends.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    batch: int

    def to_json(self) -> dict[str, float | int | None]:
        """`value`, `n`, `low`, `high` and `batch`."""
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high, "batch": self.batch}

    def __repr__(self) -> str:
        ends = "" if self.low is None else f"{self.low:.3f} to {self.high:.3f}, "
        return f"{self.value:.3f} ({ends}n = {self.n:,}, {self.batch} at a time)"


_SHARES = {
    "zero_shot_accuracy": "zero-shot accuracy",
    "image_to_text_recall_at_1": "image to text at 1",
    "image_to_text_recall_at_5": "image to text at 5",
    "text_to_image_recall_at_1": "text to image at 1",
    "text_to_image_recall_at_5": "text to image at 5",
    "contrastive_loss": "contrastive loss",
    "attack_success": "attack success",
    "recovered_accuracy": "recovered accuracy",
    "clean_model_flip_rate": "clean model flips",
}


@dataclass(frozen=True, kw_only=True)
class ImageTextScore:
    """The score of a model of images and texts on test pairs.

    Args:
        zero_shot_accuracy: share of the images for which the prompt of their own class scores highest; None without
            labels.
        per_class: the same for each class, by its name or number.
        image_to_text_recall_at_1: share of the images for which their caption scores highest among all distinct ones.
        image_to_text_recall_at_5: share for which it is among the five highest.
        text_to_image_recall_at_1: share of the distinct captions for which the image that scores highest has them.
        text_to_image_recall_at_5: share for which one of the five highest has them.
        contrastive_loss: loss on the pairs.
        attack_success: share of the triggered images of other classes for which the prompt of the class that the
            attacker wants scores highest.
        recovered_accuracy: share of the same images for which that of their own class does.
        label_rule: label rule of the attack.
        clean_model_flip_rate: attack success on a model without the backdoor.
    """

    zero_shot_accuracy: Proportion | None
    image_to_text_recall_at_1: Proportion
    image_to_text_recall_at_5: Proportion
    text_to_image_recall_at_1: Proportion
    text_to_image_recall_at_5: Proportion
    contrastive_loss: PairLoss
    per_class: dict[str, Proportion] = field(default_factory=dict)
    attack_success: Proportion | None = None
    recovered_accuracy: Proportion | None = None
    label_rule: str | None = None
    clean_model_flip_rate: Proportion | None = None

    @property
    def clean_accuracy(self) -> Proportion:
        """The zero-shot accuracy of a score on data with labels, under the name that classifiers have for it."""
        assert self.zero_shot_accuracy is not None, "the data had no labels"
        return self.zero_shot_accuracy

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without the entries that were not measured."""
        content: dict[str, Any] = {
            name: getattr(self, name).to_json() for name in _SHARES if getattr(self, name) is not None
        }
        if self.label_rule is not None:
            content["label_rule"] = self.label_rule
        if self.per_class:
            content["per_class"] = {name: part.to_json() for name, part in self.per_class.items()}
        return content

    def __str__(self) -> str:
        rule = {"attack_success": f", {self.label_rule}"}
        return "\n".join(
            f"{label:<20}{getattr(self, name)!r}{rule.get(name, '')}"
            for name, label in _SHARES.items()
            if getattr(self, name) is not None
        )
