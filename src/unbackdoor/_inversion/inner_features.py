"""The features at one place inside a network, which can be changed, and the class scores that follow."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.search import frozen
from unbackdoor._models.calling import Inputs, probe
from unbackdoor._models.hooks import watching
from unbackdoor._models.stage_ends import replacing, stage_ends, watching_output
from unbackdoor._purification.run import Run


@dataclass(frozen=True)
class InnerFeatures:
    """The features at one place inside a network, and the class scores that follow from them.

    Args:
        model: any classifier of images.
        run: arithmetic.
        stage: whose output they are; None for the inputs of the head.
    """

    model: nn.Module
    run: Run
    stage: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module, clean: Dataset, run: Run) -> "InnerFeatures":
        """Those at the end of the first of at most three stages, or those that the head sees if there are no stages."""
        try:
            stage = model.get_submodule(stage_ends(model, probe(model, clean), "Margin")[0])
        except UnbackdoorError:
            return cls(model, run, None)
        inner, inputs = cls(model, run, stage), probe(model, clean)
        with frozen(model):
            scores = inner.scores(inputs, inner.features(inputs).requires_grad_(True))
        return inner if scores.requires_grad else cls(model, run, None)  # a branch that the scores do not follow from

    @torch.no_grad()
    def features(self, inputs: Inputs) -> Tensor:
        """The features of inputs, (batch, channels, height, width), (batch, length, width) or (batch, width)."""
        watched = watching(self.run.head(self.model)) if self.stage is None else watching_output(self.stage)
        with watched as seen:
            self.run.scores(self.model, inputs)
        return seen[0].to(self.run.arithmetic.dtype)

    def scores(self, inputs: Inputs, features: Tensor) -> Tensor:
        """The class scores of inputs if other features stand in place of theirs, (batch, classes)."""
        if self.stage is None:
            scores: Tensor = self.run.head(self.model)(features)
            return scores
        with replacing(self.stage, features):
            return self.run.scores(self.model, inputs)

    def spread(self, clean: Dataset) -> Tensor:
        """The standard deviation of each channel over the clean examples, in a shape that fits features."""
        count, sums, squares = 0, [], []
        for batch in clean.batches(self.run.arithmetic.evaluation_batch):
            features = self.features(batch.inputs).double()
            channel = 1 if features.ndim == 4 else features.ndim - 1
            others = [place for place in range(features.ndim) if place != channel]
            sums.append(features.sum(others, keepdim=True))
            squares.append(features.square().sum(others, keepdim=True))
            count += features.numel() // features.shape[channel]
        mean, mean_square = (torch.stack(parts).sum(dim=0) / count for parts in (sums, squares))
        return (mean_square - mean.square()).clamp(min=0).sqrt().to(self.run.arithmetic.dtype)
