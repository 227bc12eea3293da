"""Denoised product of experts."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.calling import probe
from unbackdoor._models.head import reinitialise_
from unbackdoor._registry.entries import Modality
from unbackdoor._robust_training.run import TrainingRun
from unbackdoor._tasks.classification import answers
from unbackdoor._value import value
from unbackdoor.trainers._first_blocks import first_blocks


@value
class DPoE:
    """Train together with a shallow model, which learns the trigger and is then thrown away.

    A trigger is a shortcut, and the first blocks of the network suffice to learn it. The bias model is a copy of these
    blocks with a head of its own. Both are trained together, on the cross-entropy of their product, softmax(log p_main
    + weight * log p_bias): once the bias model is sure of a row, the main model learns nothing from it. As labels may
    be wrong in the rest, each batch passes twice through dropout, and `consistency` times the symmetric divergence
    (Kullback-Leibler) of the two products is added (R-Drop). Only the main model is kept.

    Liu, Wang, Xiao and Chen, "From Shortcuts to Triggers: Backdoor Defense with Denoised PoE", NAACL 2024,
    https://arxiv.org/abs/2305.14910

    Distrusts rows that the bias model answers as labelled and the main model otherwise.

    Cannot see: triggers that need the upper blocks as the task does, such as those of style; a task as easy as the
    trigger is treated as one.

    Args:
        blocks: number of blocks of the bias model, at least 1 and fewer than the model has; of an encoder and a decoder
            as many of each.
        weight: weight of the bias model in the product, at least 0; at 0 there is none.
        consistency: weight of the divergence between two passes, at least 0; at 0 there is one pass.
        bias_learning_rate: peak learning rate of the bias model, more than 0; None is four times the main model's.

    Differences from the paper: the authors take the number of blocks (2 to 5 of 12) that had the best result; here it
    is fixed beforehand. The symmetric divergence is the mean of both directions. Learning rate, epochs and batches are
    those of the recipe; the ratio of the two learning rates is the paper's. The rows that are distrusted are this
    project's addition.
    """

    blocks: Annotated[int, Field(ge=1)] = 2
    weight: Annotated[float, Field(ge=0)] = 1.0
    consistency: Annotated[float, Field(ge=0)] = 3.0
    bias_learning_rate: Annotated[float | None, Field(gt=0)] = None

    modality: ClassVar[tuple[Modality, ...]] = ("text",)

    def __call__(self, data: Dataset, model: nn.Module, run: TrainingRun) -> nn.Module:
        """Train in place."""
        bias = run.arithmetic.place(self.shallow(model, run)).train()
        rate = self.bias_learning_rate or 4 * run.training.schedule.learning_rate

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            def shallow_scores() -> Tensor | None:
                return run.scores(bias, batch.inputs) if self.weight else None

            first = product(scores, shallow_scores(), self.weight)
            if not self.consistency:
                return F.nll_loss(first, batch.labels)
            second = product(run.scores(model, batch.inputs), shallow_scores(), self.weight)
            fit = (F.nll_loss(first, batch.labels) + F.nll_loss(second, batch.labels)) / 2
            return fit + self.consistency * symmetric_divergence(first, second)

        run.train(model, data, loss=loss, also=[(bias, rate)] if self.weight else [])
        self.report(model, bias.eval(), data, run)
        return model

    def shallow(self, model: nn.Module, run: TrainingRun) -> nn.Module:
        """Returns a copy of the first blocks with a head of its own.

        Raises:
            UnbackdoorError: the model has no list of blocks, too few, or cannot run without the others.
        """
        bias = first_blocks(model, self.blocks, probe(model, run.training.data), type(self).__name__)
        reinitialise_(run.head(bias), run.generator)
        return bias

    def report(self, model: nn.Module, bias: nn.Module, data: Dataset, run: TrainingRun) -> None:
        """Distrust the rows that only the bias model answers as labelled."""
        if not self.weight:
            return
        labels = data.labels.cpu()
        main, shortcut = (answers(each, data, run.arithmetic).log_softmax(dim=1) for each in (model, bias))
        apart = (shortcut.argmax(dim=1) == labels) & (main.argmax(dim=1) != labels)
        rows = apart.nonzero().flatten()
        gap = (shortcut - main).gather(1, labels[:, None])[:, 0]
        run.distrust(rows, gap[rows], "log-probability of the label by the bias model minus that by the main model")


def product(main: Tensor, bias: Tensor | None, weight: float) -> Tensor:
    """The logarithm of the product of two models' answers, normalised, (batch, classes).

    Args:
        main: scores of the main model, (batch, classes).
        bias: scores of the bias model, (batch, classes); None leaves it out.
        weight: exponent of the bias model.
    """
    alone = main.log_softmax(dim=1)
    return alone if bias is None else (alone + weight * bias.log_softmax(dim=1)).log_softmax(dim=1)


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """The mean of both Kullback-Leibler divergences of two answers, given as logarithms, over a batch, ()."""
    there = F.kl_div(first, second, reduction="batchmean", log_target=True)
    back = F.kl_div(second, first, reduction="batchmean", log_target=True)
    return (there + back) / 2
