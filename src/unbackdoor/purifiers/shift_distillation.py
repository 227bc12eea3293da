"""Shift distillation: Feature Shift Tuning with the suspect's answers to clean examples as a teacher."""

import copy
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.head import reinitialise_
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import cross_entropy, divergence
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value


@value
class ShiftDistillation:
    """FST with the suspect as a teacher, on strongly augmented clean examples.

    FST loses clean accuracy because a few clean examples cannot teach the shifted features everything that the suspect
    knew. The suspect itself can: on clean examples its answers are right, and without a trigger they contain little of
    the backdoor. Over the clean examples (x, y), augmented again each time, this method minimises

        (1 - share) * CE(f(x), y) + share * KL(f_suspect(x) || f(x)) + alpha * <W, W_suspect>,   |W| = |W_suspect|

    with the head re-initialised and projected as in FST. The answers are taken at temperature 1: softer ones, or many
    more passes, also teach the backdoor, probably through the small probabilities. It is not safer than FST:
    docs/results/fst.md has a victim on which it fails more often.

    A variant of this project; its parent is Min et al., "Towards Stable Backdoor Purification through Feature Shift
    Tuning", https://arxiv.org/abs/2310.01875, and teaching by soft answers is Hinton et al., "Distilling the Knowledge
    in a Neural Network", https://arxiv.org/abs/1503.02531

    Args:
        alpha: weight of the inner product, at least 0.
        share: weight of the suspect's answers against the labels, 0 to 1.
        temperature: temperature of both softmaxes, more than 0; the term is multiplied by its square.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.02 (SGD) for images and 1e-4 (AdamW) for
            texts.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts.

    Differences from the paper: everything except the head's start, shift and projection; there is no paper on this
    variant. It is not FST and is never used in its place. As in FST, the push grows with the squared norm of the
    suspect's head, so a large head is damaged and a small one keeps its backdoor: docs/results/suspects.md.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.1
    share: Annotated[float, Field(ge=0, le=1)] = 0.9
    temperature: Annotated[float, Field(gt=0)] = 1.0
    epochs: Annotated[int, Field(ge=1)] = 40
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {
        "images": {"learning_rate": 0.02},
        "text": {"learning_rate": 1e-4},
    }

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        teacher = copy.deepcopy(model).eval()
        head = run.head(model)
        suspect = head.weight.detach().clone()  # (classes, features)
        norm = suspect.norm()
        reinitialise_(head, run.generator)

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            with torch.no_grad():
                answers = run.scores(teacher, batch.inputs)  # (batch, classes)
            distance = divergence(scores, answers, self.temperature)
            shift = (head.weight * suspect).sum()
            taught = self.share * self.temperature**2 * distance
            return (1 - self.share) * cross_entropy(scores, batch) + taught + self.alpha * shift

        def project_() -> None:
            head.weight.mul_(norm / head.weight.norm())

        run.tune(
            model,
            clean.distorted(),
            epochs=self.epochs,
            learning_rate=run.setting(self, "learning_rate"),
            batch_size=self.batch_size,
            loss=loss,
            after_step=project_,
        )
        return model
