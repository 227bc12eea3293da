"""The task of a model, as far as the runners must know it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset, Encoder
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._tasks.score import Score

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Examined:
    """Clean examples that fit a model, and the answers of the model before a method runs.

    Args:
        clean: the examples, with labels as the model numbers them.
        head_name: the name of the model's last linear layer.
        right: whether the model answers each example as labelled, (n,), bool.
        per_class: the number of examples of each class.
    """

    clean: Dataset
    head_name: str
    right: Tensor
    per_class: list[int]


class Task(Protocol):
    """The loss, the answers, the scores and the checks of one kind of model. There is no base class.

    The data render the inputs: `Dataset.encode`. A task is not part of a cell's identity.
    """

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The scalar that plain tuning minimises, from the output of the model for a batch."""

    def hits(self, model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
        """Returns which examples the model answers as labelled, (n,), bool, on the CPU."""

    def examined(
        self, model: nn.Module, clean: Dataset, arithmetic: Arithmetic, warn: Warn, head: str | None = None
    ) -> Examined:
        """Check, before a method runs, that model and clean examples fit each other."""

    def checked(self, model: nn.Module, test: Dataset, triggered: Dataset | None = None) -> "Checked":
        """Check, before anything is scored, that model and test examples fit each other."""

    def score(
        self,
        model: nn.Module,
        test: Dataset,
        attacked: Triggered | None,
        arithmetic: Arithmetic,
        *,
        control: nn.Module | None = None,
        control_encode: Encoder | None = None,
    ) -> Score:
        """The score on clean and triggered examples that are known to fit the model."""

    def doubt(self, owner: str, score: Score, classes: int, where: str) -> str | None:
        """Returns a sentence that doubts a score near chance; None for other scores."""


@dataclass(frozen=True)
class Checked:
    """Test examples that fit a model.

    Args:
        test: clean examples, with labels as the model numbers them.
        triggered: examples that carry a trigger, with the same labels; None if there are none.
        classes: the number of the model's classes.
    """

    test: Dataset
    triggered: Dataset | None
    classes: int
