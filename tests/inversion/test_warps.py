"""Warps: sizes by hand, a turn and a shift whose pictures are known, and the gradient of a small shift."""

import math

import pytest
import torch
from torch.nn import functional as F

from unbackdoor._inversion.warps import Warps, flows, grids
from unbackdoor.attacks.inverted import Inverted

SQUARE = Warps(flows(9, 9, control_points=4))


def weights(*affine: tuple[float, float, float]) -> torch.Tensor:
    """The free parameters of one warp that is affine: shift, and displacement at the edges along x and along y."""
    free = torch.zeros(1, 2, 3 + 16)
    free[0, :, :3] = torch.tensor(affine)
    return free


def test_the_size_is_the_root_mean_square_distance_in_pixels() -> None:
    shift = SQUARE.bounded(weights((3.0, 0.0, 0.0), (-4.0, 0.0, 0.0)))
    assert float(SQUARE.size(shift)) == pytest.approx(5)
    assert float(SQUARE.size(torch.zeros(1, 2, 9, 9))) == pytest.approx(0, abs=1e-5)


def test_a_shift_reads_pixels_from_the_right() -> None:
    pixels = torch.rand(2, 3, 9, 9)
    shifted = SQUARE.applied(SQUARE.bounded(weights((2.0, 0.0, 0.0), (0.0, 0.0, 0.0))), pixels)[0]
    assert torch.allclose(shifted[..., :7], pixels[..., 2:], atol=1e-5)
    assert torch.allclose(shifted[..., 7:], pixels[..., 8:].expand(-1, -1, -1, 2), atol=1e-5)  # those of the border


@pytest.mark.parametrize("degrees", [90, 25])
def test_a_turn_is_an_affine_warp(degrees: int) -> None:
    pixels = torch.rand(2, 1, 9, 9)
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    # A pixel at (x, y), in half sides of 4 pixels from the centre, is read from (cos x - sin y, sin x + cos y).
    turn = SQUARE.bounded(weights((0.0, 4 * (cosine - 1), -4 * sine), (0.0, 4 * sine, 4 * (cosine - 1))))
    turned = SQUARE.applied(turn, pixels)[0]
    matrix = torch.tensor([[cosine, -sine, 0], [sine, cosine, 0]]).expand(2, -1, -1)
    grid = F.affine_grid(matrix, [2, 1, 9, 9], align_corners=True)
    expected = F.grid_sample(pixels, grid, align_corners=True, padding_mode="border")
    assert torch.allclose(turned, expected, atol=1e-5)
    if degrees == 90:
        assert torch.allclose(turned, torch.rot90(pixels, dims=(2, 3)), atol=1e-4)


def test_flows_are_smooth_bumps_that_add_up_to_a_shift() -> None:
    bumps = flows(9, 7, control_points=4)[3:]
    assert bumps.shape == (16, 9, 7)
    assert torch.allclose(bumps.sum(dim=0), torch.ones(9, 7), atol=1e-5)
    assert bumps[0, 0, 0] == pytest.approx(1)  # a control point in the corner


def test_the_replayed_trigger_is_the_one_that_was_searched() -> None:
    family = Warps(flows(6, 8, control_points=3))
    displacements = family.bounded(torch.randn(2, 2, 3 + 9))
    pixels = torch.rand(4, 3, 6, 8)
    replayed = Inverted(family="warp").apply(pixels, {"grid": grids(displacements)[1]})
    assert torch.allclose(family.applied(displacements, pixels)[1], replayed, atol=1e-6)


def test_the_gradient_follows_the_slope_of_a_picture() -> None:
    # Brightness rises by 0.1 per pixel from left to right: each pixel of shift raises all inner pixels by 0.1.
    pixels = (0.1 * torch.arange(9.0)).expand(1, 1, 9, 9)
    free = weights((0.5, 0.0, 0.0), (0.5, 0.0, 0.0)).requires_grad_(True)
    SQUARE.applied(SQUARE.bounded(free), pixels)[..., :8].sum().backward()
    assert free.grad is not None
    assert float(free.grad[0, 0, 0]) == pytest.approx(0.1 * 9 * 8, rel=1e-4)
    assert float(free.grad[0, 1, 0]) == pytest.approx(0, abs=1e-4)
