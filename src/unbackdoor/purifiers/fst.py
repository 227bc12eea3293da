"""Feature Shift Tuning."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.head import reinitialise_
from unbackdoor._purification.run import Run
from unbackdoor._value import value


@value
class FST:
    """Re-initialise the head and drive it away from the suspect's while tuning all weights.

    Plain fine-tuning leaves a backdoor of a low poison rate in place, because the features of triggered and of clean
    examples are entangled there. A head that must differ from the suspect's makes the features shift, and the clean
    examples show where to. Over the clean examples (x, y), FST minimises

        CE(f(x), y) + alpha * <W, W_suspect>   subject to   |W| = |W_suspect|

    with W the weight matrix of the head, the plain inner product over all its entries, and the Frobenius norm, to which
    W is scaled back after every step. Of a model of images and texts, the head is the projection of images into the
    space that they share with texts, and the contrastive loss stands for the cross-entropy.

    Min, Qin, Shen and Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS 2023,
    https://arxiv.org/abs/2310.01875

    Args:
        alpha: weight of the inner product, at least 0; 0 is FT-init with a fixed norm. Use less for many classes.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts, 1e-5 for pairs of image and caption.
        batch_size: examples per step, at least 2; None is 128 for images, 16 for texts and 64 for pairs.
        project: scale the head back to its norm after every step.

    Differences from the paper: none known in the method for classifiers; the paper has no models of images and texts.
    If the authors' code and the paper differ, this follows the paper: their script keeps the head's norm fixed in every
    mode, also in plain fine-tuning and linear probing; here only FST does. As in their code, the bias of the head is
    drawn again and tuned, but neither penalised nor projected, and the random head enters the first step with its own
    norm. The default for alpha is 0.1, as in their README's CIFAR-10 example; their command line has 0.2. Their loss
    with label smoothing drops the inner product; label smoothing is not offered.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.1
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None
    project: bool = True

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        head = run.head(model)
        suspect = head.weight.detach().clone()  # (classes, features)
        norm = suspect.norm()
        reinitialise_(head, run.generator)

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            return run.task.loss(scores, batch) + self.alpha * (head.weight * suspect).sum()

        def project_() -> None:
            head.weight.mul_(norm / head.weight.norm())

        run.tune(
            model,
            clean,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            loss=loss,
            after_step=project_ if self.project else None,
        )
        return model
