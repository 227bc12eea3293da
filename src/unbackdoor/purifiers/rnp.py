"""Reconstructive Neuron Pruning."""

import copy
import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.units import norms
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import cross_entropy
from unbackdoor._value import value
from unbackdoor.purifiers._masks import prune_below_, scaled_


@value
class RNP:
    """Unlearn the clean task, recover it by a mask, and prune the channels that the mask leaves out.

    A model that has forgotten its clean examples still knows its backdoor. On a copy of the suspect f, RNP first
    *raises* CE(f(x), y) by gradient ascent over the clean examples until few of them are classified as labelled. Then
    all weights are frozen, and a mask m in [0, 1] on the weights of BatchNorm is learned that minimises weight *
    CE(f_m(x), y). Channels whose mask falls hinder the clean task: in the suspect itself they are pruned, that is,
    their BatchNorm weight becomes zero.

    Li, Lyu, Ma, Koren, Lyu, Li and Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023,
    https://arxiv.org/abs/2305.14876

    Args:
        forget_epochs: largest number of passes of unlearning, at least 1.
        forget_accuracy: unlearning stops after a pass with this accuracy on the clean examples or less, 0 to 1.
        forget_rate: learning rate of unlearning, more than 0.
        epochs: passes of recovering, at least 1.
        learning_rate: learning rate of the mask (SGD with momentum 0.9), more than 0.
        weight: weight of the cross-entropy while recovering, more than 0.
        batch_size: examples per step, at least 2.
        tolerance: how much accuracy on held-out clean examples may fall by pruning, 0 to 1.
        threshold: channels with a mask of at most this are pruned, 0 to 1; None is the largest multiple of 0.05 within
            the tolerance.

    Differences from the paper: the threshold of the mask is the largest multiple of 0.05 that clean accuracy on a fifth
    of the clean examples allows; the authors' script prints test attack success for each threshold, and the reader
    chooses. The mask is averaged over the steps in which it is learned: in a narrow network many entries of the last
    mask are 0, and only the average shows which of these channels hinder most.
    """

    forget_epochs: Annotated[int, Field(ge=1)] = 20
    forget_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.2
    forget_rate: Annotated[float, Field(gt=0)] = 0.01
    epochs: Annotated[int, Field(ge=1)] = 20
    learning_rate: Annotated[float, Field(gt=0)] = 0.2
    weight: Annotated[float, Field(gt=0)] = 0.2
    batch_size: Annotated[int, Field(ge=2)] = 128
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05
    threshold: Annotated[float | None, Field(ge=0, le=1)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        prune_below_(self, model, clean, run, self.masks)
        return model

    def masks(self, model: nn.Module, clean: Dataset, run: Run) -> list[Tensor]:
        """Returns the mask of each BatchNorm in module order, (channels,) each, learned on a copy of the model."""
        trial = copy.deepcopy(model)
        self.forget_(trial, clean, run)
        return self.recover(trial, clean, run)

    def forget_(self, trial: nn.Module, clean: Dataset, run: Run) -> None:
        """Gradient ascent on the clean examples until few of them are classified as labelled."""
        optimizer = torch.optim.SGD(trial.parameters(), lr=self.forget_rate, momentum=0.9, weight_decay=5e-4)
        trial.train()
        with run.progress("forgetting the clean task", self.forget_epochs) as advance:
            for _ in range(self.forget_epochs):
                hits = 0
                for batch in clean.batches(self.batch_size, generator=run.generator):
                    scores = run.scores(trial, batch.inputs)
                    hits += int((scores.argmax(dim=1) == batch.labels).sum())
                    optimizer.zero_grad()
                    (-cross_entropy(scores, batch)).backward()
                    nn.utils.clip_grad_norm_(trial.parameters(), 20)
                    optimizer.step()
                    run.examples_seen += len(batch.labels)
                advance()
                if hits <= self.forget_accuracy * len(clean):
                    return

    def recover(self, trial: nn.Module, clean: Dataset, run: Run) -> list[Tensor]:
        """Returns the mask of each BatchNorm that recovers the clean task, (channels,): the mean over the steps."""
        trial.requires_grad_(False)
        masks = [scale.mask for scale in scaled_(norms(trial, self).values(), "weight")]
        optimizer = torch.optim.SGD(masks, lr=self.learning_rate, momentum=0.9)
        sums = [torch.zeros_like(mask) for mask in masks]
        steps = self.epochs * math.ceil(len(clean) / self.batch_size)
        trial.train()
        with run.progress("recovering the clean task", steps) as advance:
            for _ in range(self.epochs):
                for batch in clean.batches(self.batch_size, generator=run.generator):
                    optimizer.zero_grad()
                    (self.weight * cross_entropy(run.scores(trial, batch.inputs), batch)).backward()
                    optimizer.step()
                    run.examples_seen += len(batch.labels)
                    for mask, total in zip(masks, sums, strict=True):
                        mask.data.clamp_(0, 1)
                        total += mask.detach()
                    advance()
        return [total / steps for total in sums]
