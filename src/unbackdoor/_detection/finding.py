"""The result of a detector: for each class the shortcut that it found there."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._purification.run import Run


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The strongest shortcut to one class that a detector found; in a language model, to one answer.

    Args:
        target: the class; of an answer, its first token; of a layer, its place in the model.
        strength: how suspicious it is; larger is more. The strengths of the classes of a clean model should be close
            to normally distributed: minus the logarithm of a size, for example.
        size: of the trigger in the unit of the detector; None for a detector that has none.
        trigger: puts it on examples; None for a detector that makes none.
        control: a random trigger of the same size; None if there is no trigger.
        sources: the only classes whose examples it should move; empty for all.
        nominal_p: the probability of such a strength in a clean model under the detector's own assumptions, for a
            detector that does not compare classes; None lets the audit compare the classes.
        name: of an answer or a layer; empty for a class.
        answer: the tokens of an answer that follows from its first token, without a trigger; empty if there is none.
        control_answer: of the same, from a random first token.
    """

    target: int
    strength: float
    size: float | None = None
    trigger: Trigger | None = None
    control: Trigger | None = None
    sources: tuple[int, ...] = ()
    nominal_p: float | None = None
    name: str = ""
    answer: tuple[int, ...] = ()
    control_answer: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The shortcuts that a detector found.

    Args:
        candidates: at most one for each pair of sources and target, in the order of the classes.
        unit: of the sizes, in words (`pixels of 1,024`); empty if there are none.
        note: one sentence for the user, if there is something to say.
        targets: what the candidates are for: `class`, `answer` or `layer`.
    """

    candidates: tuple[Candidate, ...]
    unit: str = ""
    note: str = ""
    targets: Literal["class", "answer", "layer"] = "class"


class Detector(Protocol):
    """A search for one family of shortcuts: a frozen value that can be called. There is no base class.

    It sees one half of the clean examples. The audit freezes what it returns and judges it on the other half.
    """

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search the model, which must be the same afterwards."""
