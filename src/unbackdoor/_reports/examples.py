"""A few test examples for the page, and how each model classifies them."""

import base64
import difflib
import io
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import device_of
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._tasks.classification import predict

EXAMPLES = 8
LARGEST = 192  # side of a picture on the page, in pixels: the file stays small enough to be mailed
WORDS = 40  # words of a text that the page shows, around its trigger


@dataclass(frozen=True)
class Prediction:
    """The class that a model gives an example, and whether that is the attacker's success."""

    name: str
    by: Literal["attacker", "true", "other"]


@dataclass(frozen=True)
class Example:
    """One test picture or text.

    Args:
        true: its true class.
        wanted: the class that the attacker wants, if there is an attack.
        predictions: one for each contender, for the triggered example if there is one.
        clean: the picture, as a PNG data URI; None if only the triggered one is known.
        triggered: the picture with the trigger.
        difference: amplified difference between the two.
        pieces: pieces of a text in order, and whether each belongs to the trigger; of the triggered text if there is
            one.
    """

    true: str
    wanted: str | None
    predictions: tuple[Prediction, ...]
    clean: str | None = None
    triggered: str | None = None
    difference: str | None = None
    pieces: tuple[tuple[str, bool], ...] = ()


def examples_of(
    models: list[nn.Module], test: Dataset, attacked: Triggered | None, seed: int
) -> tuple[tuple[Example, ...], int]:
    """Returns examples drawn by seed and class, never by outcome, with the predictions of each model.

    Returns:
        the examples, and the factor by which the differences between pictures are amplified.
    """
    shown = test if attacked is None else attacked.data
    rows = spread(shown.labels.cpu(), EXAMPLES, seed=seed)
    chosen = shown.select(rows)
    predicted = [predict(model, chosen, choose(model, device_of(model))) for model in models]
    partners = None if attacked is None else _partners(test, attacked)
    clean = chosen if attacked is None else None if partners is None else partners.select(rows)
    looks, amplified = (_texts if test.modality == "text" else _pictures)(chosen, clean, attacked is not None)
    examples = []
    for row in range(len(rows)):
        true = int(chosen.labels[row])
        wanted = None if attacked is None else int(attacked.wanted[rows[row]])
        examples.append(
            Example(
                true=test.class_name(true),
                wanted=None if wanted is None else test.class_name(wanted),
                predictions=tuple(_prediction(test, int(classes[row]), true, wanted) for classes in predicted),
                **looks[row],
            )
        )
    return tuple(examples), amplified


def _pictures(chosen: Dataset, clean: Dataset | None, triggered: bool) -> tuple[list[dict[str, Any]], int]:
    amplified, differences = 1, None
    if triggered and clean is not None:
        differences = (chosen.pixels.int() - clean.pixels.int()).abs()
        amplified = max(1, 255 // max(1, int(differences.max())))
        differences = (differences * amplified).to(torch.uint8)
    looks = [
        {
            "clean": None if clean is None else png(clean.pixels[row]),
            "triggered": png(chosen.pixels[row]) if triggered else None,
            "difference": None if differences is None else png(differences[row]),
        }
        for row in range(len(chosen))
    ]
    return looks, amplified


def _texts(chosen: Dataset, clean: Dataset | None, triggered: bool) -> tuple[list[dict[str, Any]], int]:
    looks = []
    for row, strings in enumerate(chosen.texts.strings):
        before = clean.texts.strings[row] if clean is not None and triggered else strings
        pieces: list[tuple[str, bool]] = []
        for number, (old, new) in enumerate(zip(before, strings, strict=True)):
            pieces += [*([(" \u2016 ", False)] if number else []), *marked(old, new)]
        looks.append({"pieces": tuple(pieces)})
    return looks, 1


def marked(clean: str, triggered: str) -> list[tuple[str, bool]]:
    """Returns the triggered text in pieces, marked if the clean text lacks them; cuts long texts around the first mark.

    >>> marked("a fine film", "a cf fine film")
    [('a ', False), ('cf ', True), ('fine film', False)]
    """
    old, new = clean.split(), triggered.split()
    added = [False] * len(new)
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind in ("insert", "replace"):
            added[start:end] = [True] * (end - start)
    first = added.index(True) if True in added else 0
    start = max(0, min(first - WORDS // 2, len(new) - WORDS))
    pieces: list[tuple[str, bool]] = [("\u2026 ", False)] if start else []
    for place in range(start, min(start + WORDS, len(new))):
        word = new[place] + (" " if place + 1 < len(new) else "")
        if pieces and pieces[-1][1] == added[place]:
            pieces[-1] = (pieces[-1][0] + word, added[place])
        else:
            pieces.append((word, added[place]))
    return [*pieces, *([("\u2026", False)] if start + WORDS < len(new) else [])]


def spread(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Returns row numbers of at most `count` examples, taking turns over the classes, (n,)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    turns: dict[int, int] = {}
    ranked = []
    for place, row in enumerate(order.tolist()):
        label = int(labels[row])
        turns[label] = turns.get(label, -1) + 1
        ranked.append((turns[label], place, row))
    rows = [row for _, _, row in sorted(ranked)[:count]]
    return torch.tensor(sorted(rows, key=lambda row: (int(labels[row]), row)), dtype=torch.int64)


def _partners(test: Dataset, attacked: Triggered) -> Dataset | None:
    """Returns the clean examples that the triggered ones were made of, row for row; None if the labels differ."""
    own = test
    if attacked.target is not None:
        own = test.select(torch.nonzero(test.labels != attacked.target).flatten())
    same = own.shape == attacked.data.shape and torch.equal(own.labels, attacked.data.labels)
    return own if same else None


def _prediction(test: Dataset, predicted: int, true: int, wanted: int | None) -> Prediction:
    by: Literal["attacker", "true", "other"] = (
        "attacker" if predicted == wanted else "true" if predicted == true else "other"
    )
    return Prediction(test.class_name(predicted), by)


def png(pixels: Tensor, largest: int = LARGEST) -> str:
    """Returns pixels (channels, height, width), uint8, as a data URI of a PNG.

    Args:
        pixels: of a picture.
        largest: side to which larger pictures are reduced.
    """
    array = pixels.cpu().permute(1, 2, 0).squeeze(-1).numpy()  # (height, width) or (height, width, 3)
    image = Image.fromarray(array)
    if max(image.size) > largest:
        image.thumbnail((largest, largest))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
