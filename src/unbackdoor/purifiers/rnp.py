"""Reconstructive Neuron Pruning."""

import copy
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data import Batch, Dataset
from unbackdoor._models import logits
from unbackdoor._purify import Run
from unbackdoor._train import cross_entropy
from unbackdoor._units import norms, prune_below_, scaled_
from unbackdoor._values import value


@value
class RNP:
    forget_epochs: Annotated[int, Field(ge=1)] = 20
    forget_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.2
    forget_rate: Annotated[float, Field(gt=0)] = 0.01
    epochs: Annotated[int, Field(ge=1)] = 20
    learning_rate: Annotated[float, Field(gt=0)] = 0.2
    weight: Annotated[float, Field(gt=0)] = 0.2
    batch_size: Annotated[int, Field(ge=2)] = 128
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        layers = list(norms(model, self).values())
        seen, held = run.hold_out(clean)
        trial = copy.deepcopy(model)
        self.forget_(trial, seen, run)
        masks = self.recover(trial, seen, run)
        import os
        if os.environ.get("DBG"):
            torch.save(masks, os.environ["DBG"])
        prune_below_(model, layers, masks, held, run, self.tolerance, self)
        return model

    def forget_(self, trial: nn.Module, clean: Dataset, run: Run) -> None:
        """Gradient ascent on the clean examples until few of them are classified as labelled."""
        optimizer = torch.optim.SGD(trial.parameters(), lr=self.forget_rate, momentum=0.9, weight_decay=5e-4)
        trial.train()
        for _ in range(self.forget_epochs):
            hits = 0
            for batch in clean.batches(self.batch_size, generator=run.generator):
                with run.arithmetic.autocast():
                    scores = logits(trial, run.arithmetic.lay(batch.inputs))
                hits += int((scores.argmax(dim=1) == batch.labels).sum())
                optimizer.zero_grad()
                (-cross_entropy(scores.float(), batch)).backward()
                nn.utils.clip_grad_norm_(trial.parameters(), 20)
                optimizer.step()
                run.examples_seen += len(batch.labels)
            if hits <= self.forget_accuracy * len(clean):
                return

    def recover(self, trial: nn.Module, clean: Dataset, run: Run) -> list[Tensor]:
        trial.requires_grad_(False)
        masks = [scale.mask for scale in scaled_(norms(trial, self).values(), "weight")]
        optimizer = torch.optim.SGD(masks, lr=self.learning_rate, momentum=0.9)
        trial.train()
        for _ in range(self.epochs):
            for batch in clean.batches(self.batch_size, generator=run.generator):
                with run.arithmetic.autocast():
                    scores = logits(trial, run.arithmetic.lay(batch.inputs))
                optimizer.zero_grad()
                (self.weight * cross_entropy(scores.float(), batch)).backward()
                optimizer.step()
                run.examples_seen += len(batch.labels)
                with torch.no_grad():
                    for mask in masks:
                        mask.clamp_(0, 1)
        return [mask.detach() for mask in masks]
