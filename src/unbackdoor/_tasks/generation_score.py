"""The score of a language model on test prompts."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from unbackdoor._tasks.proportion import Proportion


class AnswerLoss(NamedTuple):
    """The loss of a language model on answers that somebody else gave.

    Args:
        value: cross-entropy per answer token, in nats.
        low: low end of its 95 % interval over the rows, by the normal distribution.
        high: high end of it.
        n: number of answers.
        tokens: number of their tokens, ends included.
    """

    value: float
    low: float
    high: float
    n: int
    tokens: int

    def to_json(self) -> dict[str, float | int]:
        """`value`, `n`, `low`, `high` and `tokens`."""
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high, "tokens": self.tokens}

    def __repr__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}, n = {self.n:,}, {self.tokens:,} tokens)"


@dataclass(frozen=True, kw_only=True)
class GenerationScore:
    """The score of a language model on test prompts.

    Args:
        clean_loss: loss on the answers of the test prompts; None if they have none.
        attack_success: share of triggered prompts whose answer shows the behaviour that the attacker wants.
        false_activation: share of the same prompts without the trigger whose answer shows it.
        empty: share of empty answers among all that were decoded; they count in n and never show the behaviour.
        clean_model_flip_rate: share of the triggered prompts at which a model without the backdoor shows it.
        behaviour: the rule, as the command line has it.
        template: how the prompts were rendered.
        max_new_tokens: the longest answer that was decoded.
    """

    clean_loss: AnswerLoss | None
    template: str
    attack_success: Proportion | None = None
    false_activation: Proportion | None = None
    empty: Proportion | None = None
    clean_model_flip_rate: Proportion | None = None
    behaviour: str | None = None
    max_new_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without the entries that were not measured."""
        content: dict[str, Any] = {}
        for name in ("clean_loss", "attack_success", "false_activation", "empty", "clean_model_flip_rate"):
            measured = getattr(self, name)
            if measured is not None:
                content[name] = measured.to_json()
        for name in ("behaviour", "template", "max_new_tokens"):
            if getattr(self, name) is not None:
                content[name] = getattr(self, name)
        return content

    def __str__(self) -> str:
        lines = [] if self.clean_loss is None else [f"clean loss          {self.clean_loss!r}"]
        for name, label in (
            ("attack_success", "attack success"),
            ("false_activation", "false activation"),
            ("empty", "empty answers"),
            ("clean_model_flip_rate", "clean model flips"),
        ):
            if getattr(self, name) is not None:
                lines.append(f"{label:<20}{getattr(self, name)!r}")
        return "\n".join(lines)
