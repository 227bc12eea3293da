"""Triggers that follow a model, on networks whose shortcuts are known."""

import pytest
import torch
from torch import nn

import toys
from fixtures import Pixels
from unbackdoor import Dataset
from unbackdoor._inversion import pursuit
from unbackdoor._inversion.masks import MaskedPatch
from unbackdoor._inversion.patterns import AdditivePattern
from unbackdoor._inversion.pursuit import GROWTH, Follower, followers
from unbackdoor._inversion.smallest import SmallestSearch, SmallestTriggers, TriggerFamily
from unbackdoor._inversion.warps import Warps

SHAPE = (3, 8, 8)
FAMILIES: dict[str, TriggerFamily] = {
    "patch": MaskedPatch(),
    "pattern": AdditivePattern.free(SHAPE),
    "low-frequency pattern": AdditivePattern.of_low_frequency(SHAPE, 0.25),
    "warp": Warps.smooth(SHAPE, 4),
}


def black() -> Dataset:
    """Sixteen black pictures of class 0."""
    return Dataset(items=torch.zeros(16, 1, 4, 4, dtype=torch.uint8), labels=torch.zeros(16, dtype=torch.long))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_shrunk_trigger_has_the_size_that_was_asked_for(kind: str) -> None:
    family = FAMILIES[kind]
    free = 2 * family.start(3, SHAPE, torch.Generator().manual_seed(0), torch.float32)
    smaller = family.bounded(family.shrunk(free, 0.25))
    assert torch.allclose(family.size(smaller), family.size(family.bounded(free)) / 4, rtol=1e-2)
    if kind == "patch":  # the pattern under the mask stays
        assert torch.allclose(smaller[:, 1:], family.bounded(free)[:, 1:], atol=1e-5)


def test_a_search_can_go_on_from_its_free_parameters() -> None:
    model = Pixels({5: 12.0})
    search = SmallestSearch(
        family=MaskedPatch(), steps=30, batch_size=16, cost=0.1, success=0.9, patience=5, learning_rate=0.1
    )
    found = search(model, black(), toys.a_run(model=model, head_name="head"))
    assert torch.equal(search.family.bounded(found.free), found.parameters)
    assert torch.allclose(search.family.size(found.parameters)[1], found.sizes[1])


def test_a_trigger_follows_the_model_and_grows_no_larger_than_it_may() -> None:
    """The pixel that it was found for no longer counts, another one does."""
    family = MaskedPatch()
    parameters = torch.full((1, 2, 4, 4), 0.05)
    parameters[0, :, 1, 1] = 0.95
    found = (2 * parameters - 1).atanh()
    size = float(family.size(parameters))
    follower = Follower(kind="patch", family=family, target=1, found=found, size=size, learning_rate=0.1)
    model, clean = Pixels({10: 12.0}), black()
    run, pixels = toys.a_run(model=model, head_name="head"), torch.zeros(16, 1, 4, 4)
    assert int((model(follower.shown(pixels)).argmax(dim=1) == 1).sum()) == 0
    for _ in range(60):
        follower.step_(model, pixels, clean, run)
        assert float(family.size(family.bounded(follower.free.detach()))) <= GROWTH * size * 1.01
    assert int((model(follower.shown(pixels)).argmax(dim=1) == 1).sum()) == 16
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"patch": [9, 2, 9, 9, 9, 9], "pattern": [3, 4, 5, 5, 3, 9]}, [("patch", 1)]),
        ({"patch": [9, 2, 4, 9, 9, 9], "pattern": [9, 9, 9, 4, 9, 9]}, [("patch", 1), ("patch", 2), ("pattern", 3)]),
        ({"patch": [9, 2, 9, 9, 9, 9], "pattern": [9, 4, 5, 9, 9, 9]}, [("patch", 1), ("pattern", 1)]),
        ({"patch": [3, 2, 4, 9, 9, 9], "pattern": [torch.inf] * 6}, []),
        ({"patch": [torch.inf] * 6}, []),
    ],
    ids=["a natural kind is left out", "two kinds stand out", "two kinds agree", "none stands out", "none was found"],
)
def test_which_triggers_are_taken(
    sizes: dict[str, list[float]], expected: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice as large as the smallest of a kind, and to at most two of the six classes that most kinds name."""

    class Known:
        family, learning_rate = MaskedPatch(), 0.1

        def __init__(self, each: list[float]) -> None:
            self.each = each

        def __call__(self, *_: object) -> SmallestTriggers:
            return SmallestTriggers(torch.zeros(6, 2, 4, 4), torch.tensor(self.each), torch.zeros(6, 2, 4, 4))

    monkeypatch.setattr(pursuit, "searches", lambda *_: {kind: Known(each) for kind, each in sizes.items()})
    monkeypatch.setattr(pursuit, "KINDS", tuple(sizes))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
    run = toys.a_run(model=model, head_name="1")
    kinds = followers(model, black(), run, steps=1)
    assert [(each.kind, each.target) for kind in kinds for each in kind] == expected
