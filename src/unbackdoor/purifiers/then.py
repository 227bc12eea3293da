"""One purifier after another."""

from dataclasses import dataclass

from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._purification.form import all_trained_
from unbackdoor._purification.method import Method, applied, needs_clean
from unbackdoor._purification.run import Run


@dataclass(frozen=True, init=False, repr=False)
class Then:
    """Purify with one method, then with the next: `Then(EPUR(), FST(alpha=0.1))`, on the command line `e-pur+fst`.

    Each step gets the result of the step before, with all weights free to be tuned, and the same clean examples.

    Args:
        steps: two methods or more.

    Raises:
        UnbackdoorError: there are fewer than two steps, or one cannot be called.

    Differences from the paper: none; there is no paper on composition itself.
    """

    steps: tuple[Method, ...]

    def __init__(self, *steps: Method) -> None:
        if len(steps) < 2 or not all(callable(step) and not isinstance(step, type) for step in steps):
            came = ", ".join(map(repr, steps)) or "nothing"
            raise UnbackdoorError(f"Then.steps must be two methods or more, as in Then(EPUR(), FST()), got {came}.")
        object.__setattr__(self, "steps", steps)

    @property
    def needs_clean(self) -> bool:
        """Whether a step uses clean examples."""
        return any(needs_clean(step) for step in self.steps)

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place, step by step."""
        for step in self.steps:
            all_trained_(model)
            model = applied(step, model, clean, run)
        return model

    def __repr__(self) -> str:
        return f"Then({', '.join(map(repr, self.steps))})"
