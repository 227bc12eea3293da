"""A perturbation that sends all examples to one class: a stand-in for a trigger that nobody has."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models import evaluating, perturbed_logits
from unbackdoor._purify import Run


class StandIn(NamedTuple):
    """A reversed trigger.

    Args:
        target: the class that it leads to.
        perturbation: added to what the model sees, (1, channels, height, width).
        success: share of the examples of other classes that it sends there.
    """

    target: int
    perturbation: Tensor
    success: float


def stand_in(model: nn.Module, clean: Dataset, run: Run, method: object, *, steps: int, size: int = 32) -> StandIn:
    """The class that a perturbation common to all examples reaches at the least cost, and that perturbation.

    For every class t at once, Adam minimises mean CE(f(x + d_t), t) + weight * |d_t| over clean batches, with |.| the
    Euclidean norm over the square root of the number of pixels. A backdoor is a shortcut into its class, so the
    shortest perturbation among those that succeed leads to the attacker's class more often than not; a method that uses
    it must also be harmless where it does not.

    Args:
        model: in any mode; looked at in eval mode, and left without gradients.
        clean: images without a trigger.
        run: randomness, arithmetic, progress.
        method: named in the refusal.
        steps: of the search.
        size: examples per step and class.

    Raises:
        UnbackdoorError: the examples are texts.
    """
    if clean.modality == "text":
        owner, reader = type(method).__name__, type(model).__name__
        raise UnbackdoorError(f"{owner} reverses a trigger on pixels; {reader} reads text. Try fine-pruning.")
    example = next(clean.batches(1)).inputs
    assert isinstance(example, Tensor)
    classes = run.head(model).out_features
    found = torch.zeros((classes, *example.shape[1:]), device=example.device, dtype=run.arithmetic.dtype)
    found.requires_grad_(True)  # (classes, channels, height, width)
    optimizer = torch.optim.Adam([found], lr=0.05)
    targets = torch.arange(classes, device=example.device)
    hits = torch.zeros(classes, device=example.device)
    tried = torch.zeros(classes, device=example.device)
    last = max(1, steps // 5)
    with evaluating(model), run.progress("reversing a trigger", steps) as advance:
        for step, batch in enumerate(itertools.islice(_forever(clean, size, run.generator), steps)):
            inputs = run.arithmetic.lay(batch.inputs)
            assert isinstance(inputs, Tensor)
            many = inputs.repeat(classes, 1, 1, 1)  # (classes * batch, channels, height, width)
            added = found.repeat_interleave(len(inputs), dim=0)  # the same shape
            with run.arithmetic.autocast():
                scores = perturbed_logits(model, many, added)
            wanted = targets.repeat_interleave(len(inputs))
            cost = found.flatten(1).square().mean(dim=1).add(1e-12).sqrt()  # (classes,)
            value = F.cross_entropy(scores.to(found.dtype), wanted, reduction="sum") / len(inputs) + cost.sum()
            optimizer.zero_grad()
            value.backward(inputs=[found])
            optimizer.step()
            if step >= steps - last:
                other = (batch.labels[None] != targets[:, None]).float()  # (classes, batch)
                there = (scores.argmax(dim=1) == wanted).reshape(classes, -1)
                hits += (there * other).sum(dim=1)
                tried += other.sum(dim=1)
            run.examples_seen += len(many)
            advance()
    success = hits / tried.clamp(min=1)
    cost = found.detach().flatten(1).square().mean(dim=1).sqrt() / success.clamp(min=1e-6)
    target = int(cost.argmin())
    return StandIn(target, found.detach()[target : target + 1].clone(), float(success[target]))


def _forever(clean: Dataset, size: int, generator: torch.Generator) -> Iterator[Batch]:
    while True:
        yield from clean.batches(size, generator=generator)


@torch.no_grad()
def success_of(found: StandIn, model: nn.Module, clean: Dataset, run: Run) -> float:
    """The share of the examples of other classes that a stand-in sends to its class."""
    hits = tried = 0
    with evaluating(model):
        for batch in clean.batches(run.arithmetic.evaluation_batch):
            with run.arithmetic.autocast():
                scores = perturbed_logits(model, run.arithmetic.lay(batch.inputs), found.perturbation)
            other = batch.labels != found.target
            hits += int((scores.argmax(dim=1)[other] == found.target).sum())
            tried += int(other.sum())
    return hits / max(1, tried)
