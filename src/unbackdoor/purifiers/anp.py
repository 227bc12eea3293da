"""Adversarial Neuron Pruning."""

import copy
import itertools
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.units import norms
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import cross_entropy
from unbackdoor._value import value
from unbackdoor.purifiers._masks import prune_below_, scaled_


@value
class ANP:
    """Prune the channels that a small change of their weights turns against clean examples.

    Backdoored networks answer with the target class, without any trigger, when some neurons are perturbed. A mask m in
    [0, 1] on the weights w of BatchNorm is learned on the clean examples to withstand that, with b the biases:

        min over m   alpha * L(m w, b) + (1 - alpha) * max over |d|, |e| <= epsilon  L((m + d) w, (1 + e) b)

    The inner maximum is approximated by one step along the sign of the gradient from a random start. Then channels with
    the lowest masks are pruned: their BatchNorm weight becomes zero.

    Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021,
    https://arxiv.org/abs/2110.14430

    Args:
        alpha: weight of the unperturbed loss, 0 to 1.
        epsilon: largest perturbation, relative to the weight, at least 0.
        steps: steps in which the mask is learned, at least 1; each costs three forward and backward passes.
        learning_rate: learning rate of the mask (SGD with momentum 0.9), more than 0.
        batch_size: examples per step, at least 2.
        tolerance: how much accuracy on held-out clean examples may fall by pruning, 0 to 1.
        threshold: channels with a mask of at most this are pruned, 0 to 1; None is the largest multiple of 0.05 within
            the tolerance.

    Differences from the paper: the threshold of the mask is the largest multiple of 0.05 that clean accuracy on a fifth
    of the clean examples allows; the authors' script prints test attack success for each threshold, and the reader
    chooses. 200 steps instead of 2,000, for processors without a GPU. BatchNorm uses the statistics of the batch while
    the mask is learned, as in the authors' code, and its running statistics do not change.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    epsilon: Annotated[float, Field(ge=0)] = 0.4
    steps: Annotated[int, Field(ge=1)] = 200
    learning_rate: Annotated[float, Field(gt=0)] = 0.2
    batch_size: Annotated[int, Field(ge=2)] = 128
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05
    threshold: Annotated[float | None, Field(ge=0, le=1)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        prune_below_(self, model, clean, run, self.masks)
        return model

    def masks(self, model: nn.Module, clean: Dataset, run: Run) -> list[Tensor]:
        """Returns the mask of each BatchNorm in module order, (channels,) each, learned on a copy of the model."""
        trial = copy.deepcopy(model).requires_grad_(False).train()
        layers = norms(trial, self).values()
        weights, biases = scaled_(layers, "weight"), scaled_(layers, "bias")
        masks = [scale.mask for scale in weights]
        noises = [scale.noise for scale in (*weights, *biases)]
        optimizer = torch.optim.SGD(masks, lr=self.learning_rate, momentum=0.9)
        endless = itertools.chain.from_iterable(
            clean.batches(self.batch_size, generator=run.generator) for _ in itertools.count()
        )

        def loss(batch: Batch) -> Tensor:
            return cross_entropy(run.scores(trial, batch.inputs), batch)

        with run.progress("perturbing neurons", self.steps) as advance:
            for batch in itertools.islice(endless, self.steps):
                optimizer.zero_grad()
                (self.alpha * loss(batch)).backward(inputs=masks)
                for noise in noises:
                    drawn = torch.rand(noise.shape, generator=run.generator, dtype=noise.dtype)
                    noise.data.copy_((2 * drawn - 1) * self.epsilon)
                for noise, slope in zip(noises, torch.autograd.grad(loss(batch), noises), strict=True):
                    noise.data.add_(self.epsilon * slope.sign()).clamp_(-self.epsilon, self.epsilon)
                ((1 - self.alpha) * loss(batch)).backward(inputs=masks)
                optimizer.step()
                for mask in masks:
                    mask.data.clamp_(0, 1)
                for noise in noises:
                    noise.data.zero_()
                run.examples_seen += len(batch.labels)
                advance()
        return [mask.detach() for mask in masks]
