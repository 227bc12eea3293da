"""Fine-tuning by matrices of low rank, the control of methods that tune these."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._purification.run import Run
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._low_rank import low_rank


@value
class LoRATuning:
    """Tune matrices of low rank next to the linear layers on the clean examples, then add them to the layers.

    It is the control of CROW and W2SDistillation: with the same examples, rank, scale, rate, epochs and batches it
    takes the same steps without their further losses.

    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, "LoRA: Low-Rank Adaptation of Large Language Models",
    ICLR 2022, https://arxiv.org/abs/2106.09685

    Args:
        rank: rank of the matrices, 1 to 4,096; an adapter keeps its own rank and scale.
        alpha: numerator of their scale, at least 1; the denominator is the rank. None is twice the rank.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 2e-4 (AdamW).
        batch_size: examples per step, at least 2; None is 16 for texts, 8 for conversations.

    Differences from the paper: it is not a defence there. All linear layers but those of the head have such matrices;
    the paper has them in attention. The head stays as it is.
    """

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Annotated[int | None, Field(ge=1)] = None
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {"text": {"learning_rate": 2e-4}, "conversations": {"learning_rate": 2e-4}}

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        with low_rank(model, run, self, rank=self.rank, alpha=self.alpha):
            run.tune(
                model,
                clean,
                epochs=self.epochs,
                learning_rate=run.setting(self, "learning_rate"),
                batch_size=self.batch_size,
            )
        return model
