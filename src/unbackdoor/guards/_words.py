"""Texts as words, and words as arrays."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Texts

_WORD = re.compile(r"\S+")


def packed(words: Sequence[str]) -> Tensor:
    """Words in one array of their bytes in UTF-8, with line breaks between, (bytes,), uint8.

    >>> packed(["a", "b"])
    tensor([97, 10, 98], dtype=torch.uint8)
    """
    return torch.frombuffer(bytearray("\n".join(words).encode() or b"\n"), dtype=torch.uint8).clone()


def unpacked(array: Tensor) -> list[str]:
    """The words of such an array.

    >>> unpacked(packed(["fine", "film"]))
    ['fine', 'film']
    """
    return array.numpy().tobytes().decode("utf-8", errors="replace").split("\n")


def spans(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends.

    >>> spans("a  film")
    [(0, 1), (3, 7)]
    """
    return [match.span() for match in _WORD.finditer(text)]


def exchanged(text: str, words: dict[int, str]) -> str:
    """A text with other words at some places; all spaces stay.

    >>> exchanged("a  dull film", {1: "fine"})
    'a  fine film'
    """
    parts, last = [], 0
    for place, (begin, end) in enumerate(spans(text)):
        if place in words:
            parts += [text[last:begin], words[place]]
            last = end
    return "".join([*parts, text[last:]])


def without(text: str, places: set[int]) -> str:
    """A text without some of its words, and without the spaces behind them (or before, at the end).

    >>> without("a cf  fine film", {1}), without("a film cf", {2}), without("cf", {0})
    ('a fine film', 'a film', '')
    """
    words = spans(text)
    kept = [number for number in range(len(words)) if number not in places]
    if not kept:
        return ""
    parts = [text[: words[0][0]]]
    for number in kept:
        begin, end = words[number]
        parts.append(text[begin:end])
        if number != kept[-1]:
            parts.append(text[end : words[number + 1][0]])
    return "".join([*parts, text[words[-1][1] :]])


def texts_like(inputs: Dataset, strings: Sequence[tuple[str, ...]]) -> Dataset:
    """Other texts with the encoder of some inputs; their labels have no meaning."""
    return Dataset(
        items=Texts(tuple(strings), inputs.texts.columns),
        labels=torch.full((len(strings),), -1),
        encode=inputs.encode,
        classes=inputs.classes,
        name=inputs.name,
    )
