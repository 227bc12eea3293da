"""`TrainingRun`: the tools of a trainer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import NoHeadError
from unbackdoor._purification.run import Run
from unbackdoor._robust_training.suspects import Suspects
from unbackdoor._tasks.classification import answers
from unbackdoor._victims.training import Trainer


@dataclass(kw_only=True)
class TrainingRun(Run):
    """The tools of a trainer, besides the data and an untrained model: those of a method, and these.

    Args:
        training: the code that also trains victims, with the recipe.
        clean: examples without poison, for trainers that need some.
        suspects: the rows that the trainer distrusts; see `distrust`.
    """

    training: Trainer
    clean: Dataset | None = None
    suspects: Suspects | None = None

    def setting(self, method: object, field: str) -> Any:
        """Returns a hyper-parameter; if the user left it at None, its default for the kind of data.

        Args:
            method: a trainer, which may declare such defaults as a class variable, `defaults`.
            field: name of its field. `epochs`, `learning_rate` and `batch_size` default to those of the recipe.
        """
        chosen = getattr(method, field)
        if chosen is not None:
            return chosen
        declared = getattr(method, "defaults", {}).get(self.modality, {})
        return declared[field] if field in declared else getattr(self.training.schedule, field)

    def head(self, model: nn.Module) -> nn.Linear:
        """Returns the last linear layer of a model with the structure of the fresh one.

        Raises:
            UnbackdoorError: no linear layer makes its logits.
        """
        if not self.head_name:
            raise NoHeadError(
                f"{type(model).__name__} has no final linear layer that makes its logits, which this trainer needs. "
                "Take abl, or another base."
            )
        return super().head(model)

    def train(self, model: nn.Module, data: Dataset, **changes: Any) -> nn.Module:
        """Train a model in place by the recipe of the victims, and return it in eval mode.

        Args:
            model: the model.
            data: the examples.
            changes: arguments of `unbackdoor._victims.training.train_victim` in place of the recipe's: `epochs`,
                `learning_rate`, `loss`, ...

        Raises:
            UnbackdoorError: the training diverged.
        """
        return self.training.train(model, data, **changes)

    def losses(self, model: nn.Module, data: Dataset) -> Tensor:
        """Returns the cross-entropy of each example in eval mode, without augmentation, (n,), on the CPU."""
        return F.cross_entropy(answers(model, data, self.arithmetic), data.labels.cpu(), reduction="none")

    def distrust(self, rows: Tensor, scores: Tensor, measure: str) -> None:
        """Report rows as probably poisoned.

        Args:
            rows: their positions in the data, (k,).
            scores: the suspicion of each, (k,); a larger one is more suspicious.
            measure: what a score is, in words.
        """
        rows, order = torch.sort(rows.cpu())
        self.suspects = Suspects(rows, scores.detach().cpu()[order], measure)
