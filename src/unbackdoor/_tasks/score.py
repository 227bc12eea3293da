"""The score of a classifier on test data."""

from dataclasses import dataclass
from typing import Any

from unbackdoor._tasks.proportion import Proportion


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model on test data.

    Args:
        clean_accuracy: share of clean test examples classified as their class.
        per_class: the clean accuracy of each class of the test data, by class name or number.
        attack_success: share of triggered examples, of the classes that the attack is meant to move, that the model
            classifies as the attacker wants.
        recovered_accuracy: share of the same examples classified as their true class.
        label_rule: label rule of the attack; all-to-all success cannot be compared with that of others.
        clean_model_flip_rate: share of the same examples that a model without the backdoor classifies as the attacker
            wants.
    """

    clean_accuracy: Proportion
    per_class: dict[str, Proportion]
    attack_success: Proportion | None = None
    recovered_accuracy: Proportion | None = None
    label_rule: str | None = None
    clean_model_flip_rate: Proportion | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without the entries that were not measured."""
        content: dict[str, Any] = {"clean_accuracy": self.clean_accuracy.to_json()}
        for name in ("attack_success", "recovered_accuracy", "clean_model_flip_rate"):
            measured = getattr(self, name)
            if measured is not None:
                content[name] = measured.to_json()
        if self.label_rule is not None:
            content["label_rule"] = self.label_rule
        content["per_class"] = {name: part.to_json() for name, part in self.per_class.items()}
        return content

    def __str__(self) -> str:
        lines = [f"clean accuracy      {self.clean_accuracy!r}"]
        if self.attack_success is not None:
            lines.append(f"attack success      {self.attack_success!r}, {self.label_rule}")
            lines.append(f"recovered accuracy  {self.recovered_accuracy!r}")
        if self.clean_model_flip_rate is not None:
            lines.append(f"clean model flips   {self.clean_model_flip_rate!r}")
        return "\n".join(lines)
