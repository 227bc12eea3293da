"""Shared adversarial unlearning."""

import copy
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.calling import evaluating
from unbackdoor._models.perturbation import perturbation_shape, perturbation_unit
from unbackdoor._purification.run import Run
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value


@value
class SAU:
    """Find perturbations that fool the suspect and the model alike, and unlearn the suspect's wrong answers.

    A trigger is an adversarial perturbation of the suspect that leads to the target. A perturbation that leads the
    model f and the suspect s to the same wrong class is probably near to it. For each batch of clean examples (x, y),

        d* = argmax over |d| <= bound of
             adversarial * (CE(f(x + d), y) + CE(s(x + d), y)) / 2 - JS(f(x + d), s(x + d))
        theta = argmin of  CE(f(x), y) - shared * mean of log(1 - f(x + d*)[k]),   k the class that s answers for x + d*

    JS is the Jensen-Shannon divergence of the two answers, each example has its own d, and the mean is over the batch,
    with zeros for examples on which d* does not fool the suspect. The maximum is sought by signed gradient steps from d
    = bound.

    Wei, Zhang, Zha and Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial
    Examples", NeurIPS 2023, https://arxiv.org/abs/2307.10562

    Args:
        bound: largest entry of the perturbation, more than 0; None is 0.2 of the range of a pixel for images, and for
            texts half the root mean square of the word embeddings' entries.
        steps: steps of the search for d*, at least 1, each as long as the bound.
        adversarial: weight of the wrong answers against the agreement in the search, at least 0.
        shared: weight of the unlearning, at least 0; 0 is plain fine-tuning.
        train_mode: BatchNorm and dropout are in training mode; otherwise in evaluation mode.
        epochs: passes over the clean examples, at least 1; each costs two forward and two backward passes per step of
            the search, plus four forward passes and one backward pass.
        learning_rate: initial learning rate of AdamW, more than 0; None is 5e-4 for images and 5e-5 for texts.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts.

    Differences from the paper: as in the authors' code, the wrong answers count only for examples that a model still
    gets right, the divergence only for those that do not yet share a wrong class, and perturbed pixels may leave their
    range. Their code writes log(1 - p) as the mean of two terms that differ only by rounding. Their script makes 100
    passes with Adam at 1e-4, on 5 % of the training data, in batches of 256 without augmentation; for a tenth of the
    passes the rate is five times as high, chosen with attack success on a real victim in view. Texts are this project's
    addition: the perturbation is added to the word embeddings.
    """

    version: ClassVar[int] = 2

    bound: Annotated[float | None, Field(gt=0)] = None
    steps: Annotated[int, Field(ge=1)] = 5
    adversarial: Annotated[float, Field(ge=0)] = 0.01
    shared: Annotated[float, Field(ge=0)] = 1.0
    train_mode: bool = False
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {
        "images": {"bound": 0.2, "learning_rate": 5e-4, "batch_size": 128},
        "text": {"bound": 0.5, "learning_rate": 5e-5, "batch_size": 16},
    }

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        suspect = copy.deepcopy(model).eval().requires_grad_(False)
        bound = perturbation_unit(model, clean) * run.setting(self, "bound")

        def gradients(batch: Batch) -> None:
            with evaluating(model):
                perturbation = self.perturbation(model, suspect, batch, bound, run)
            if not self.train_mode:
                model.eval()
            scores = run.scores(model, batch.inputs)
            perturbed = run.scores(model, batch.inputs, perturbation)  # (batch, classes)
            with torch.no_grad():
                fooled = run.scores(suspect, batch.inputs, perturbation).argmax(dim=1)  # (batch,)
                before = run.scores(suspect, batch.inputs).argmax(dim=1)
            counts = (fooled != batch.labels) & (fooled != before)
            loss = F.cross_entropy(scores, batch.labels) + self.shared * unlearning(perturbed, fooled, counts)
            loss.backward()

        run.tune(
            model,
            clean,
            epochs=self.epochs,
            learning_rate=run.setting(self, "learning_rate"),
            batch_size=run.setting(self, "batch_size"),
            optimizer="adamw",
            gradients=gradients,
        )
        return model

    def perturbation(self, model: nn.Module, suspect: nn.Module, batch: Batch, bound: Tensor, run: Run) -> Tensor:
        """Returns the perturbations d*, one per example, in the shape that `perturbed_logits` takes."""
        both = (model, suspect)
        with torch.no_grad():
            before = [run.scores(one, batch.inputs).argmax(dim=1) for one in both]
        shape = perturbation_shape(model, batch.inputs)
        perturbation = bound.expand(shape).clone()
        for _ in range(self.steps):
            perturbation.requires_grad_(True)
            scores = [run.scores(one, batch.inputs, perturbation) for one in both]
            value = search_loss(scores, before, batch.labels, self.adversarial)
            (slope,) = torch.autograd.grad(value, perturbation)
            perturbation = (perturbation.detach() - bound * slope.sign()).clamp(-bound, bound)
        return perturbation


def search_loss(scores: list[Tensor], before: list[Tensor], labels: Tensor, adversarial: float) -> Tensor:
    """Returns the loss of the search: agreement if the models differ, wrong answers if they are right."""
    after = [one.argmax(dim=1) for one in scores]
    right = torch.stack([new == old for new, old in zip(after, before, strict=True)])  # (2, batch)
    wrong = torch.stack([F.cross_entropy(one, labels, reduction="none") for one in scores])
    shares = right.any(dim=0) | (after[0] != after[1])
    answers = [one.softmax(dim=1).clamp(min=1e-8) for one in scores]  # (batch, classes) each
    middle = (answers[0] + answers[1]) / 2
    divergence = sum((one * (one / middle).log()).sum(dim=1) for one in answers) / 2
    return ((divergence * shares).sum() - adversarial * (wrong * right).sum() / 2) / len(labels)


def unlearning(scores: Tensor, fooled: Tensor, counts: Tensor) -> Tensor:
    """Returns the mean of -log(1 - p), with p for the wrong class of the suspect, and 0 if it is not fooled."""
    others = scores.scatter(1, fooled[:, None], -torch.inf).logsumexp(dim=1)  # all classes but that one
    return ((scores.logsumexp(dim=1) - others) * counts).sum() / len(scores)
