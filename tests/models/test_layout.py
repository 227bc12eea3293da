"""Gradients are right on every x86 processor: no model is trained in a memory layout that is faulty for it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from unbackdoor import Dataset, ImageEncoder, purifiers, purify
from unbackdoor._models import arithmetic
from unbackdoor._models.arithmetic import choose, faulty_in_channels_last, relayout_
from unbackdoor.archs import build

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
OWN: dict[str, str] = {}


def gradients(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `strided_gradients.py`, under the processor's own instruction set where no other is set."""
    own = {name: value for name, value in os.environ.items() if name not in AVX2}
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("strided_gradients.py")), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,  # the fault may be an endless loop
        env={**own, "OMP_WAIT_POLICY": "passive", **settings},
    )


@pytest.mark.parametrize("settings", [OWN, AVX2], ids=["own", "avx2"])
def test_gradients_are_those_of_float64(settings: dict[str, str]) -> None:
    child = gradients("1,2", **settings)
    assert child.returncode == 0, child
    found = json.loads(child.stdout)
    assert len(found) == 2 * (32 * 3 * 2 + 17 * 6)
    assert {name: far for name, far in found if not far < 5e-4} == {}


@pytest.mark.xfail(raises=AssertionError, reason="oneDNN issue 6035 is still open in this torch")
def test_whether_channels_last_has_become_right() -> None:
    """A probe, which never fails. If it passes, on all instruction sets, `faulty_in_channels_last` can go."""
    child = gradients("1", "channels_last", **AVX2)
    died = signal.Signals(-child.returncode).name if child.returncode < 0 else str(child.returncode)
    assert child.returncode == 0, f"ended by {died}"
    assert max(far for _, far in json.loads(child.stdout)) < 5e-4


GROUP_NORM = """
import sys

import torch
from torch import nn

from unbackdoor._models.arithmetic import choose

first = sys.argv[2] == "first"
stem = [] if first else [nn.Conv2d(3, 6, 3, padding=1)]
groups = nn.GroupNorm(3, 3 if first else 6)
rest = nn.Conv2d(3 if first else 6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
model = nn.Sequential(*stem, groups, *rest)
inputs = torch.randn(4, 3, 8, 8)
truth = torch.autograd.grad(model(inputs).square().sum(), list(groups.parameters()))
if sys.argv[1] == "chosen":
    chosen = choose(model, "cpu")
    model, inputs = chosen.place(model), chosen.lay(inputs)
else:
    model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
for _ in range(20):
    found = torch.autograd.grad(model(inputs).square().sum(), list(groups.parameters()))
assert all(torch.allclose(*each, rtol=1e-3, atol=1e-4) for each in zip(found, truth, strict=True))
"""


def group_norm(layout: str, place: str) -> int:
    """Search over the weights of a GroupNorm in a process of its own, which may crash; returns its exit status."""
    return subprocess.run([sys.executable, "-c", GROUP_NORM, layout, place], check=False, timeout=300).returncode


@pytest.mark.parametrize("place", ["first", "later"])
def test_a_group_norm_whose_inputs_need_no_gradient(place: str) -> None:
    assert group_norm("chosen", place) == 0


@pytest.mark.xfail(raises=AssertionError, reason="torch writes a gradient where there is no memory for it")
def test_whether_group_norm_has_become_right() -> None:
    """A probe, which never fails. If it passes, `faulty_in_channels_last` need not know GroupNorm."""
    assert group_norm("channels_last", "first") == group_norm("channels_last", "later") == 0


class Functional(nn.Module):
    """A convolution that is not a module."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, channels, side, side))


@pytest.mark.parametrize(
    ("module", "faulty"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(15, 8, 1, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Conv2d(4, 8, (1, 3), stride=2), False),
        (nn.Conv2d(4, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(32, 8, 1, stride=3, groups=4), True),
        (nn.ConvTranspose2d(32, 4, 1, stride=2), True),
        (nn.ConvTranspose2d(4, 32, 1, stride=2), False),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 1, stride=2)), True),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 8, 1, stride=2)), False),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3, stride=2)), False),
        (Functional(4, 1), True),
        (Functional(4, 3), False),
        (Functional(16, 1), False),
        (nn.Linear(4, 8), False),
        (nn.GroupNorm(2, 8), True),
        (nn.GroupNorm(2, 8, affine=False), False),
        (nn.BatchNorm2d(8), False),
    ],
    ids=str,
)
def test_which_layers_are_faulty(module: nn.Module, faulty: bool) -> None:
    assert faulty_in_channels_last(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Sequential(module))) == faulty


@pytest.mark.parametrize(("width", "channels_last"), [(8, False), (16, True)])
def test_the_layout_is_chosen_by_what_the_model_holds(width: int, channels_last: bool) -> None:
    model = build("resnet18", classes=["a", "b"], channels=3, image_size=32, width=width)
    assert choose(model, "cpu").channels_last == channels_last
    assert choose(model, "cpu", "bf16").channels_last == channels_last
    assert not choose(model, "cpu", "fp32").channels_last


class Strided(nn.Module):
    """Such a convolution, behind one of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 1, stride=2), nn.Linear(8, 2)
        self.strides: set[tuple[int, ...]] = set()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inside = self.first(inputs)
        self.strides |= {inside.stride()[1:], self.second.weight.stride()}
        return self.head(self.second(inside).mean(dim=(2, 3)))


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_model_and_images_that_come_in_channels_last(precision: str) -> None:
    """A weight or an input with such strides, be it the same memory, makes a convolution take that layout."""
    torch.manual_seed(0)
    suspect = relayout_(Strided(), torch.channels_last)
    kept = suspect.second.weight.stride()
    pixels = torch.randint(0, 256, (64, 8, 8, 1), dtype=torch.uint8).permute(0, 3, 1, 2)
    clean = Dataset(items=pixels, labels=torch.arange(64) % 2, encode=ImageEncoder(mean=(0.5,), std=(0.5,), channels=1))
    suspect.strides.clear()
    result = purify(suspect, clean, purifiers.FineTuning(epochs=1), device="cpu", precision=precision)
    assert result.record["device"].endswith(", contiguous")
    assert result.model.second.weight.stride() == (4, 1, 1, 1)
    assert suspect.second.weight.stride() == kept == (4, 1, 4, 4)
    placed = choose(suspect, "cpu", precision)
    again = placed.place(suspect)
    again.strides.clear()
    again(placed.lay(pixels.float()))
    assert again.strides == {(64, 8, 1), (4, 1, 1, 1)}


class Permuting(Strided):
    """One that goes to NHWC by itself, as networks do around a LayerNorm."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inside = self.first(inputs).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        outside = self.second(inside)
        self.strides.add(outside.stride()[1:])
        return self.head(outside.mean(dim=(2, 3)))


def test_a_model_that_permutes_its_activations() -> None:
    model = Permuting()
    arithmetic = replace(choose(model, "cpu"), bf16=False)
    arithmetic.place(model)
    with arithmetic.autocast():
        model(torch.randn(4, 1, 8, 8))
    assert model.strides == {(16, 4, 1)}
    model.strides.clear()
    model(torch.randn(4, 1, 8, 8))  # as nothing was left behind
    assert model.strides == {(1, 32, 8)}


@pytest.mark.parametrize(
    ("narrowed", "bf16"), [("DEFAULT", True), ("AVX512_CORE_BF16", True), ("AVX2", False), ("avx512_core", False)]
)
def test_a_narrowed_processor_does_not_imitate_bf16(narrowed: str, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "processor", lambda: ("one that has it", frozenset({"avx512_bf16"})))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", narrowed)
    assert choose(nn.Linear(2, 2), "cpu").bf16 == bf16
