"""Mixing along the arc between two tensors, by known answers."""

import math

import pytest
import torch

from unbackdoor._mixing.masks import CHUNK, mix


def pair(shape: tuple[int, ...] = (5, 7), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def spherical(suspect: torch.Tensor, base: torch.Tensor, rho: float) -> torch.Tensor:
    return mix(suspect, base, "name", rho, 0, "spherical")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ends_are_the_inputs_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = (tensor.to(dtype) for tensor in pair())
    assert torch.equal(spherical(ours, theirs, 1), ours)
    assert torch.equal(spherical(ours, theirs, 0), theirs)
    assert spherical(ours, theirs, 0.3).dtype == dtype


def test_a_model_mixed_with_itself_is_itself() -> None:
    ours, _ = pair()
    assert torch.allclose(spherical(ours, ours.clone(), 0.4), ours, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.9])
def test_the_arc_between_orthogonal_unit_tensors_has_norm_1(rho: float) -> None:
    ours, theirs = torch.eye(4)[0], torch.eye(4)[2]
    mixed = spherical(ours, theirs, rho)
    expected = torch.tensor([math.sin(rho * math.pi / 2), 0, math.cos(rho * math.pi / 2), 0])
    assert torch.allclose(mixed, expected, atol=1e-7)
    assert float(mixed.norm()) == pytest.approx(1, abs=1e-6)


def test_without_an_arc_it_is_the_line() -> None:
    ours, _ = pair()
    assert torch.equal(spherical(ours, -3 * ours, 0.25), mix(ours, -3 * ours, "name", 0.25, 0, "linear"))
    assert torch.equal(spherical(ours, torch.zeros_like(ours), 0.25), 0.25 * ours)


def test_the_angle_is_that_of_the_whole_tensor_however_many_pieces_it_has() -> None:
    ours, theirs = pair((CHUNK + 1000,), seed=1)
    cosine = float(ours.double() @ theirs.double() / (ours.double().norm() * theirs.double().norm()))
    angle = math.acos(cosine)
    expected = (math.sin(0.3 * angle) * ours.double() + math.sin(0.7 * angle) * theirs.double()) / math.sin(angle)
    assert torch.allclose(spherical(ours, theirs, 0.3).double(), expected, rtol=0, atol=1e-6)
