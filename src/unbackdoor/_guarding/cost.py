"""The cost of an input behind a guard."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The forward passes of one input, on average, the model's own answer included.

    Args:
        forwards: passes through the model.
        reference_forwards: passes through the language model that rates texts.
        n: the number of inputs.
    """

    forwards: float
    reference_forwards: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """All three."""
        return {"value": self.forwards, "reference": self.reference_forwards, "n": self.n}

    def __repr__(self) -> str:
        reference = f", and {self.reference_forwards:.1f} of the reference" if self.reference_forwards else ""
        return f"{self.forwards:.2f}{reference} (n = {self.n:,})"
