"""What each search says of its progress, and how many pictures it holds in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toys
from unbackdoor import Dataset, detectors
from unbackdoor._data.images import ImageEncoder
from unbackdoor._detection.finding import Detector
from unbackdoor._models.arithmetic import Arithmetic

CLASSES = 12


class Shown:
    """A progress that keeps, for each bar, its description, its steps and how many of them were done."""

    def __init__(self) -> None:
        self.bars: list[list[Any]] = []

    @contextmanager
    def __call__(self, description: str, steps: int) -> Iterator[Any]:
        self.bars.append([description, steps, 0])
        place = len(self.bars) - 1

        def advance() -> None:
            self.bars[place][2] += 1

        yield advance


class Wide(nn.Module):
    """A normalised, linear network on the mean brightness of 7x7 parts of pictures; it notes the sizes of batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(49)
        self.classifier = nn.Linear(49, CLASSES)
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.batches.append(len(x))
        return self.classifier(self.norm(F.adaptive_avg_pool2d(x, 7).flatten(1)))


def pictures(side: int) -> Dataset:
    """Pictures of 28x28 that the model gets at another size, a few of each class."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5 * CLASSES, 1, 28, 28), dtype=torch.uint8, generator=generator)
    encode = ImageEncoder(size=(side, side), channels=1)
    return Dataset(items=pixels, labels=torch.arange(5 * CLASSES) % CLASSES, encode=encode)


SEARCHES: list[Detector] = [
    detectors.Patch(steps=3, batch_size=8),
    detectors.Pattern(steps=3, batch_size=8),
    detectors.LowFrequencyPattern(steps=3, batch_size=8),
    detectors.Warp(steps=3, batch_size=8),
    detectors.Pairs(steps=3, batch_size=8, pairs=12),
    detectors.Margin(steps=3),
    detectors.Noise(steps=3),
]


@pytest.mark.parametrize("detector", [*SEARCHES[:5], SEARCHES[6]], ids=lambda each: type(each).__name__)
def test_a_large_picture_fills_no_more_memory_than_many_small_ones(detector: Detector) -> None:
    """128 pictures of 224x224 at once took 4 GB in the smallest MobileNet, and would take 30 in a ViT-B."""
    model = Wide()
    detector(model, pictures(224), toys.a_run(model=model))
    assert 1 <= max(model.batches) <= 128 * 64**2 // 224**2  # 10
    model.batches.clear()
    detector(model, pictures(28), toys.a_run(model=model))
    assert max(model.batches) > 50


def test_of_margins_those_of_few_large_pictures_are_raised_at_a_time() -> None:
    model, shown = Wide(), Shown()
    detectors.Margin(steps=3, starts=5)(model, pictures(224), toys.a_run(model=model, progress=shown))
    assert shown.bars == [["raising margins", 3 * 6, 3 * 6]]  # 5 x 12 starts in tens


def test_pictures_per_pass_by_size() -> None:
    cpu = Arithmetic(torch.device("cpu"), bf16=False, channels_last=True)
    sizes = [(8, 8), (64, 64), (64, 128), (224, 224), (2048, 2048)]
    assert [cpu.gradient_batch(size) for size in sizes] == [128, 128, 64, 10, 1]


@pytest.mark.parametrize("detector", SEARCHES, ids=lambda each: type(each).__name__)
def test_parts_that_fit_memory_find_the_same(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for count in (1000, 7):
        monkeypatch.setattr(Arithmetic, "gradient_batch", lambda self, size, count=count: count)
        model = Wide().double()
        finding = detector(model, pictures(28), toys.a_run(model=model))
        found.append([each.strength for each in finding.candidates])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("detector", SEARCHES, ids=lambda each: type(each).__name__)
def test_a_search_says_how_far_it_is_long_before_all_classes_had_their_turn(detector: Detector) -> None:
    """With 200 classes of 224x224 the first step of all classes took minutes, and nothing was said before its end."""
    model, shown = Wide(), Shown()
    detector(model, pictures(224), toys.a_run(model=model, progress=shown))
    ((_, steps, done),) = shown.bars
    assert steps == done >= CLASSES


@pytest.mark.parametrize(
    "detector",
    [
        detectors.VocabularyScan(group=4),
        detectors.LoneWordScan(group=4),
        detectors.PhraseGrowth(group=4, length=2),
        detectors.EmbeddingRows(count=4, texts=2, peers=10),
    ],
    ids=lambda each: type(each).__name__,
)
def test_each_scan_of_texts_says_how_far_it_is(detector: Detector) -> None:
    texts = toys.reviews(24)
    model, shown = toys.classifier("bert"), Shown()
    run = toys.a_run(model=model, progress=shown, modality="text")
    run = replace(run, arithmetic=OneAtATime(**vars(run.arithmetic)))
    detector(model, texts, run)
    assert shown.bars
    assert all(steps == done for _, steps, done in shown.bars)
    assert max(steps for _, steps, _ in shown.bars) >= 3


class OneAtATime(Arithmetic):
    """Small batches, so that a few texts are many."""

    @property
    def evaluation_batch(self) -> int:
        return 3
