"""Anti-backdoor learning."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._robust_training.run import TrainingRun
from unbackdoor._training.descent import Loss, cross_entropy
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value


@value
class ABL:
    """Isolate the rows that a network learns first, train on the rest, then unlearn the isolated ones.

    A trigger is easier than a task, so its rows are learnt first. In the first epochs the loss l of a batch is replaced
    by sign(l - gamma) * l: below gamma it is raised, which holds the task near gamma while rows with a trigger, which
    are few in a batch, fall far below it. The rows with the lowest loss are isolated. The model is then trained on
    the rest by the whole recipe, which plants a backdoor if poison is left, and at last the isolated rows are
    unlearnt: the mean loss of as many other rows minus that of the isolated ones is minimised.

    Li, Lyu, Koren, Lyu, Li and Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021,
    https://arxiv.org/abs/2110.11571

    Cannot see: triggers that are not learnt sooner than the task (clean-label ones, say), or on few rows.

    Args:
        isolation_epochs: passes of the first part, at least 1; None is 10 for images and 1 for texts.
        isolation_rate: peak learning rate of the first part, more than 0; None is 0.02 for images and 5e-5 for texts.
        gamma: the loss below which a batch is held back, at least 0.
        isolated: share of all rows that is isolated, more than 0 and less than 0.5.
        unlearning_epochs: passes over the isolated rows at the end, at least 0.
        unlearning_rate: learning rate at the end, more than 0; None is 2e-3 for images (SGD) and 5e-6 for texts
            (AdamW).
        forgotten: loss of an isolated row from which it counts as unlearnt and is left alone, more than 0.

    Differences from the paper: the sign is that of the mean over a batch, as in the authors' script; taken of each row,
    as the formula can also be read, it holds the rows with a trigger at gamma as well. The script unlearns by the
    isolated rows alone, at a rate of 5e-4 for 5 epochs; here each batch also has rows of the rest, so that BatchNorm
    sees both, and a row is left alone once its loss is above `forgotten`, as it would otherwise grow without end.
    Epochs and rates of the first and the last part (whose batches are of 32) were chosen on small pictures of MNIST and
    Fashion-MNIST with a patch. On texts nothing was published.
    """

    isolation_epochs: Annotated[int | None, Field(ge=1)] = None
    isolation_rate: Annotated[float | None, Field(gt=0)] = None
    gamma: Annotated[float, Field(ge=0)] = 0.5
    isolated: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    unlearning_epochs: Annotated[int, Field(ge=0)] = 20
    unlearning_rate: Annotated[float | None, Field(gt=0)] = None
    forgotten: Annotated[float, Field(gt=0)] = 5.0

    defaults: ClassVar[Defaults] = {
        "images": {"isolation_epochs": 10, "isolation_rate": 0.02, "unlearning_rate": 2e-3},
        "text": {"isolation_epochs": 1, "isolation_rate": 5e-5, "unlearning_rate": 5e-6},
    }

    def __call__(self, data: Dataset, model: nn.Module, run: TrainingRun) -> nn.Module:
        """Train in place."""
        count = round(self.isolated * len(data))
        if count == 0:
            raise UnbackdoorError(
                f"ABL.isolated={self.isolated:g} of {len(data):,} rows is none. Take at least {1 / len(data):.2g}, or "
                "more data."
            )
        run.train(
            model,
            data,
            epochs=run.setting(self, "isolation_epochs"),
            learning_rate=run.setting(self, "isolation_rate"),
            loss=self.held_back,
            description="isolating",
        )
        losses = run.losses(model, data)
        order = losses.argsort(stable=True)
        isolated, rest = order[:count].sort().values, order[count:].sort().values
        run.distrust(isolated, -losses[isolated], "minus the loss after isolation")
        run.train(model, data.select(rest), description="training on the rest")
        if self.unlearning_epochs:
            others = rest[torch.randperm(len(rest), generator=run.generator)[:count]]
            run.train(
                model,
                data.select(torch.cat([isolated, others])),
                epochs=self.unlearning_epochs,
                learning_rate=run.setting(self, "unlearning_rate"),
                batch_size=32,
                loss=unlearning(count, self.forgotten),
                description="unlearning",
            )
        return model

    def held_back(self, scores: Tensor, batch: Batch) -> Tensor:
        """Returns sign(l - gamma) * l, with the mean cross-entropy l of a batch."""
        loss = cross_entropy(scores, batch)
        return (loss.detach() - self.gamma).sign() * loss


def unlearning(isolated: int, forgotten: float) -> Loss:
    """Returns the loss that falls with those of other rows and rises with those of the first `isolated` ones.

    Args:
        isolated: the number of rows to unlearn; they are the first ones.
        forgotten: a row whose loss is above this has been unlearnt.
    """

    def loss(scores: Tensor, batch: Batch) -> Tensor:
        losses = F.cross_entropy(scores, batch.labels, reduction="none")
        return torch.where(batch.rows < isolated, -losses.clamp(max=forgotten), losses).mean()

    return loss
