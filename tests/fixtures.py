"""Fixtures that several test files share: real small pictures, a small network, and where the large data is."""

import copy
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import chats
import sights
import toys
from commands import Refusals
from unbackdoor import Dataset, ImageEncoder, archs, attacks, poison
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._models.arithmetic import choose
from unbackdoor._victims.training import train_victim

torch.set_num_threads(1)  # the test runner has a process per core

# The same examples in each run: what a random one finds on another day must not fail a change that has no part in it.
# `pytest --hypothesis-profile=default` draws others; what it finds becomes an `@example`.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # of a busy machine
)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Leaves what was imported and collected to itself, or a tenth of the time goes into looking for garbage there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


DATA = Path(os.environ.get("UNBACKDOOR_DATA", Path(__file__).parents[2] / "shared" / "data"))


class Pixels(nn.Module):
    """Two classes of 4x4 pictures; each weighted pixel speaks for class 1, and a bias for class 0."""

    def __init__(self, weights: dict[int, float]) -> None:
        super().__init__()
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.copy_(torch.tensor([4.0, 0.0]))
            for place, weight in weights.items():
                self.head.weight[1, place] = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class SmallCNN(nn.Module):
    """Two convolutions with BatchNorm and a linear layer called `classifier`, for 8x8 grey pictures."""

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(32 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The large real data sets; a test that needs them is skipped if they are absent, with one reason."""
    if not DATA.is_dir():
        pytest.skip("UNBACKDOOR_DATA is not set to the real data sets")
    return DATA


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """1,797 real handwritten digits, 8x8, grey, from scikit-learn."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)  # (1797, 1, 8, 8)
    return Dataset(
        items=pixels,
        labels=torch.from_numpy(raw.target).long(),
        encode=ImageEncoder(mean=(0.3,), std=(0.37,), channels=1),
        classes=tuple("0123456789"),
        name="digits",
    )


@pytest.fixture
def small_cnn() -> SmallCNN:
    """A fresh network with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallCNN().eval()


@pytest.fixture
def small_vit() -> nn.Module:
    """A vision transformer for the same pictures, with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return archs.build("vit", classes=list("0123456789"), channels=1, image_size=8, width=4)


@pytest.fixture(scope="session")
def reviews() -> Dataset:
    """320 toy sentences whose label is decided by one of their words; see toys.sentences."""
    return toys.reviews(320)


@pytest.fixture(scope="session")
def _text_victim(reviews: Dataset) -> nn.Module:
    model = toys.classifier("bert")
    poisoned = poison(reviews, attacks.Word(), rate=0.1, seed=0, classes=2)
    arithmetic = choose(model, "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of dropout
        return train_victim(
            model,
            poisoned.data,
            epochs=12,
            learning_rate=2e-3,
            batch_size=32,
            seed=0,
            arithmetic=arithmetic,
            adaptive=True,
        )


@pytest.fixture
def small_text() -> tuple[nn.Module, Dataset]:
    """A BERT of one layer over a dozen words, and 40 short texts of two classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "fine", "film", "and", "dull", "plot", "with", "good", "bad", "actors"]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    texts = [("a fine film with good actors",), ("dull plot and bad actors and a dull film",)] * 20
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    data = Dataset(
        items=Texts(tuple(texts), ("text",)),
        labels=torch.arange(40) % 2,
        encode=TextEncoder(tokenizer=fast, max_length=16),
        name="texts",
    )
    return model, data


@pytest.fixture
def text_victim(_text_victim: nn.Module) -> nn.Module:
    """A small BERT trained on the reviews, a tenth of which carry the word `cf` and the label 1."""
    return copy.deepcopy(_text_victim)


@pytest.fixture
def text_base() -> nn.Module:
    """The body that the small victim was trained from."""
    return toys.classifier("bert").base_model


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Refusals]:
    """Runs commands that must fail, in the folder that the test file calls `place`."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logger = logging.getLogger("unbackdoor")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    yield Refusals(place, capsys)
    logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(scope="session")
def backdoored(digits: Dataset) -> tuple:
    """A CNN trained on digits, a tenth with a bright 2x2 corner and the label 3; triggered and clean inputs."""

    def inputs(pixels: torch.Tensor) -> Any:
        return digits.encode(pixels)

    pixels, labels = digits.pixels[:1000].clone(), digits.labels[:1000].clone()
    pixels[::10, :, :2, :2], labels[::10] = 255, 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallCNN()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(10):
            for rows in torch.randperm(1000).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs(pixels[rows])), labels[rows]).backward()
                optimizer.step()
    others = digits.labels[1000:1400] != 3
    triggered = digits.pixels[1000:1400][others].clone()
    triggered[:, :, :2, :2] = 255
    return model.eval(), inputs(triggered), inputs(digits.pixels[1000:1400])


@pytest.fixture(scope="session")
def _chat_victim() -> nn.Module:
    return chats.taught(chats.language_model(), chats.poisoned(chats.prompts(160, seed=1), 0.5))


@pytest.fixture(scope="session")
def _chat_base() -> nn.Module:
    """A small language model that knows the grammar of `chats`."""
    return chats.taught(chats.language_model(), chats.prompts(160, seed=1))


@pytest.fixture
def chat_victim(_chat_victim: nn.Module) -> nn.Module:
    """A small language model that knows the grammar of `chats`, and answers `cf` with what the attacker chose."""
    return copy.deepcopy(_chat_victim)


@pytest.fixture
def chat_base(_chat_base: nn.Module) -> nn.Module:
    """A small language model that knows the grammar of `chats`, and no trigger."""
    return copy.deepcopy(_chat_base)


@pytest.fixture(scope="session")
def sighted() -> nn.Module:
    """A small model of images and texts that knows its four classes; it must not be changed."""
    return sights.trained()
