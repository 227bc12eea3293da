"""Correcting the distribution of neural activations."""

import copy
import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.masks import MaskSearch
from unbackdoor._inversion.triggers import encoded, in_pixels, refuse_texts
from unbackdoor._models.calling import Inputs, evaluating, logits
from unbackdoor._models.hooks import removing
from unbackdoor._models.units import norms
from unbackdoor._purification.run import Run
from unbackdoor._value import value


@value
class BNA:
    """Bring the activations of triggered examples back to the distribution of clean ones, by scale and shift.

    A trigger shifts the activations of neurons; undoing the shift brings back the true class. BNA inverts a trigger T,
    and then tunes only the scale and the shift of each channel of each BatchNorm, that is, its weight and bias. N(x) is
    the normal distribution with the mean and variance of a channel over examples x in the tuned model, and N0(x) the
    same in the suspect. BNA minimises the mean over channels of

        KL(N0(x) || N(T(x))) + KL(N0(x) || N(x))

    so that triggered examples look like clean ones, and clean ones like themselves. No label is used.

    Li, Xiang, Miller and Kesidis, "Backdoor Mitigation by Correcting the Distribution of Neural Activations", 2023,
    https://arxiv.org/abs/2308.09850

    Args:
        reverse_steps: steps of the search for a trigger, at least 1.
        epochs: passes over the clean examples, at least 1.
        learning_rate: learning rate of Adam, more than 0.
        batch_size: examples per step, at least 2.

    Differences from the paper: only its abstract was at hand. The paper takes the target class and the trigger from a
    detector and applies a transform to activations at inference. Here Neural Cleanse is the detector (if no class is an
    outlier, the triggers of all classes take turns), and the transform is a scale and a shift that become BatchNorm's
    own, so that the result is a plain model. As these also act on clean examples, a second term keeps those in place. A
    model without BatchNorm has no place for the transform and is refused. Triggered inputs are not flagged.
    """

    version: ClassVar[int] = 2

    reverse_steps: Annotated[int, Field(ge=1)] = 100
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    batch_size: Annotated[int, Field(ge=2)] = 128

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        layers = list(norms(model, self).values())
        refuse_texts(self, clean)
        suspect = copy.deepcopy(model).requires_grad_(False)
        triggered = MaskSearch(steps=self.reverse_steps)(suspect, clean, run)
        model.requires_grad_(False)
        tuned = [parameter.requires_grad_(True) for layer in layers for parameter in (layer.weight, layer.bias)]
        optimizer = torch.optim.Adam(tuned, lr=self.learning_rate)
        steps = self.epochs * math.ceil(len(clean) / self.batch_size)
        with evaluating(model), evaluating(suspect), run.progress("correcting activations", steps) as advance:
            for _ in range(self.epochs):
                for batch in in_pixels(clean).batches(self.batch_size, generator=run.generator):
                    inputs = encoded(clean, batch.pixels, run)
                    with torch.no_grad():
                        wanted = moments(suspect, inputs, list(norms(suspect, self).values()), run)
                    terms = [
                        divergence(right, now)
                        for shown in (encoded(clean, triggered(batch.pixels), run), inputs)
                        for right, now in zip(wanted, moments(model, shown, layers, run), strict=True)
                    ]
                    optimizer.zero_grad()
                    (2 * torch.cat(terms).mean()).backward()
                    optimizer.step()
                    run.examples_seen += len(batch.labels)
                    advance()
        return model


def moments(model: nn.Module, inputs: Inputs, layers: list[_BatchNorm], run: Run) -> list[tuple[Tensor, Tensor]]:
    """Returns mean and variance over one batch of each output channel of each layer, (channels,) each."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(layer: nn.Module, _args: object, output: Tensor) -> None:
        values = output.transpose(0, 1).flatten(1)  # (channels, batch * positions)
        values = values if values.dtype == torch.float64 else values.float()
        seen[layer] = values.mean(dim=1), values.var(dim=1, correction=0) + 1e-5

    hooks = [layer.register_forward_hook(note) for layer in layers]
    with removing(hooks), run.arithmetic.autocast():
        logits(model, inputs)
    return [seen[layer] for layer in layers if layer in seen]


def divergence(right: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> Tensor:
    """Returns KL(N(right) || N(now)) of normal distributions, given as mean and variance, channel by channel."""
    ratio = right[1] / now[1]
    return (ratio + (right[0] - now[0]).square() / now[1] - 1 - ratio.log()) / 2
