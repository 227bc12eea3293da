"""Fine-tuning and its variants, which differ in the tuned part and in the start of the head.

The four are one family in the paper that introduced Feature Shift Tuning, which uses them to show that plain tuning
fails at low poison rates because features of clean and triggered examples are entangled.

Min, Qin, Shen and Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS 2023,
https://arxiv.org/abs/2310.01875
"""

from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.head import reinitialise_
from unbackdoor._purification.run import Run
from unbackdoor._value import value

_Epochs = Annotated[int, Field(ge=1)]
_LearningRate = Annotated[float | None, Field(gt=0)]
_BatchSize = Annotated[int | None, Field(ge=2)]


@value
class FineTuning:
    """Tune all weights on the clean examples.

    Args:
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts and conversations, 1e-5 for pairs of image and caption.
        batch_size: examples per step, at least 2; None is 128 for images, 16 for texts, 8 for conversations and 64 for
            pairs.

    Differences from the paper: none known. The head's norm is free, as in the paper; the authors' script keeps it fixed
    in this mode.
    """

    epochs: _Epochs = 10
    learning_rate: _LearningRate = None
    batch_size: _BatchSize = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        run.tune(model, clean, epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size)
        return model


@value
class LinearProbing:
    """Tune the head alone.

    Args:
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts.

    Differences from the paper: the head's norm is free (see FineTuning). As in the authors' code the model is in train
    mode, so that the running statistics of BatchNorm adapt although no weight of the extractor does.
    """

    epochs: _Epochs = 10
    learning_rate: _LearningRate = None
    batch_size: _BatchSize = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        model.requires_grad_(False)
        run.head(model).requires_grad_(True)
        run.tune(model, clean, epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size)
        return model


@value
class FETuning:
    """Re-initialise the head, freeze it, and tune the feature extractor.

    Args:
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts.

    Differences from the paper: the random head keeps its own norm; the authors' script scales it to the suspect's after
    the first step.
    """

    epochs: _Epochs = 10
    learning_rate: _LearningRate = None
    batch_size: _BatchSize = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        head = run.head(model)
        reinitialise_(head, run.generator)
        head.requires_grad_(False)
        run.tune(model, clean, epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size)
        return model


@value
class FTInit:
    """Re-initialise the head and tune all weights.

    Args:
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts.

    Differences from the paper: the head's norm is free (see FineTuning).
    """

    epochs: _Epochs = 10
    learning_rate: _LearningRate = None
    batch_size: _BatchSize = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        reinitialise_(run.head(model), run.generator)
        run.tune(model, clean, epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size)
        return model
