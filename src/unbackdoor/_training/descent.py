"""The plain loop: stochastic gradient descent on batches, for victims and for purifiers alike."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import check_gradients, explained, logits
from unbackdoor._progress import Progress, silent
from unbackdoor._training.statistics import settle_

Loss = Callable[[Tensor, Batch], Tensor]
"""A function of the scores of a batch, (batch, classes) or (batch, length, vocabulary), and the batch: a scalar."""

Gradients = Callable[[Batch], None]
"""Fills the gradients of the parameters for a batch; they are cleared before."""

Change = Callable[[Batch], Batch]
"""A function that replaces a batch by the one to train on."""


LARGEST_SCALE = math.log(100.0)
"""The largest logarithm of the scale of the cosines in a model of images and texts, as in CLIP's own training."""


def cross_entropy(scores: Tensor, batch: Batch) -> Tensor:
    """Returns the mean cross-entropy, in float32 or better."""
    return F.cross_entropy(scores, batch.labels)


def distilled(answers: Tensor) -> Loss:
    """The mean of KL(answers || scores), for class scores of another model for all rows of the data, (n, classes)."""

    def loss(scores: Tensor, batch: Batch) -> Tensor:
        goal = answers[batch.rows.cpu()].to(scores).softmax(dim=1)
        return F.kl_div(scores.log_softmax(dim=1), goal, reduction="batchmean")

    return loss


def divergence(scores: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of a student's softmax from a teacher's, the mean over a batch, ().

    Args:
        scores: scores of the student, (batch, classes).
        answers: answers of the teacher, (batch, classes).
        temperature: temperature of both softmaxes, more than 0.
    """
    return F.kl_div(
        (scores / temperature).log_softmax(dim=1), (answers / temperature).softmax(dim=1), reduction="batchmean"
    )


def descend(
    model: nn.Module,
    data: Dataset,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    arithmetic: Arithmetic,
    loss: Loss = cross_entropy,
    gradients: Gradients | None = None,
    before_epoch: Callable[[], None] | None = None,
    change: Change | None = None,
    after_step: Callable[[], None] | None = None,
    each: str = "epoch",
    progress: Progress = silent,
    description: str = "tuning",
) -> int:
    """Train a model in place, in train mode throughout.

    Args:
        model: a model on the arithmetic's device.
        data: examples, shuffled and augmented again in each epoch.
        optimizer: optimizer of the parameters to train.
        schedule: a learning-rate scheduler.
        epochs: passes over the data.
        batch_size: examples per step.
        generator: generator of shuffling and augmentation, on the CPU.
        arithmetic: device, precision, layout.
        loss: loss to minimise.
        gradients: replaces the forward and backward pass of the loss, for methods whose step needs more.
        before_epoch: function that is called before each pass.
        change: function that changes each batch before the forward pass; a gradient flows through its result.
        after_step: function that is called after each step, without gradients.
        each: the schedule steps after each `epoch` or each `step`.
        progress: shows the state of the work.
        description: description for the progress.

    Returns:
        the number of examples seen, repetitions counted.
    """

    def backward(batch: Batch) -> None:
        with explained(model, batch.inputs), arithmetic.autocast():
            scores = logits(model, arithmetic.lay(batch.inputs))
        check_gradients(scores)
        loss(scores if scores.dtype == torch.float64 else scores.float(), batch).backward()

    fill = backward if gradients is None else gradients
    model.train()
    seen = 0
    with progress(description, epochs * math.ceil(len(data) / batch_size)) as advance:
        for _ in range(epochs):
            if before_epoch is not None:
                before_epoch()
            for batch in data.batches(batch_size, generator=generator):
                batch = batch if change is None else change(batch)
                optimizer.zero_grad(set_to_none=True)
                fill(batch)
                optimizer.step()
                with torch.no_grad():
                    if data.modality == "image-text":
                        bound_scale_(model)
                    if after_step is not None:
                        after_step()
                if each == "step":
                    schedule.step()
                seen += len(batch.labels)
                advance()
            if each == "epoch":
                schedule.step()
    settle_(model, data, batch_size, generator, arithmetic, epochs * math.ceil(len(data) / batch_size))
    return seen


def bound_scale_(model: nn.Module) -> None:
    """Bring the scale of the cosines of a model of images and texts back to at most 100, if it is trained.

    Otherwise it may grow without end, as larger scores fit pairs that are told apart already. Radford et al., "Learning
    Transferable Visual Models From Natural Language Supervision", ICML 2021, section 2.5,
    https://arxiv.org/abs/2103.00020
    """
    scale = model.get_parameter("logit_scale")
    if scale.requires_grad:
        scale.clamp_(max=LARGEST_SCALE)
