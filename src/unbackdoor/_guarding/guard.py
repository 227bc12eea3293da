"""The protocol of guards, and what some of them can do besides."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset, ItemsLike
from unbackdoor._purification.run import Run

Learnt = Mapping[str, Tensor]
"""Arrays that a guard fitted on clean examples, by name, on the CPU."""

Suspicious = Literal["low", "high", "all"]
"""Which scores raise an alarm. A guard with `all` has no threshold: it changes every input."""


class Scored(NamedTuple):
    """The scores of inputs.

    Args:
        scores: one of each input, (n,); finite.
        answers: the model's answers to the inputs as they are, if the guard has them already: class scores,
            (n, classes), or a list of texts; None lets the runner ask the model if it needs them.
        details: what the guard found in each input, in words, for the reason of an alarm; None for nothing.
    """

    scores: Tensor
    answers: Tensor | list[str] | None = None
    details: list[str] | None = None


class Guard(Protocol):
    """A rule that decides about single inputs: a frozen value that can be called. There is no base class.

    It gets the model itself, which must be the same afterwards. The score of an input must not depend on the others
    in its batch; a random draw starts from `run.seed` and the input, see `_guarding.draws`.
    """

    @property
    def measure(self) -> str:
        """The meaning of a score, in words and with its unit."""

    @property
    def suspicious(self) -> Suspicious:
        """Which scores raise an alarm."""

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Fit on one half of the clean examples; the runner sets the threshold on the other half."""

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """Score inputs, at most a few hundred; labels are not read. Nothing needs a gradient."""


class Edited(NamedTuple):
    """Inputs that a guard changed.

    Args:
        items: the changed inputs.
        reasons: what was changed in each, in words.
    """

    items: ItemsLike
    reasons: list[str]


@runtime_checkable
class Edits(Protocol):
    """A guard that changes a suspicious input, and lets the model answer the changed one."""

    def edited(self, inputs: Dataset, learnt: Learnt, threshold: float | None, run: Run) -> Edited:
        """Change inputs that raised an alarm; the threshold is None for a guard that changes all."""


@runtime_checkable
class Restrains(Protocol):
    """A guard that, if its `purify` is true, lets the model answer suspicious inputs in another way."""

    @property
    def purify(self) -> bool:
        """Whether suspicious inputs are answered in that way; else they are rejected."""

    def restrained(self, model: nn.Module, learnt: Learnt, threshold: float, run: Run) -> AbstractContextManager[None]:
        """While the block runs, the model answers in the other way."""


@runtime_checkable
class Bounded(Protocol):
    """A guard whose threshold may be a setting, instead of one for a share of false alarms."""

    @property
    def bound(self) -> float | None:
        """The threshold; None lets the runner set it."""


def edits(guard: object) -> Edits | None:
    """Returns a guard that changes inputs; None for all others."""
    return guard if isinstance(guard, Edits) else None


def restrains(guard: object) -> Restrains | None:
    """Returns a guard that changes answers; None for all others, and if it is not asked to."""
    return guard if isinstance(guard, Restrains) and guard.purify else None


def bound_of(guard: object) -> float | None:
    """Returns the threshold that a guard sets itself; None for all others."""
    return guard.bound if isinstance(guard, Bounded) else None


def is_movable(guard: Guard) -> bool:
    """Whether a share of false alarms sets the threshold; not of a guard with its own, or that changes every input."""
    return guard.suspicious != "all" and bound_of(guard) is None


def only_rejects(guard: Guard) -> bool:
    """Whether the guard rejects suspicious inputs, and changes neither these nor their answers."""
    return guard.suspicious != "all" and edits(guard) is None and restrains(guard) is None


def owner_of(guard: object) -> str:
    """The name of a guard in messages."""
    return type(guard).__name__
