"""Triggers that move a model and leave a reference where it is, and the share of unseen examples that proves it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.masks import MaskedPatch
from unbackdoor._inversion.patterns import AdditivePattern
from unbackdoor._inversion.search import frozen
from unbackdoor._inversion.smallest import SmallestSearch, TriggerFamily
from unbackdoor._inversion.triggers import InvertedTrigger, encoded, in_pixels
from unbackdoor._inversion.warps import Warps
from unbackdoor._purification.run import Run


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A trigger that moves a model and not the reference.

    Args:
        kind: of trigger.
        target: the class that it moves examples to.
        moved: the share of unseen examples that it moves in the model and not in the reference.
        size: in the unit of its family.
        trigger: puts it on pixels.
    """

    kind: str
    target: int
    moved: float
    size: float
    trigger: InvertedTrigger


def searches(shape: tuple[int, ...], steps: int) -> Mapping[str, SmallestSearch]:
    """Returns a search for each kind of trigger that is known here, by name.

    Args:
        shape: of a picture, (channels, height, width).
        steps: of each search.
    """

    def search(family: TriggerFamily, cost: float, learning_rate: float) -> SmallestSearch:
        return SmallestSearch(
            family=family,
            steps=steps,
            batch_size=32,
            cost=cost,
            success=0.9,
            patience=5,
            learning_rate=learning_rate,
        )

    return {
        "patch": search(MaskedPatch(), 1e-3, 0.1),
        "pattern": search(AdditivePattern.free(shape), 1e-2, 0.02),
        "low-frequency pattern": search(AdditivePattern.of_low_frequency(shape, 0.25), 1e-2, 0.02),
        "warp": search(Warps.smooth(shape, 4), 1e-1, 0.3),
    }


def contrasts(
    model: nn.Module,
    reference: nn.Module | None,
    searched: Dataset,
    held: Dataset,
    run: Run,
    *,
    steps: int,
    least: float,
) -> list[Contrast]:
    """Returns the triggers that move the model and not the reference, of each kind the small ones.

    A trigger more than twice as large as the smallest of its kind says more of what any model does than of this one.

    Args:
        model: in its present state.
        reference: in eval mode and without gradients of its own; None searches for what moves the model.
        searched: images to search on.
        held: others, to judge on.
        run: of the purification.
        steps: of each search.
        least: share of the unseen examples that a trigger must move.
    """
    contrasts = []
    for kind, search in searches(searched.shape, steps).items():
        triggers = search(model, searched, run, reference=reference)
        proven = []
        for target, size in enumerate(search.family.size(triggers.parameters).tolist()):
            trigger = _applying(search.family, triggers.parameters[target : target + 1])
            moved = moved_apart(model, reference, trigger, target, held, run)
            if moved >= least:
                proven.append(Contrast(kind=kind, target=target, moved=moved, size=size, trigger=trigger))
        contrasts += [each for each in proven if each.size <= 2 * min(other.size for other in proven)]
    return contrasts


def _applying(family: TriggerFamily, parameters: Tensor) -> InvertedTrigger:
    return lambda pixels: family.applied(parameters, pixels)[0]


@torch.no_grad()
def moved_apart(
    model: nn.Module, reference: nn.Module | None, trigger: InvertedTrigger, target: int, data: Dataset, run: Run
) -> float:
    """Returns the share of other classes' examples that a trigger moves to its target in the model alone.

    Without a reference it is the share that it moves in the model.
    """
    moved = count = 0
    with frozen(model):
        for batch in in_pixels(data, augmented=False).batches(run.arithmetic.evaluation_batch):
            plain, shown = (encoded(data, pixels, run) for pixels in (batch.pixels, trigger(batch.pixels)))
            before, after = (run.scores(model, inputs).argmax(dim=1) for inputs in (plain, shown))
            others = (batch.labels != target) & (before != target)
            alone = after == target
            if reference is not None:
                alone &= run.scores(reference, shown).argmax(dim=1) != target
            moved += int((others & alone).sum())
            count += int(others.sum())
    return moved / max(1, count)


def one_each(choices: Sequence[Contrast], generator: torch.Generator) -> InvertedTrigger:
    """Returns a trigger that puts one of several on each example: a kind is drawn, and then one of that kind."""
    kinds = sorted({each.kind for each in choices})
    of_kind = [[place for place, each in enumerate(choices) if each.kind == kind] for kind in kinds]

    def drawn(pixels: Tensor) -> Tensor:
        kind, place = (torch.rand(2, len(pixels), generator=generator)).tolist()
        rows_of: dict[int, list[int]] = {}
        for row in range(len(pixels)):
            places = of_kind[int(kind[row] * len(of_kind))]
            rows_of.setdefault(places[int(place[row] * len(places))], []).append(row)
        shown = pixels.clone()
        for chosen, rows in rows_of.items():
            shown[rows] = choices[chosen].trigger(pixels[rows]).to(pixels.dtype)
        return shown

    return drawn
