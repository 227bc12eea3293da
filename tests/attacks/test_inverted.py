"""Random triggers of the same size as a found one: what they keep, by hand."""

import torch

from unbackdoor._inversion.warps import Warps, grids
from unbackdoor.attacks.inverted import Inverted, shuffled


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_random_patch_keeps_the_mask() -> None:
    arrays = {"mask": torch.rand(1, 4, 6), "pattern": torch.zeros(3, 4, 6)}
    random = shuffled("patch", arrays, generator())
    assert torch.equal(random["mask"], arrays["mask"])
    assert float(random["pattern"].std()) > 0.2


def test_a_random_pattern_has_the_same_pixels_elsewhere() -> None:
    pattern = torch.arange(24.0).view(1, 4, 6).expand(3, 4, 6) / 255
    random = shuffled("pattern", {"pattern": pattern}, generator())["pattern"]
    assert torch.equal(random.flatten().sort().values, pattern.flatten().sort().values)
    assert torch.equal(random[0], random[1]), "the channels of a pixel stay together"
    assert not torch.equal(random, pattern)


def test_a_random_warp_moves_each_pixel_as_far_also_on_pictures_that_are_not_square() -> None:
    displacements = torch.randn(1, 2, 5, 9, generator=generator())
    found = grids(displacements)[0]
    random = shuffled("warp", {"grid": found}, generator())["grid"]
    still = grids(torch.zeros_like(displacements))[0]
    pixels = torch.tensor([8 / 2, 4 / 2])  # of a unit of the grid: 9 columns and 5 rows lie from -1 to 1
    distances = [((grid - still) * pixels).norm(dim=-1) for grid in (found, random)]
    assert torch.allclose(distances[0], distances[1], atol=1e-5)
    assert torch.allclose(distances[0], displacements[0].norm(dim=0), atol=1e-5)
    assert float((random - found).abs().max()) > 0.1


def test_a_family_replays_its_triggers_through_the_attack() -> None:
    family = Warps.smooth((3, 6, 8), control_points=3)
    free = family.start(2, (3, 6, 8), generator(), torch.float32)
    parameters = family.bounded(30 * free)
    pixels = torch.rand(4, 3, 6, 8, generator=generator())
    replayed = Inverted(family=family.kind).apply(pixels, family.arrays(parameters[1]))
    assert torch.allclose(replayed, family.applied(parameters, pixels)[1], atol=1e-5)
