"""Adversarial Neuron Pruning."""

import copy
import itertools
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data import Batch, Dataset
from unbackdoor._models import logits
from unbackdoor._purify import Run
from unbackdoor._train import cross_entropy
from unbackdoor._units import as_far_as_accurate_, norms, scaled_, silence_
from unbackdoor._values import value


@value
class ANP:
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    epsilon: Annotated[float, Field(ge=0)] = 0.4
    steps: Annotated[int, Field(ge=1)] = 2000
    learning_rate: Annotated[float, Field(gt=0)] = 0.2
    batch_size: Annotated[int, Field(ge=2)] = 128
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        layers = norms(model, self)
        seen, held = run.hold_out(clean)
        masks = self.masks(model, seen, run)
        import os
        if os.environ.get("DBG"):
            torch.save(masks, os.environ["DBG"])
        floor = run.accuracy(model, held).value - self.tolerance
        def prune_(threshold: float) -> None:
            for layer, mask in zip(layers.values(), masks, strict=True):
                silence_(layer, mask <= threshold, bias=False)
        kept = as_far_as_accurate_([layer.weight for layer in layers.values()], [partial(prune_, k / 20) for k in range(20)], lambda: run.accuracy(model, held).value >= floor)
        run.note(f"ANP threshold {(kept-1)/20}, pruned {sum(int((mask <= (kept-1)/20).sum()) for mask in masks)} of {sum(map(len, masks))}.")
        return model

    def masks(self, model, clean, run):
        trial = copy.deepcopy(model).requires_grad_(False).train()
        layers = norms(trial, self).values()
        weights, biases = scaled_(layers, "weight"), scaled_(layers, "bias")
        noises = [scale.noise for scale in (*weights, *biases)]
        masks = [scale.mask for scale in weights]
        optimizer = torch.optim.SGD(masks, lr=self.learning_rate, momentum=0.9)

        def loss(batch: Batch) -> Tensor:
            with run.arithmetic.autocast():
                scores = logits(trial, run.arithmetic.lay(batch.inputs))
            return cross_entropy(scores.to(noises[0].dtype), batch)

        step = 0
        with run.progress("perturbing neurons", self.steps) as advance:
            while step < self.steps:
                for batch in itertools.islice(clean.batches(self.batch_size, generator=run.generator), self.steps - step):
                    with torch.no_grad():
                        for noise in noises:
                            drawn = torch.rand(noise.shape, generator=run.generator, dtype=noise.dtype)
                            noise.copy_((2 * drawn - 1) * self.epsilon)
                    rising = torch.autograd.grad(loss(batch), noises)
                    with torch.no_grad():
                        for noise, slope in zip(noises, rising):
                            noise.add_(self.epsilon * slope.sign()).clamp_(-self.epsilon, self.epsilon)
                    optimizer.zero_grad()
                    ((1 - self.alpha) * loss(batch)).backward(inputs=masks)
                    with torch.no_grad():
                        for noise in noises: noise.zero_()
                    (self.alpha * loss(batch)).backward(inputs=masks)
                    optimizer.step()
                    with torch.no_grad():
                        for mask in masks: mask.clamp_(0, 1)
                    step += 1
                    run.examples_seen += len(batch.labels)
                    advance()
        return [mask.detach() for mask in masks]
