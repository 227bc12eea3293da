"""The task of a model, as far as the runners must know it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset, Encoder
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.head import Head
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._tasks.proportion import Proportion

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Examined:
    """Clean examples that fit a model, and the answers of the model before a method runs.

    Args:
        clean: the examples, with labels as the model numbers them.
        head_name: the name of the model's last linear layer; empty without one.
        outcomes: what the model makes of each example, (n,); see `Task.outcomes`.
        per_class: the number of examples of each class; empty for a task without classes.
    """

    clean: Dataset
    head_name: str
    outcomes: Tensor
    per_class: tuple[int, ...] = ()


class Asked(NamedTuple):
    """A user's description of the attack that a model is scored on.

    Args:
        attack: a value, a `Trigger`, or a path to `attack.json`.
        triggered: examples that already carry a trigger.
        target: the class that the attacker wants, with `triggered`.
        trigger: of a language model: text that is put in front of each prompt.
        behaviour: of a language model: the answer that the attacker wants, with `trigger` or `triggered`.
    """

    attack: "Attack | Trigger | str | Path | None" = None
    triggered: Dataset | None = None
    target: int | None = None
    trigger: str | None = None
    behaviour: Behaviour | str | None = None


class Judgement(NamedTuple):
    """The outcome of a purified model's comparison with the suspect.

    Args:
        unusable: sentences on a model that lost significantly more than a purification may cost; else None.
        doubt: a sentence if more was lost, but on too few examples to decide; else None.
    """

    unusable: str | None
    doubt: str | None


class Measure(NamedTuple):
    """How a task speaks about quality, and about differences of it.

    Args:
        quantity: what a method may cost.
        change: the difference for the worse.
        lost: unit of that difference, in full.
        unit: the same, short.
        scale: units in a difference of 1.
        digits: digits after the point.
    """

    quantity: str
    change: str
    lost: str
    unit: str
    scale: float
    digits: int

    def of(self, difference: float) -> str:
        """A difference as a number in that unit."""
        return f"{self.scale * difference:.{self.digits}f}"


class Task(Protocol):
    """The loss, the answers, the scores and the checks of one kind of model. There is no base class.

    The data render the inputs: `Dataset.encode`. A task is not part of a cell's identity.
    """

    modalities: ClassVar[tuple[str, ...]]
    """The kinds of data that models of this task take."""

    own_head: ClassVar[bool]
    """Whether the last layer belongs to the task alone, so that a pre-trained base has none like it."""

    measure: ClassVar[Measure]
    """How sentences state differences of `quality`."""

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The scalar that plain tuning minimises, from the output of the model for a batch."""

    def predicted(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the scores that count, (n, answers), and the right answer of each, (n,).

        Of a classifier, one row for each example; of a language model, one for each token of an answer.
        """

    def head(self, model: nn.Module, data: Dataset) -> Head:
        """Returns the layer that makes the scores, and its name."""

    def outcomes(self, model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
        """Returns what a model makes of each example, (n,), on the CPU.

        Of a classifier, whether the answer is as labelled, bool; of a language model, the loss of the answer, summed
        over its tokens, float64.
        """

    def quality(self, data: Dataset, outcomes: Tensor) -> Tensor:
        """Returns how good each outcome is, (n,), on the CPU; more is better.

        Of a classifier, whether the answer is right, bool; of a language model, minus the loss per token of the answer.
        """

    def weights(self, data: Dataset) -> Tensor:
        """Returns how much each example counts in a mean of qualities, (n,), float64, on the CPU; their mean is 1.

        Of a classifier, so much that each class of the data counts alike; else 1.
        """

    def examined(
        self,
        model: nn.Module,
        clean: Dataset,
        arithmetic: Arithmetic,
        warn: Warn,
        head: str | None = None,
        *,
        headless: bool = False,
    ) -> Examined:
        """Check, before a method runs, that model and clean examples fit each other."""

    def checked(self, model: nn.Module, test: Dataset, triggered: Dataset | None = None) -> "Checked":
        """Check, before anything is scored, that model and test examples fit each other."""

    def check_asked(self, asked: Asked) -> None:
        """Refuse options that contradict each other or belong to another task."""

    def attacked(self, checked: "Checked", asked: Asked) -> Any:
        """The triggered examples that the user asks for, with what the attacker wants; None without an attack."""

    def check_control(self, control: nn.Module, test: Dataset, encode: Encoder | None, classes: int) -> None:
        """Refuse a control that cannot take the data, or that does not answer as the model does."""

    def check_room(self, model: nn.Module, attacked: Any, encode: Encoder | None = None) -> None:
        """Refuse triggered examples that a model cannot answer, before anything is trained.

        Args:
            model: the model, or one that reads as much.
            attacked: as `attacked` returns it; None for nothing.
            encode: its encoder, if it is not that of the examples.
        """

    def score(
        self,
        model: nn.Module,
        test: Dataset,
        attacked: Any,
        arithmetic: Arithmetic,
        *,
        control: nn.Module | None = None,
        control_encode: Encoder | None = None,
    ) -> Any:
        """The score on clean and triggered examples that are known to fit the model."""

    def flip_rate(self, model: nn.Module, attacked: Any, arithmetic: Arithmetic) -> Proportion:
        """Returns the share of triggered examples at which a model does what the attacker wants."""

    def doubt(self, owner: str, score: Any, classes: int, where: str) -> str | None:
        """Returns a sentence that doubts a score, such as one near chance; None for other scores."""

    def clean_facts(self, examined: Examined) -> dict[str, Any]:
        """Facts on the clean examples, for the record."""

    def figures(self, clean: Dataset, before: Tensor, after: Tensor) -> dict[str, Any]:
        """The entries of the record on the outcomes of suspect and result on the clean examples."""

    def lost_a_class(self, data: Dataset, before: Tensor, after: Tensor) -> bool:
        """Whether a result lost most of what the suspect knew of a class.

        Args:
            data: clean examples.
            before: outcomes of the suspect on them, (n,).
            after: outcomes of the result, (n,).
        """

    def judged(self, data: Dataset, before: Tensor, after: Tensor, which: str, method: object) -> Judgement:
        """Whether a result is still usable.

        Args:
            data: clean examples.
            before: outcomes of the suspect on them, (n,).
            after: outcomes of the result, (n,).
            which: a clause that describes these examples, such as "which were held out".
            method: the method that made the result; None if it is not known.
        """


@dataclass(frozen=True)
class Checked:
    """Test examples that fit a model.

    Args:
        test: clean examples, with labels as the model numbers them.
        triggered: examples that carry a trigger, with the same labels; None if there are none.
        classes: the number of the model's classes; of a language model, that of its tokens.
    """

    test: Dataset
    triggered: Dataset | None
    classes: int
