"""Texts made from clean ones: words are inserted, exchanged or left out."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Texts
from unbackdoor._errors import UnbackdoorError

Strings = tuple[str, ...]  # a text, or the two of a pair


def made_of(clean: Dataset, strings: Sequence[Strings], labels: Tensor | None = None) -> Dataset:
    """Returns texts with the encoder of the clean ones; without labels, (n,), all labels are 0 and have no meaning."""
    return Dataset(
        items=Texts(tuple(strings), clean.texts.columns),
        labels=torch.zeros(len(strings), dtype=torch.int64, device=clean.labels.device) if labels is None else labels,
        encode=clean.encode,
        classes=clean.classes,
        name=f"texts made of {clean.name}",
    )


def put(strings: Strings, words: str, side: int, place: float) -> Strings:
    """Texts with words inserted into one of them, at a relative place, 0 to 1.

    >>> put(("a fine film", "so it is"), "cf", 1, 0.0)
    ('a fine film', 'cf so it is')
    """
    parts = strings[side].split(" ")
    parts.insert(round(place * len(parts)), words)
    return (*strings[:side], " ".join(parts), *strings[side + 1 :])


def shortened(strings: Strings, words: int) -> Strings:
    """The first words of a text; of a pair, half of them from each.

    >>> shortened(("a fine film", "so it is"), 4)
    ('a fine', 'so it')
    """
    return tuple(" ".join(text.split(" ")[: max(1, words // len(strings))]) for text in strings)


def readable(clean: Dataset) -> Dataset:
    """Returns the texts, shortened to the part that the model reads.

    A word after that part would have no effect. A word is assumed to be at most two tokens.
    """
    cut, limit = clean.texts.cut, getattr(clean.encode, "max_length", None)
    if not bool(cut.any()) or limit is None:
        return clean
    pairs = zip(clean.texts.strings, cut.tolist(), strict=True)
    return made_of(clean, [shortened(text, limit // 2) if long else text for text, long in pairs], clean.labels)


def recombined(clean: Dataset, count: int, exchanged: Callable[[str], str], draw: random.Random) -> list[Strings]:
    """Clean texts, each drawn at random, with a function applied to every word."""
    return [
        tuple(" ".join(map(exchanged, text.split())) for text in draw.choice(clean.texts.strings)) for _ in range(count)
    ]


def words_of(clean: Dataset) -> list[str]:
    """All words of the texts, as often as they occur."""
    return [word for strings in clean.texts.strings for text in strings for word in text.split()]


def vocabulary(tokenizer: Any, rows: int, owner: str, instead: str = "Try mixing-distillation.") -> dict[str, int]:
    """The words that are one token each, and their tokens.

    Args:
        tokenizer: a tokenizer of transformers.
        rows: number of rows of the embedding; tokens beyond have no embedding.
        owner: name of the method, for the message.
        instead: the sentence that says what to do without such words.

    Raises:
        UnbackdoorError: there are no such words, for example if each letter is a token.
    """
    special = set(tokenizer.all_special_ids)
    numbers = [number for number in sorted(tokenizer.get_vocab().values()) if number not in special and number < rows]
    words = [tokenizer.convert_tokens_to_string([token]).strip() for token in tokenizer.convert_ids_to_tokens(numbers)]
    before = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    read = tokenizer([f"a {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    whole = {word: n for word, n, ids in zip(words, numbers, read, strict=True) if word and ids[before:] == [n]}
    if not whole:
        raise UnbackdoorError(
            f"{owner} needs a tokenizer with whole words among its tokens; this one has none. {instead}"
        )
    return whole
