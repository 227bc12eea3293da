"""Margin: how far features inside the network can be driven towards each class."""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._inversion.inner_features import InnerFeatures
from unbackdoor._inversion.search import frozen
from unbackdoor._inversion.triggers import size_for_model
from unbackdoor._models.calling import Inputs
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import predict
from unbackdoor._value import value

LEAST = 1e-3  # margin: a class that cannot be reached has no logarithm


@value
class Margin:
    """Maximise the margin of each class over the features at the end of an early stage, and compare the classes.

        r_t = mean over starts of  max over d of  z_t(h + s d) - max over j != t of z_j(h + s d)

    h are the features of a clean example that the model does not classify as t, s is the standard deviation of each
    channel over the clean examples, z the class scores that follow, and the root mean square of d is bounded. A
    backdoor raises the margin of its target above those of the other classes.

    Wang, Xiang, Miller and Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor
    Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024, https://arxiv.org/abs/2205.06900

    Labels are not used: the model's own answers stand for them.

    Cannot see: backdoors of networks whose margins were kept small in training, several target classes at once,
    backdoors of all classes, and units that no clean example activates at that stage. It finds no trigger.

    Args:
        starts: examples for each class, at least 1.
        steps: steps of gradient ascent, at least 1.
        step: the root mean square of each, more than 0.
        budget: the largest root mean square of d, in standard deviations of a channel, more than 0.

    Differences from the paper: there the margin is maximised over all pixels in [0, 1] from random noise. Clean starts
    and features of a layer inside are those of an entry of a contest of 2024, which reports that random starts are
    worse. The budget is this project's: without it the weights of each class decide the ranks. The mean over starts
    replaces the largest margin, which depends on one of them. No gamma distribution is fitted: the logarithms of the
    margins are compared, leaving out one class in turn, so that a factor on all class scores changes nothing. In
    networks without stages h are the inputs of the head.
    """

    starts: Annotated[int, Field(ge=1)] = 8
    steps: Annotated[int, Field(ge=1)] = 15
    step: Annotated[float, Field(gt=0)] = 0.1
    budget: Annotated[float, Field(gt=0)] = 0.5

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        inner = InnerFeatures.of(model, clean, run)
        answers, classes = predict(model, clean, run.arithmetic), run.classes(model, clean)
        starts, targets = [], []
        for target in range(classes):
            others = (answers != target).nonzero().flatten()
            starts.append(others[torch.randperm(len(others), generator=run.generator)[: self.starts]])
            targets.append(torch.full_like(starts[-1], target))
        rows, wanted = torch.cat(starts), torch.cat(targets)
        size = run.arithmetic.gradient_batch(size_for_model(clean.image_encoder, clean.shape))
        with frozen(model), run.progress("raising margins", self.steps * math.ceil(len(rows) / size)) as advance:
            spread = inner.spread(clean)
            parts = [
                self._raised(inner, spread, clean.inputs(part), aims.to(run.arithmetic.device), advance)
                for part, aims in zip(rows.split(size), wanted.split(size), strict=True)
            ]
        raised = torch.cat(parts).double()
        return Finding(
            candidates=tuple(
                Candidate(target=target, strength=_strength(raised[wanted == target])) for target in range(classes)
            )
        )

    def _raised(
        self, inner: "InnerFeatures", spread: Tensor, inputs: Inputs, targets: Tensor, advance: Callable[[], None]
    ) -> Tensor:
        """The margins reached from the features of some examples, one target for each, (examples,), on the CPU."""
        start = inner.features(inputs)
        change = torch.zeros_like(start)  # in standard deviations of the channel

        def margins() -> Tensor:
            scores = inner.scores(inputs, start + spread * change)
            rivals = scores.scatter(1, targets[:, None], -math.inf).amax(dim=1)
            return scores.gather(1, targets[:, None])[:, 0] - rivals

        for _ in range(self.steps):
            change.requires_grad_(True)
            (slope,) = torch.autograd.grad(margins().sum(), change)
            moved = change.detach() + self.step * slope / rms(slope).clamp(min=1e-30)
            change = moved * (self.budget / rms(moved).clamp(min=1e-30)).clamp(max=1)
            advance()
        with torch.no_grad():
            return margins().cpu()


def _strength(margins: Tensor) -> float:
    """The logarithm of the mean margin; that of `LEAST` if it is smaller, not finite, or of no example."""
    mean = float(margins.mean())
    return math.log(max(mean, LEAST) if math.isfinite(mean) else LEAST)


def rms(change: Tensor) -> Tensor:
    """The root mean square of each example's entries, in a shape that fits them."""
    return change.square().mean(dim=tuple(range(1, change.ndim)), keepdim=True).sqrt()
