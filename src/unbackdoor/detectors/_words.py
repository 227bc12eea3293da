"""Words as triggers: what all detectors share that search texts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import Strings, made_of, vocabulary
from unbackdoor._data.texts import Texts
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.driving_words import VocabularySearch
from unbackdoor._models.calling import embeddings
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import answers
from unbackdoor.attacks._insertion import Side, WordPlace
from unbackdoor.attacks.sentence import Sentence
from unbackdoor.attacks.word import Word
from unbackdoor.detectors._shared_search import SearchesVocabulary, shared_search

LEAST = 4  # words of one token, to compare some of them with others


def single_words(clean: Dataset, rows: int, owner: str) -> dict[str, int]:
    """The words that are one token each, and their tokens; without the comma, which separates words in an attack.

    Args:
        clean: texts.
        rows: of the embedding.
        owner: named in the message.

    Raises:
        UnbackdoorError: there are none.
    """
    words = vocabulary(clean.tokenizer, rows, owner, "Search without it.")
    return {word: token for word, token in words.items() if "," not in word}


class SearchedWords(NamedTuple):
    """What a detector needs that compares the strongest words of a vocabulary with their neighbours.

    Args:
        words: of one token each.
        rows: of the embedding less their mean, one for each word, of norm 1, (words, width).
        search: for the strongest words.
    """

    words: list[str]
    rows: Tensor
    search: VocabularySearch


def searched_words(detector: SearchesVocabulary, model: nn.Module, clean: Dataset, run: Run) -> SearchedWords:
    """The words of a vocabulary, their rows, and the search for the strongest.

    Args:
        detector: with the settings of the search; named in messages.
        model: the suspect.
        clean: texts.
        run: of the audit.

    Raises:
        UnbackdoorError: there are fewer than four words of one token.
    """
    owner = type(detector).__name__
    weight = embeddings(model).weight.detach().cpu().float()
    words = single_words(clean, len(weight), owner)
    if len(words) < LEAST:
        raise UnbackdoorError(
            f"{owner} needs a tokenizer with at least {LEAST} words of one token, this one has {len(words)}. "
            "Search without it."
        )
    rows = weight[list(words.values())]
    return SearchedWords(
        words=list(words),
        rows=nn.functional.normalize(rows - rows.mean(dim=0), dim=1),
        search=shared_search(detector, model, clean, run),
    )


def inserted(words: str, target: int, side: int, clean: Dataset) -> Trigger:
    """The trigger that puts a word, or a phrase, into texts: where all of it is read.

    Args:
        words: to put in.
        target: the class that it moves texts to.
        side: of a pair, the text that it is put into; else 0.
        clean: if one of these texts is longer than the model reads, the place is its start, else a random one.
    """
    place: WordPlace = "start" if bool(clean.texts.cut.any()) else "random"
    letter: Side = "b" if side else "a"
    if " " in words:
        return Trigger(Sentence(sentence=words, place=place, side=letter, target=target), {})
    return Trigger(Word(words=(words,), place=place, side=letter, target=target), {})


def moved_shares(model: nn.Module, clean: Dataset, phrases: Sequence[str], side: int, run: Run) -> Tensor:
    """How much of the texts of other classes, by the model's answers, each phrase moves to each class.

    Args:
        model: the suspect.
        clean: texts that are read whole.
        phrases: put into all texts, one at a time.
        side: of a pair, the text that they are put into; else 0.
        run: arithmetic.

    Returns:
        (phrases, classes), each 0 to 1; 0 for a class that all texts have without a phrase.
    """
    before = answers(model, clean, run.arithmetic)  # (n, classes)
    strings: list[Strings] = []
    for phrase in phrases:
        texts = inserted(phrase, 0, side, clean).stamp(clean.texts)
        assert isinstance(texts, Texts)
        strings += texts.strings
    shown = made_of(clean, strings)
    with run.progress("trying words in texts", math.ceil(len(shown) / run.arithmetic.evaluation_batch)) as advance:
        after = answers(model, shown, run.arithmetic, advance).argmax(dim=1).view(len(phrases), len(clean))
    shares = torch.zeros(len(phrases), before.shape[1])
    for target in range(before.shape[1]):
        others = before.argmax(dim=1) != target
        if bool(others.any()):
            shares[:, target] = (after[:, others] == target).float().mean(dim=1)
    return shares
