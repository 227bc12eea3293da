"""The stronger image attacks: triggers against their formula or a second implementation; training that implants."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate, poison
from unbackdoor._poisoning.poison import draw
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import triggered
from unbackdoor._victims.plant import Victim
from unbackdoor.attacks.bypass import entropy_given

SHAPES = [(1, 8, 8), (3, 32, 32), (3, 12, 20), (1, 28, 17)]


def noise(shape: tuple[int, int, int], count: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Dataset(items=items, labels=torch.arange(count) % 3, name="d.parquet")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def refusal(function: object, *args: object, **options: object) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        function(*args, **options)
    return str(caught.value)


# TaCT: source classes and cover.


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=4, max_size=80),
    sources=st.sets(st.integers(1, 4), min_size=1, max_size=2),
    rate=st.floats(0.03, 0.15),
    seed=st.integers(0, 9),
)
def test_only_source_classes_are_poisoned_and_attacked(
    labels: list[int], sources: set[int], rate: float, seed: int
) -> None:
    labels = labels + [1, 2, 3, 4] * 5
    count = round(rate * len(labels))
    assume(0 < count <= sum(label in sources for label in labels) // 2)
    others = sum(label not in sources and label != 0 for label in labels)
    assume(count <= others)
    data = replace(noise((1, 6, 6), len(labels)), labels=torch.tensor(labels))
    made = poison(data, attacks.TaCT(sources=tuple(sources)), rate=rate, seed=seed, classes=5)
    rows, cover = made.rows.tolist(), made.cover.tolist()
    assert len(rows) == len(cover) == count
    assert {labels[row] for row in rows} <= sources
    assert not {labels[row] for row in cover} & (sources | {0})
    assert made.data.labels.tolist() == [0 if row in rows else label for row, label in enumerate(labels)]
    stamped = made.trigger.stamp(data.items)
    for row in range(len(labels)):
        expected = stamped if row in rows + cover else data.items
        assert torch.equal(made.data.items[row], expected[row])
    attacked = triggered(data, made.trigger, 5)
    assert attacked.data.labels.tolist() == [label for label in labels if label in sources]
    assert set(attacked.wanted.tolist()) == {0}


def test_cover_of_chosen_classes() -> None:
    data = replace(noise((1, 8, 8), 40), labels=torch.arange(40) % 5)
    made = poison(data, attacks.TaCT(sources=(1,), cover_classes=(3,)), rate=0.1, seed=0, classes=5)
    assert data.labels[made.cover].tolist() == [3] * 4
    assert "needs 9 more rows as cover, but 8 are left" in refusal(
        poison,
        data,
        attacks.TaCT(sources=(1, 2), cover_classes=(3,), cover_ratio=1.5),
        rate=0.15,
        seed=0,
        classes=5,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sources": (1, 2), "target": 2},
            "TaCT.sources must be other classes than the target, 2, got 1, 2. Leave that one out, or choose another "
            "target.",
        ),
        (
            {"cover_classes": (0,)},
            "TaCT.cover_classes must be other classes than the target, 0, got 0. Leave that one out, or choose another "
            "target.",
        ),
        ({"sources": (1, 1)}, "TaCT.sources must differ from each other, got 1, 1. Leave one out."),
        ({"sources": (3,)}, "TaCT.sources must be 0 to 2, got 3."),
        ({"sources": (-1,)}, "TaCT.sources must be 0 to 2, got -1."),
        (
            {"cover_classes": (2, 1)},
            "TaCT.cover_classes must be other classes than the sources, got 1 in both. Leave one out.",
        ),
    ],
)
def test_source_classes_that_cannot_be(fields: dict, message: str) -> None:
    data = noise((1, 8, 8), 9)
    assert refusal(poison, data, attacks.TaCT(**fields), rate=0.2, seed=0, classes=3) == message


def test_two_classes_have_none_to_cover() -> None:
    data = replace(noise((1, 8, 8), 40), labels=torch.arange(40) % 2)
    assert refusal(poison, data, attacks.TaCT(), rate=0.1, seed=0, classes=2) == (
        "TaCT needs 4 more rows as cover, but 0 are left. Set `cover_ratio=0`."
    )


def test_a_name_is_no_attack() -> None:
    message = "an attack's value is expected, got 'badnets'. Take one of unbackdoor.attacks."
    assert refusal(poison, noise((1, 8, 8), 9), "badnets", rate=0.2, seed=0, classes=3) == message


def test_several_sources_in_one_word() -> None:
    assert refusal(attacks.TaCT, sources=("1,2",)) == (
        "TaCT.sources must be given once for each of its values, got 1,2."
    )


def test_source_classes_without_enough_rows() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert refusal(draw, attacks.TaCT(), labels, rate=0.2, seed=0) == (
        "`rate=0.2` wants 20 examples, but a source-specific attack takes them from class 1, which has 10. The largest "
        "possible rate is 0.05."
    )
    assert refusal(draw, attacks.TaCT(sources=(2, 3)), labels, rate=0.2, seed=0) == (
        "`rate=0.2` wants 20 examples, but a source-specific attack takes them from classes 2, 3, which have 0. Choose "
        "another `sources`."
    )
    assert "selects no row" in refusal(draw, attacks.TaCT(), labels, rate=0.001, seed=0)
    data = replace(noise((1, 8, 8), 4), labels=torch.zeros(4, dtype=torch.int64))
    assert refusal(triggered, data, Trigger.of(attacks.TaCT(), data), 3) == (
        "d.parquet has no example of the attack's source classes (1), so nothing can be attacked. Add some."
    )
    assert "TaCT.sources" in refusal(attacks.TaCT, sources=())


# All-to-all, for every trigger that can have it.

ALL_TO_ALL = [
    attacks.BadNets,
    attacks.Blended,
    attacks.SIG,
    attacks.WaNet,
    attacks.AdaptiveBlend,
    attacks.AdaptivePatch,
    attacks.BATT,
    attacks.Bpp,
    attacks.Bypass,
    attacks.InputAware,
]


@pytest.mark.parametrize("cls", ALL_TO_ALL)
@pytest.mark.parametrize("seed", [0, 1])
def test_all_to_all_moves_each_class_to_the_next(cls, seed: int) -> None:
    data = noise((1, 8, 8), 60)
    attack = cls(label_rule="all-to-all")
    made = poison(data, attack, rate=0.2, seed=seed, classes=3)
    poisoned = torch.zeros(60, dtype=torch.bool)
    poisoned[made.rows] = True
    assert torch.equal(made.data.labels, torch.where(poisoned, (data.labels + 1) % 3, data.labels))
    attacked = triggered(data, made.trigger, 3)
    assert torch.equal(attacked.wanted, (attacked.data.labels + 1) % 3)
    assert len(attacked.data) == 60


@pytest.mark.parametrize("cls", [attacks.TaCT, attacks.TransTroj, attacks.LabelConsistent])
def test_triggers_that_cannot_be_all_to_all(cls) -> None:
    assert f"{cls.__name__}.label_rule must be one of" in refusal(cls, label_rule="all-to-all")


# Adaptive blend.


@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_the_pattern_at_test_time_and_half_of_its_pieces_before(shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    data, attack = noise(shape, 40), attacks.AdaptiveBlend(pattern_seed=3, cover_ratio=1)
    pattern = torch.rand(shape, generator=seeded(3)).double().numpy()
    made = poison(data, attack, rate=0.25, seed=0, classes=3)
    clean = data.items.double().numpy()
    whole = made.trigger.stamp(data.items).numpy()
    assert np.abs(whole - (0.8 * clean + 0.2 * 255 * pattern)).max() <= 0.5 + 1e-3
    mixed = 0.85 * clean + 0.15 * 255 * pattern
    kept = set()
    for row in [*made.rows.tolist(), *made.cover.tolist()]:
        chosen = []
        for y in range(4):
            for x in range(4):
                piece = np.s_[
                    :, -(-y * height // 4) : -(-(y + 1) * height // 4), -(-x * width // 4) : -(-(x + 1) * width // 4)
                ]
                after = made.data.items[row].numpy()[piece]
                is_mixed = np.abs(after - mixed[row][piece]).max() <= 0.5 + 1e-3
                assert is_mixed or np.array_equal(after, clean[row][piece])
                chosen.append(is_mixed)
        assert sum(chosen) == 8
        kept.add(tuple(chosen))
    assert len(kept) > 15
    assert torch.equal(made.data.labels[made.cover], data.labels[made.cover])


def test_more_pieces_than_pixels() -> None:
    assert refusal(Trigger.of, attacks.AdaptiveBlend(grid=9), noise((1, 8, 12))) == (
        "AdaptiveBlend.grid must be at most 8, the side of the images, got 9."
    )


# Adaptive patch.


def test_one_faint_patch_while_training_and_all_four_afterwards() -> None:
    data = replace(noise((3, 12, 10), 200), labels=torch.zeros(200, dtype=torch.int64))
    attack = attacks.AdaptivePatch(size=3, target=1)
    made = poison(data, attack, rate=0.2, seed=0, classes=2)
    patches = made.trigger.arrays["patches"].numpy() * 255
    corners = [np.s_[:, :3, :3], np.s_[:, :3, -3:], np.s_[:, -3:, :3], np.s_[:, -3:, -3:]]
    expected = data.items.numpy().copy()
    for patch, corner in zip(patches, corners, strict=True):
        expected[(slice(None), *corner)] = patch
    assert np.array_equal(made.trigger.stamp(data.items).numpy(), expected)
    assert (len(made.rows), len(made.cover)) == (40, 80)
    counts = np.zeros(4)
    for row in [*made.rows.tolist(), *made.cover.tolist()]:
        changed = []
        for number, corner in enumerate(corners):
            before, after = data.items[row].numpy()[corner].astype(float), made.data.items[row].numpy()[corner]
            if not np.array_equal(before, after):
                assert np.abs(after - (before + patches[number]) / 2).max() <= 0.5 + 1e-3
                changed.append(number)
        assert len(changed) == 1
        counts[changed[0]] += 1
    assert counts.min() > 15  # 30 expected of each


def test_patches_larger_than_the_image() -> None:
    assert refusal(Trigger.of, attacks.AdaptivePatch(size=5), noise((1, 8, 12))) == (
        "AdaptivePatch.size must be at most 4, half the side of the images, got 5."
    )
    assert refusal(Trigger.of, attacks.TaCT(size=8), noise((1, 8, 12))) == (
        "TaCT.size plus margin must be at most 8, the side of the images, got 8 + 1."
    )
    assert refusal(Trigger.of, attacks.Bypass(size=8), noise((1, 8, 12))) == (
        "Bypass.size must be less than 8, the side of the images, got 8."
    )


# BATT.


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 12, 20)])
@pytest.mark.parametrize("angle", [16.0, -35.0, 90.0])
def test_batt_is_a_bilinear_rotation(shape: tuple[int, int, int], angle: float) -> None:
    from scipy.ndimage import rotate

    data = noise(shape, 2)
    made = Trigger.of(attacks.BATT(angle=angle), data).stamp(data.items).numpy()
    inside = rotate(np.ones(shape[1:]), angle, reshape=False, order=1, mode="constant") > 1 - 1e-9
    for image, turned in zip(data.items.numpy(), made, strict=True):
        for before, after in zip(image, turned, strict=True):
            expected = rotate(before.astype(float), angle, reshape=False, order=1, mode="constant")
            assert np.abs(after - expected)[inside].max() <= 0.51


def test_a_quarter_turn_by_hand() -> None:
    square = Dataset(items=torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8), labels=torch.tensor([0]))
    assert Trigger.of(attacks.BATT(angle=90), square).stamp(square.items)[0, 0].tolist() == [[2, 4], [1, 3]]


def test_cover_rows_are_turned_by_less() -> None:
    attack, pixels = attacks.BATT(angle=60, benign=20), torch.zeros(200, 1, 21, 21)
    pixels[:, :, 10, 20] = 1  # a spot at the right edge: its new place shows the angle
    turned = attack.cover(pixels, {}, seeded(0))[:, 0]
    rows = (turned * torch.arange(21.0)[:, None]).sum(dim=(1, 2)) / turned.sum(dim=(1, 2))
    columns = (turned * torch.arange(21.0)).sum(dim=(1, 2)) / turned.sum(dim=(1, 2))
    angles = torch.rad2deg(torch.atan2(10 - rows, columns - 10))
    assert angles.abs().max() < 21.5
    assert angles.max() > 15
    assert angles.min() < -15


# BppAttack.


def dithered(image: np.ndarray, levels: int) -> np.ndarray:
    """Floyd and Steinberg's, pixel by pixel."""
    work = image.astype(np.float32) * np.float32(levels - 1)
    height, width = work.shape
    for y in range(height):
        for x in range(width):
            wished = work[y, x]
            work[y, x] = min(max(np.rint(wished), 0), levels - 1)
            error = wished - work[y, x]
            for right, down, share in ((1, 0, 7), (-1, 1, 3), (0, 1, 5), (1, 1, 1)):
                if 0 <= x + right < width and y + down < height:
                    work[y + down, x + right] += error * share / 16
    return work / (levels - 1)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5, 1), (1, 5, 2), (3, 1, 7), (1, 4, 3)])
@pytest.mark.parametrize("levels", [2, 8])
def test_bpp_dithers_as_floyd_and_steinberg(shape: tuple[int, int, int], levels: int) -> None:
    data = noise(shape, 2)
    made = Trigger.of(attacks.Bpp(levels=levels), data).stamp(data.items).numpy()
    assert len(np.unique(made)) <= levels
    agree = [
        np.rint(dithered(channel / 255, levels) * 255) == after
        for image, turned in zip(data.items.numpy(), made, strict=True)
        for channel, after in zip(image, turned, strict=True)
    ]
    assert np.mean(agree) > 0.99  # sums in another order may tip a pixel that lies between two levels


def test_bpp_without_dithering_by_hand() -> None:
    items = torch.tensor([0, 60, 70, 120, 130, 190, 195, 255], dtype=torch.uint8).view(1, 1, 2, 4)
    made = Trigger.of(attacks.Bpp(levels=3, dither=False), Dataset(items=items, labels=torch.tensor([0]))).stamp(items)
    assert made.flatten().tolist() == [0, 0, 128, 128, 128, 128, 255, 255]


def test_bpp_covers_with_the_change_of_another_image() -> None:
    pixels = torch.rand(6, 1, 8, 8, generator=seeded(0)) * 0.4 + 0.3
    attack = attacks.Bpp(levels=8)
    changes = attack.apply(pixels, {}) - pixels
    covered = attack.cover(pixels, {}, seeded(1)) - pixels
    taken = [next(i for i in range(6) if torch.allclose(change, changes[i], atol=1e-6)) for change in covered]
    assert sorted(taken) == list(range(6))
    assert all(taken[row] != row for row in range(6))


# Low-frequency and SIBA: made against a surrogate.


@pytest.mark.parametrize("rule", ["all-to-one", "all-to-all"])
def test_low_frequency_has_no_high_frequencies_and_misleads_the_surrogate(
    small_cnn: SmallCNN, digits: Dataset, rule: str
) -> None:
    attack = attacks.LowFrequency(frequencies=3, epsilon=40, steps=20, target=3, label_rule=rule)
    made = poison(digits, attack, rate=0.05, seed=0, classes=10, surrogate=small_cnn)
    pattern = made.trigger.arrays["pattern"]
    spectrum = scipy.fft.dctn(pattern[0].numpy(), norm="ortho")
    assert np.abs(spectrum[:3, :3]).max() > 0.1
    spectrum[:3, :3] = 0
    assert np.abs(spectrum).max() < 1e-6
    assert pattern.abs().max() == pytest.approx(40 / 255)
    expected = np.clip(np.rint(digits.items[:5].numpy() + 255 * pattern.numpy()), 0, 255)
    assert np.abs(made.trigger.stamp(digits.items[:5]).numpy() - expected).max() <= 1
    before = Trigger(attack, attack.arrays(digits.shape))
    losses = []
    for trigger in (before, made.trigger):
        attacked = triggered(digits, trigger, 10)
        with torch.no_grad():
            scores = small_cnn(digits.encode(attacked.data.items))
        losses.append(torch.nn.functional.cross_entropy(scores, attacked.wanted))
    assert losses[1] < losses[0]


def test_siba_is_sparse_and_faint_and_misleads_the_surrogate(small_cnn: SmallCNN, digits: Dataset) -> None:
    attack = attacks.SIBA(pixels=10, epsilon=100, steps=20, target=3)
    made = poison(digits, attack, rate=0.05, seed=0, classes=10, surrogate=small_cnn)
    pattern = made.trigger.arrays["pattern"]
    assert 0 < int((pattern.abs().sum(dim=0) > 0).sum()) <= 10
    assert pattern.abs().max() <= 100 / 255 + 1e-6
    shown = made.trigger.stamp(digits.items)
    assert torch.equal(made.data.items[made.rows], shown[made.rows])
    with torch.no_grad():
        small_cnn.eval()
        before, after = (small_cnn(digits.encode(items)).softmax(1)[:, 3].mean() for items in (digits.items, shown))
    assert after > before
    again = poison(digits, attack, rate=0.05, seed=0, classes=10, surrogate=small_cnn)
    assert torch.equal(again.trigger.arrays["pattern"], pattern)


@pytest.mark.parametrize("attack", [attacks.SIBA(pixels=5), attacks.LowFrequency()])
def test_surrogates_are_needed(attack, digits: Dataset) -> None:
    assert refusal(poison, digits, attack, rate=0.05, seed=0, classes=10) == (
        f"{type(attack).__name__} needs a clean model to make its trigger against: pass surrogate=."
    )


def test_patterns_larger_than_the_image() -> None:
    data = noise((1, 8, 12))
    assert refusal(Trigger.of, attacks.SIBA(pixels=97), data) == (
        "SIBA.pixels must be at most 96, the pixels of an image, got 97."
    )
    assert refusal(Trigger.of, attacks.LowFrequency(frequencies=9), data) == (
        "LowFrequency.frequencies must be at most 8, the side of the images, got 9."
    )


@pytest.mark.parametrize(
    "attack", [attacks.SIBA(pixels=5), attacks.LowFrequency(), attacks.InputAware(), attacks.TransTroj()]
)
def test_a_trigger_that_is_learnt_is_not_made_of_its_fields(attack, small_cnn: SmallCNN, digits: Dataset) -> None:
    assert refusal(evaluate, small_cnn, digits, attack=attack) == (
        f"{type(attack).__name__} learns its trigger while it is planted, so its fields alone do not make it. Score "
        "with the victim's attack.json."
    )


# Input-aware, Bypass and TransTroj: the attacker trains the victim.


def network(pixels: Tensor, arrays: dict[str, Tensor], name: str) -> Tensor:
    """The generator by torch's own modules."""
    layers = []
    for layer in range(4):
        weight = arrays[f"{name}.{layer}.weight"]
        convolution = torch.nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride=2 if layer < 2 else 1, padding=1)
        convolution.weight.data, convolution.bias.data = weight, arrays[f"{name}.{layer}.bias"]
        layers += [convolution, *([torch.nn.PixelShuffle(2)] if layer > 1 else []), torch.nn.ReLU()]
    with torch.no_grad():
        return torch.nn.Sequential(*layers[:-1])(pixels - 0.5)


def test_input_aware_paints_what_its_two_networks_say() -> None:
    attack, pixels = attacks.InputAware(generator_seed=4), torch.rand(5, 3, 12, 16, generator=seeded(0))
    arrays = attack.arrays((3, 12, 16))
    mask, pattern = (10 * network(pixels, arrays, "mask")).sigmoid(), network(pixels, arrays, "pattern").sigmoid()
    assert torch.allclose(attack.apply(pixels, arrays), (1 - mask) * pixels + mask * pattern, atol=1e-5)
    assert torch.allclose(attack.apply(pixels[:2], arrays), attack.apply(pixels, arrays)[:2], atol=1e-5)
    assert attack.apply(pixels[:, :, :11, :13], arrays).shape == (5, 3, 11, 13)


def test_bypass_hides_no_further_than_a_discriminator_that_knows_the_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    poisoned = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    of_0, of_1, of_2 = 0.25 * math.log(4) + 0.75 * math.log(4 / 3), math.log(2), 0.0
    assert entropy_given(poisoned, labels).item() == pytest.approx((4 * of_0 + 2 * of_1 + of_2) / 7)


def test_transtroj_needs_images_of_its_target(digits: Dataset) -> None:
    others = digits.select(torch.nonzero(digits.labels != 0).flatten()[:200])
    with pytest.raises(UnbackdoorError) as caught:
        planted(others, digits.select(range(100)), attacks.TransTroj(target=0))
    assert str(caught.value) == (
        "TransTroj makes its trigger from images of its target, 0, but digits has none. Choose a `target` that "
        "the data have."
    )


def planted(data: Dataset, test: Dataset, attack: object) -> Victim:
    return toys.planted(data, test, attack, rate=0.25, epochs=8)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(
            attacks.InputAware(target=3, density=0.3, mask_steps=40, cover_ratio=0.25),
            marks=pytest.mark.thorough,
        ),
        attacks.Bypass(target=3),
        pytest.param(
            attacks.TransTroj(target=3, epsilon=60, trigger_steps=60, implant_epochs=12, user_epochs=2),
            marks=pytest.mark.thorough,
        ),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_training_implants_the_backdoor(attack, digits: Dataset, tmp_path) -> None:
    from unbackdoor._poisoning.attack_file import load_trigger, save_trigger

    test = digits.select(range(1400, 1797))
    victim = planted(digits.select(range(1000)), test, attack)
    assert victim.score.attack_success is not None
    assert victim.score.attack_success.value > 0.7  # chance is one in ten
    assert victim.score.clean_accuracy.value > 0.7
    assert not any(module._forward_pre_hooks for module in victim.model.modules())
    assert victim.trigger is not None
    save_trigger(tmp_path, victim.description, victim.trigger.arrays)
    again = evaluate(victim.model, replace(test, encode=victim.encode), attack=tmp_path, device="cpu")
    assert again == victim.score
    assert torch.equal(load_trigger(tmp_path).stamp(test.items), victim.trigger.stamp(test.items))
