"""From the smallest trigger of each class to a finding: what all detectors share that search pixels."""

import math

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._inversion.smallest import SmallestSearch, SmallestTriggers, TriggerFamily
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._purification.run import Run
from unbackdoor.attacks.inverted import Inverted, shuffled


def smallest_of_each_class(search: SmallestSearch, model: nn.Module, clean: Dataset, run: Run) -> Finding:
    """A finding with the smallest trigger of each class; strengths are minus the logarithms of sizes.

    Args:
        search: of the triggers.
        model: the suspect.
        clean: images.
        run: arithmetic, randomness, progress.
    """
    triggers = search(model, clean, run)
    candidates = []
    for target, size in enumerate(comparable_sizes(triggers, search.family).tolist()):
        trigger, control = with_control(search.family, triggers.parameters[target], target, (), run.generator)
        strength = -math.log(max(size, 1e-6))
        candidates.append(Candidate(target=target, strength=strength, size=size, trigger=trigger, control=control))
    return Finding(candidates=tuple(candidates), unit=search.family.unit(clean.shape))


def with_control(
    family: TriggerFamily, parameters: Tensor, target: int, sources: tuple[int, ...], generator: torch.Generator
) -> tuple[Trigger, Trigger]:
    """A trigger that was found, and a random one of the same size.

    Args:
        family: of the trigger.
        parameters: of the trigger, (...).
        target: the class that it leads to.
        sources: the only classes that it moves; empty for all.
        generator: of the random trigger.
    """
    attack = Inverted(family=family.kind, target=target, sources=sources)
    arrays = family.arrays(parameters.detach().cpu().float())
    return Trigger(attack, arrays), Trigger(attack, shuffled(family.kind, arrays, generator))


def comparable_sizes(triggers: SmallestTriggers, family: TriggerFamily) -> Tensor:
    """The sizes of triggers, (triggers,), where one without success has at least the size of the largest with success.

    Its latest parameters say little: they may be as small as those that the search started from.

    Args:
        triggers: of all classes or pairs.
        family: that they belong to.
    """
    latest = family.size(triggers.parameters)
    reached = triggers.sizes.isfinite()
    largest = triggers.sizes[reached].max() if bool(reached.any()) else latest.max()
    return torch.where(reached, triggers.sizes, torch.maximum(latest, largest))
