"""Triggers that move a model and not a reference, on networks whose shortcuts are known."""

import pytest
import torch
from torch import Tensor, nn

import toys
from fixtures import Pixels
from unbackdoor import Dataset
from unbackdoor._inversion.contrast import Contrast, moved_apart, one_each
from unbackdoor._inversion.masks import MaskedPatch
from unbackdoor._inversion.smallest import SmallestSearch
from unbackdoor._purification.run import Run

NATURAL, PLANTED = 5, 10  # pixels of 16


SUSPECT, REFERENCE = {NATURAL: 12.0, PLANTED: 8.0}, {NATURAL: 12.0}


def a_run(model: nn.Module) -> Run:
    return toys.a_run(model=model, head_name="head")


def pictures() -> Dataset:
    """Eight black pictures of class 0, and eight of class 1 with the natural pixel white."""
    pixels = torch.zeros(16, 1, 16, dtype=torch.uint8)
    pixels[8:, :, NATURAL] = 255
    return Dataset(items=pixels.view(16, 1, 4, 4), labels=torch.arange(16) // 8)


@pytest.mark.parametrize(("with_reference", "place"), [(False, NATURAL), (True, PLANTED)])
def test_with_a_reference_the_search_leaves_the_natural_pixel_alone(with_reference: bool, place: int) -> None:
    """Alone, the pixel with the larger weight is the smaller trigger; it moves the reference as well."""
    model, reference = Pixels(SUSPECT), Pixels(REFERENCE).requires_grad_(False)
    search = SmallestSearch(
        family=MaskedPatch(), steps=80, batch_size=16, cost=0.1, success=0.9, patience=5, learning_rate=0.1
    )
    found = search(model, pictures(), a_run(model), reference=reference if with_reference else None)
    mask = found.parameters[1, 0].flatten()
    assert int(mask.argmax()) == place
    assert found.sizes[1].isfinite()


def test_only_examples_that_leave_the_reference_behind_count() -> None:
    """The planted pixel moves the eight black pictures; the others are of the target class."""
    model = Pixels(SUSPECT)

    def planted(pixels: Tensor) -> Tensor:
        changed = pixels.clone()
        changed.view(len(pixels), -1)[:, PLANTED] = 1
        return changed

    def share(reference: nn.Module | None) -> float:
        return moved_apart(model, reference, planted, 1, pictures(), a_run(model))

    assert share(Pixels(REFERENCE)) == 1.0
    assert share(Pixels(SUSPECT)) == 0.0  # it follows
    assert share(None) == 1.0
    assert moved_apart(model, Pixels(REFERENCE), lambda pixels: pixels, 1, pictures(), a_run(model)) == 0.0


def test_each_example_gets_one_trigger_and_kinds_are_equally_likely() -> None:
    """A warp alone of its kind comes as often as three patches together."""

    def adding(step: float) -> Contrast:
        kind = "warp" if step == 8 else "patch"
        return Contrast(kind=kind, target=0, moved=1.0, size=1.0, trigger=lambda pixels: pixels + step)

    found = [adding(step) for step in (1.0, 2.0, 4.0, 8.0)]
    shown = one_each(found, torch.Generator().manual_seed(0))(torch.zeros(600, 1, 2, 2))
    kinds, counts = shown.flatten(1).unique(dim=0, return_counts=True)
    assert kinds.tolist() == [[step] * 4 for step in (1.0, 2.0, 4.0, 8.0)]
    assert counts.tolist() == pytest.approx([100, 100, 100, 300], abs=45)  # four standard deviations
