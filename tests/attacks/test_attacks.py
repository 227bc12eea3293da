"""Each trigger by hand, by its formula, or against a second implementation."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures import SmallCNN
from pictures import write_pictures
from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, attacks, evaluate, poison
from unbackdoor._models.calling import logits
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import triggered

SHAPES = [(1, 8, 8), (3, 32, 32), (3, 12, 20), (1, 28, 17), (3, 224, 224)]

datasets.disable_progress_bars()


def noise(shape: tuple[int, int, int], count: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Dataset(items=items, labels=torch.arange(count) % 2, name="d.parquet")


def stamp(attack, data: Dataset) -> np.ndarray:
    before = data.items.clone()
    made = Trigger.of(attack, data).stamp(data.items)
    assert torch.equal(data.items, before)
    return made.numpy()


def rounded(pixels: np.ndarray) -> np.ndarray:
    """8 bits of float64 pixels in [0, 255]."""
    return np.clip(np.rint(pixels), 0, 255)


def refusal(function: object, *args: object, **options: object) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        function(*args, **options)
    return str(caught.value)


def write_picture(path: Path, array: np.ndarray) -> str:
    Image.fromarray(array).save(path)
    return str(path)


# BadNets.


def test_a_checkerboard_in_the_corner_by_hand() -> None:
    grey = Dataset(items=torch.full((1, 1, 5, 6), 100, dtype=torch.uint8), labels=torch.tensor([0]))
    assert stamp(attacks.BadNets(), grey)[0, 0].tolist() == [
        [100, 100, 100, 100, 100, 100],
        [100, 100, 255, 0, 255, 100],
        [100, 100, 0, 255, 0, 100],
        [100, 100, 255, 0, 255, 100],
        [100, 100, 100, 100, 100, 100],
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize(
    ("place", "corner"),
    [
        ("top-left", lambda h, w, m: (m, m)),
        ("top-right", lambda h, w, m: (m, w - 4 - m)),
        ("bottom-left", lambda h, w, m: (h - 4 - m, m)),
        ("bottom-right", lambda h, w, m: (h - 4 - m, w - 4 - m)),
        ("center", lambda h, w, m: ((h - 4) // 2, (w - 4) // 2)),
    ],
)
def test_a_solid_patch_at_each_place(shape: tuple[int, int, int], margin: int, place: str, corner) -> None:
    data = noise(shape)
    made = stamp(attacks.BadNets(pattern="solid", size=4, place=place, margin=margin), data)
    expected = data.items.numpy().copy()
    top, left = corner(*shape[1:], margin)
    for row in range(4):
        for column in range(4):
            expected[:, :, top + row, left + column] = 255
    assert np.array_equal(made, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_as_patch(tmp_path: Path, channels: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    array = array if channels == 3 else array[:, :, 0]
    attack = attacks.BadNets(pattern=write_picture(tmp_path / "patch.png", array), size=4, margin=0)
    data = noise((channels, 8, 9))
    made = stamp(attack, data)
    expected = data.items.numpy().copy()
    expected[:, :, 4:, 5:] = array.reshape(4, 4, channels).transpose(2, 0, 1)
    assert np.array_equal(made, expected)


def test_pictures_of_another_size_and_with_transparency(tmp_path: Path) -> None:
    half = np.zeros((6, 6, 4), dtype=np.uint8)
    half[:, 3:] = (10, 20, 30, 255)
    attack = attacks.BadNets(pattern=write_picture(tmp_path / "p.png", half), size=2, margin=0, place="top-left")
    patch = stamp(attack, noise((3, 8, 8)))[0, :, :2, :2].transpose(1, 2, 0)
    # Transparent is white, as in the data; the two halves meet between the pixels, and the filter reaches across.
    assert (patch[:, 0].astype(int) > 180).all()
    assert (patch[:, 1].astype(int) < 80).all()


def test_pictures_that_are_none(tmp_path: Path) -> None:
    data = noise((3, 8, 8))
    assert refusal(stamp, attacks.BadNets(pattern="chekerboard"), data) == (
        "BadNets.pattern must be checkerboard, solid or an image file, got chekerboard, which is neither."
    )
    (tmp_path / "p.png").write_text("no picture")
    assert refusal(stamp, attacks.Blended(pattern=str(tmp_path / "p.png")), data) == (
        f"Blended.pattern must be noise or an image file; {tmp_path}/p.png cannot be decoded."
    )


# Blended.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.05, 0.2, 1.0])
def test_blended_is_a_mixture(shape: tuple[int, int, int], ratio: float) -> None:
    data = noise(shape)
    pattern = torch.rand(shape, generator=torch.Generator().manual_seed(3)).double().numpy()
    expected = (1 - ratio) * data.items.double().numpy() + ratio * 255 * pattern
    made = stamp(attacks.Blended(ratio=ratio, pattern_seed=3), data).astype(float)
    sure = np.abs(expected % 1 - 0.5) > 1e-3  # not at the edge between two grey levels
    assert np.array_equal(made[sure], rounded(expected)[sure])
    assert np.abs(made - expected).max() <= 0.5 + 1e-3


def test_blended_rounds_to_the_nearest_grey_level(tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "p.png", np.full((2, 2), 200, dtype=np.uint8))
    items = torch.tensor([[[[0, 1], [2, 250]]]], dtype=torch.uint8)
    made = stamp(attacks.Blended(pattern=picture, ratio=0.2), Dataset(items=items, labels=torch.tensor([0])))
    assert made[0, 0].tolist() == [[40, 41], [42, 240]]  # 40, 40.8, 41.6, 240


def test_patterns_differ_by_seed_and_are_noise() -> None:
    shape = (3, 64, 64)
    first, second = (attacks.Blended(pattern_seed=seed).arrays(shape)["pattern"] for seed in (0, 1))
    assert not torch.equal(first, second)
    # Uniform on [0, 1): mean 1/2 and variance 1/12, of 12,288 draws.
    assert first.mean() == pytest.approx(0.5, abs=0.015)
    assert first.var() == pytest.approx(1 / 12, abs=0.005)


# SIG.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("delta", "frequency"), [(40, 6), (12.5, 2.5)])
def test_sig_adds_a_sinusoid(shape: tuple[int, int, int], delta: float, frequency: float) -> None:
    data = noise(shape)
    made = stamp(attacks.SIG(delta=delta, frequency=frequency), data)
    wave = np.array([delta * math.sin(2 * math.pi * column * frequency / shape[2]) for column in range(shape[2])])
    expected = data.items.numpy() + wave
    sure = np.abs(expected % 1 - 0.5) > 1e-3
    assert np.array_equal(made[sure], rounded(expected)[sure])


def test_sig_by_hand() -> None:
    flat = Dataset(items=torch.full((1, 1, 2, 4), 250, dtype=torch.uint8), labels=torch.tensor([0]))
    # One period over four columns: 0, 1, 0, -1 times the amplitude, cut off at 255.
    assert stamp(attacks.SIG(delta=40, frequency=1), flat)[0, 0].tolist() == [[250, 255, 250, 210]] * 2


# WaNet.


def bilinear(image: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Read an image (height, width) at (x, y) in [-1, 1], where -1 and 1 are the centres of the outer pixels."""
    height, width = image.shape
    made = np.zeros_like(image, dtype=float)
    for row in range(height):
        for column in range(width):
            x = (grid[row, column, 0] + 1) / 2 * (width - 1)
            y = (grid[row, column, 1] + 1) / 2 * (height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            right, below = x - left, y - top
            made[row, column] = (
                image[top, left] * (1 - right) * (1 - below)
                + image[top, left + 1] * right * (1 - below)
                + image[top + 1, left] * (1 - right) * below
                + image[top + 1, left + 1] * right * below
            )
    return made


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_wanet_is_a_bilinear_warp(shape: tuple[int, int, int]) -> None:
    data, attack = noise(shape, count=1), attacks.WaNet(strength=2.0)
    grid = attack.arrays(shape)["grid"].double().numpy()
    made = stamp(attack, data)[0]
    for channel in range(shape[0]):
        expected = bilinear(data.items[0, channel].double().numpy(), grid)
        assert np.abs(made[channel] - expected).max() < 0.5 + 0.02


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 12, 20)])
def test_the_warp_field_is_that_of_the_paper(shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    attack = attacks.WaNet(grid_size=4, strength=0.5, warp_seed=2)
    control = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(2)).numpy()[0] * 2 - 1
    control = control / np.abs(control).mean()
    grid = attack.arrays(shape)["grid"].numpy()
    assert grid.shape == (height, width, 2)
    assert np.abs(grid).max() <= 1
    # At the corners a bicubic field aligned with them is the control point itself.
    for row, column, y, x in ((0, 0, -1, -1), (0, -1, -1, 1), (-1, 0, 1, -1), (-1, -1, 1, 1)):
        expected_x = np.clip(x + 0.5 * control[0, row, column] / width, -1, 1)
        expected_y = np.clip(y + 0.5 * control[1, row, column] / height, -1, 1)
        assert grid[row, column] == pytest.approx([expected_x, expected_y], abs=1e-6)


def test_the_warp_field_inside_is_bicubic() -> None:
    # With as many pixels as control points the upsampling is the identity, so the field can be read off.
    control = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0)).numpy()[0] * 2 - 1
    control = control / np.abs(control).mean()
    grid = attacks.WaNet(grid_size=5, strength=0.5).arrays((1, 5, 5))["grid"].numpy()
    axis = np.linspace(-1, 1, 5)
    for row in range(5):
        for column in range(5):
            identity = np.array([axis[column], axis[row]])
            expected = np.clip(identity + 0.5 * control[:, row, column] / 5, -1, 1)
            assert grid[row, column] == pytest.approx(expected, abs=1e-6)


def test_a_picture_of_one_colour_cannot_be_warped() -> None:
    flat = Dataset(items=torch.full((1, 3, 32, 32), 77, dtype=torch.uint8), labels=torch.tensor([0]))
    assert (stamp(attacks.WaNet(strength=5), flat) == 77).all()


def test_cover_rows_are_warped_by_up_to_half_a_pixel_more() -> None:
    data = replace(noise((1, 16, 16), count=100), labels=torch.zeros(100, dtype=torch.int64))
    attack = attacks.WaNet(strength=2.0, target=1)
    made = poison(data, attack, rate=0.1, seed=0, classes=2)
    assert (len(made.rows), len(made.cover)) == (10, 20)
    assert made.data.labels[made.cover].tolist() == [0] * 20
    stamped = made.trigger.stamp(data.items)
    assert torch.equal(made.data.items[made.rows], stamped[made.rows])
    assert all(not torch.equal(made.data.items[row], stamped[row]) for row in made.cover)
    # On a ramp of 10 grey levels per pixel a shift of half a pixel is 5 grey levels; noise is at most that.
    ramp = torch.arange(16, dtype=torch.float32).mul(10).div(255).expand(50, 1, 16, 16)
    warped = attack.apply(ramp, made.trigger.arrays)
    covered = attack.cover(ramp, made.trigger.arrays, torch.Generator().manual_seed(0))
    shift = (covered - warped).abs() * 255 / 10
    assert shift.max() < 0.5
    assert shift.max() > 0.4
    assert not torch.equal(covered[0], covered[1])


def test_without_noise_mode_nothing_is_covered() -> None:
    assert len(poison(noise((1, 8, 8), 20), attacks.WaNet(cover_ratio=0), rate=0.5, seed=0, classes=2).cover) == 0


# Label-consistent.


@pytest.mark.parametrize("shape", SHAPES)
def test_patches_in_four_corners(shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    data = noise(shape)
    made = stamp(attacks.LabelConsistent(size=3), data)
    expected = data.items.numpy().astype(int)
    for row in range(3):
        for column in range(3):
            change = 255 if (row + column) % 2 == 0 else -255
            for top in (0, height - 3):
                for left in (0, width - 3):
                    expected[:, :, top + row, left + column] += change
    assert np.array_equal(made, np.clip(expected, 0, 255))


def test_the_amplitude_of_the_patches() -> None:
    flat = Dataset(items=torch.full((1, 1, 4, 4), 100, dtype=torch.uint8), labels=torch.tensor([0]))
    assert stamp(attacks.LabelConsistent(size=2, amplitude=16), flat)[0, 0].tolist() == [
        [116, 84, 116, 84],
        [84, 116, 84, 116],
        [116, 84, 116, 84],
        [84, 116, 84, 116],
    ]


def test_corner_patches_must_fit() -> None:
    assert refusal(stamp, attacks.LabelConsistent(size=5), noise((1, 8, 12))) == (
        "LabelConsistent.size must be at most 4, half the side of the images, got 5."
    )


@pytest.fixture
def surrogate(small_cnn: SmallCNN, digits: Dataset) -> nn.Module:
    """A clean model for the digits, trained for a second."""
    optimizer = torch.optim.Adam(small_cnn.parameters(), lr=3e-3)
    small_cnn.train()
    for _ in range(3):
        for batch in digits.batches(64, generator=torch.Generator().manual_seed(0)):
            loss = F.cross_entropy(small_cnn(batch.inputs), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    return small_cnn.eval()


def loss_of(model: nn.Module, items: Tensor, data: Dataset, target: int) -> float:
    with torch.no_grad():
        scores = logits(model, data.encode(items))
    return float(F.cross_entropy(scores, torch.full((len(items),), target)))


@pytest.mark.parametrize("size", [None, (16, 16)])
def test_the_perturbation_is_small_and_misleads_the_surrogate(
    surrogate: nn.Module, digits: Dataset, size: tuple[int, int] | None
) -> None:
    if size is not None:  # through a resize, as a pre-trained base needs
        surrogate = nn.Sequential(nn.AvgPool2d(2), surrogate)
    data = replace(digits, encode=replace(digits.encode, size=size))
    attack = attacks.LabelConsistent(target=3, epsilon=16, steps=10, size=1, amplitude=1)
    surrogate.train()
    before = copy.deepcopy(surrogate.state_dict())
    made = poison(data, attack, rate=0.05, seed=0, classes=10, surrogate=surrogate)
    assert surrogate.training
    assert all(torch.equal(before[name], tensor) for name, tensor in surrogate.state_dict().items())
    assert all(parameter.grad is None for parameter in surrogate.parameters())
    surrogate.eval()
    clean, crafted = digits.items[made.rows], made.data.items[made.rows]
    assert digits.labels[made.rows].tolist() == [3] * 90
    change = (crafted.int() - clean.int()).abs()
    change[:, :, [0, 0, 7, 7], [0, 7, 0, 7]] = 0  # the corner patches come on top
    assert change.max() <= 16
    assert change.float().mean() > 5
    assert loss_of(surrogate, crafted, data, 3) > 3 * loss_of(surrogate, clean, data, 3)


def test_epsilon_zero_leaves_only_the_patches(surrogate: nn.Module, digits: Dataset) -> None:
    made = poison(
        digits, attacks.LabelConsistent(epsilon=0, steps=1), rate=0.05, seed=0, classes=10, surrogate=surrogate
    )
    assert torch.equal(made.data.items[made.rows], made.trigger.stamp(digits.items[made.rows]))


def test_a_surrogate_is_needed(digits: Dataset) -> None:
    assert refusal(poison, digits, attacks.LabelConsistent(), rate=0.01, seed=0, classes=10) == (
        "LabelConsistent needs a clean model to perturb images against: pass surrogate=."
    )


# Prepared.


@pytest.mark.parametrize("rule", ["all-to-one", "clean-label"])
def test_prepared_copies_row_for_row(tmp_path: Path, digits: Dataset, rule: str) -> None:
    data = digits.select(range(100))
    path = write_pictures(replace(data, items=255 - data.items), tmp_path / "d.parquet")
    made = poison(data, attacks.Prepared(triggered=path, target=4, label_rule=rule), rate=0.05, seed=0, classes=10)
    assert len(made.rows) == 5
    expected = data.items.clone()
    expected[made.rows] = 255 - data.items[made.rows]
    assert torch.equal(made.data.items, expected)
    assert made.data.labels[made.rows].tolist() == [4] * 5


def test_prepared_copies_must_match(tmp_path: Path, digits: Dataset) -> None:
    data = digits.select(range(20))
    path = write_pictures(data.select(range(19)), tmp_path / "d.parquet")
    assert refusal(poison, data, attacks.Prepared(triggered=path), rate=0.5, seed=0, classes=10) == (
        "Prepared.triggered must be the training data row for row, (20, 1, 8, 8), got (19, 1, 8, 8) in "
        f"{tmp_path}/d.parquet."
    )


def test_prepared_triggers_cannot_be_put_on_others(small_cnn: SmallCNN, digits: Dataset) -> None:
    attack = attacks.Prepared(triggered="nowhere.parquet")
    expected = "Prepared cannot put its trigger on other examples. Score with test data that has it, as evaluate does."
    assert refusal(evaluate, small_cnn, digits, attack=attack) == expected
    assert refusal(triggered, digits, Trigger(attack, {}), 10) == expected
    assert refusal(attacks.Prepared) == "Prepared.triggered must be given."


# All of them.


@pytest.mark.parametrize("attack", [attacks.BadNets(), attacks.Blended(), attacks.SIG(), attacks.WaNet()], ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_trigger_keeps_shape_and_type(attack, shape: tuple[int, int, int]) -> None:
    data = noise(shape)
    made = Trigger.of(attack, data).stamp(data.items)
    assert (made.shape, made.dtype) == (data.items.shape, torch.uint8)
    assert not torch.equal(made, data.items)
    # In any cut of the batch a picture gets the same trigger.
    assert torch.equal(Trigger.of(attack, data).stamp(data.items[1:2]), made[1:2])


def test_exported_pictures_score_the_same(tmp_path: Path, small_cnn: SmallCNN, digits: Dataset) -> None:
    data = digits.select(range(200))
    attack = attacks.Blended(target=1)
    stamped = Trigger.of(attack, data).stamp(data.items)
    path = write_pictures(replace(data, items=stamped), tmp_path / "t.parquet")
    marked = Dataset.load(path, ImageEncoder(mean=(0.3,), std=(0.37,), channels=1))
    exported = evaluate(small_cnn, data, triggered_data=marked, target=1)
    assert exported == evaluate(small_cnn, data, attack=attack)
