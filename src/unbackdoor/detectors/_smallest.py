"""From the smallest trigger of each class to a finding: what all detectors share that search pixels."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._inversion.smallest import SmallestTriggers, TriggerFamily
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor.attacks.inverted import Family, Inverted, shuffled


def finding(
    triggers: SmallestTriggers,
    family: TriggerFamily,
    kind: Family,
    arrays: Callable[[Tensor], dict[str, Tensor]],
    generator: torch.Generator,
    unit: str,
) -> Finding:
    """A finding whose strengths are minus the logarithms of sizes.

    Args:
        triggers: of all classes.
        family: that they belong to.
        kind: how `Inverted` puts them on.
        arrays: of `Inverted`, from the parameters of one trigger.
        generator: of the random triggers.
        unit: of the sizes.
    """
    candidates = []
    for target, size in enumerate(comparable_sizes(triggers, family).tolist()):
        attack = Inverted(family=kind, target=target)
        parts = {name: part.detach().cpu().float() for name, part in arrays(triggers.parameters[target]).items()}
        candidates.append(
            Candidate(
                target=target,
                strength=-math.log(max(size, 1e-6)),
                size=size,
                trigger=Trigger(attack, parts),
                control=Trigger(attack, shuffled(kind, parts, generator)),
            )
        )
    return Finding(candidates=tuple(candidates), unit=unit)


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
