"""Words that drive a text model to a class while the words of about the same meaning do not."""

import math
from dataclasses import dataclass

from torch import Tensor

from unbackdoor._inversion.driving_words import VocabularySearch, margins
from unbackdoor._inversion.phrases import nearest_rows
from unbackdoor._tasks.classification import answers

NATURAL = 0.1  # mean lead of a word of a task, in units of the model's own margins


@dataclass(frozen=True, kw_only=True)
class LoneWord:
    """The word of a class that is farthest ahead of its kin.

    Args:
        target: the class.
        word: as it is inserted.
        lead: its mean margin less the largest of its kin's, in units of the median margin of the model's own answers.
        compared: how many words of the class were compared.
    """

    target: int
    word: str
    lead: float
    compared: int


def leads(
    search: VocabularySearch, words: list[str], rows: Tensor, side: int, *, compared: int, kin: int
) -> list[LoneWord]:
    """Returns, for each class, the word with the largest lead of the strongest ones.

    Args:
        search: of the suspect, on clean texts.
        words: of one token each.
        rows: of the embedding, one for each word, of norm 1, (words, width).
        side: of a pair, the text that words are put into; else 0.
        compared: the strongest words of each class that are compared.
        kin: how many other rows are a word's nearest.
    """
    strongest = search.strongest(words, side)
    place = {word: number for number, word in enumerate(words)}
    chosen = sorted({name for names, _ in strongest.values() for name in names[:compared]})
    near = nearest_rows(rows, [place[name] for name in chosen], kin)
    kin_of = {name: [words[number] for number in of_word] for name, of_word in zip(chosen, near, strict=True)}
    tried = sorted({word for name in chosen for word in (name, *kin_of[name])})
    of_words = search.mean_margins(tried, side)
    unit = typical_margin(search)
    lone: list[LoneWord] = []
    for target, (names, _) in strongest.items():
        margin = dict(zip(tried, of_words[target].tolist(), strict=True))
        lead = {name: (margin[name] - max(margin[word] for word in kin_of[name])) / unit for name in names[:compared]}
        word = max(lead, key=lambda name: lead[name])
        lone.append(LoneWord(target=target, word=word, lead=lead[word], compared=len(lead)))
    return lone


def typical_margin(search: VocabularySearch) -> float:
    """The median margin of the model's own answers to the clean texts, more than 0."""
    own = margins(answers(search.model, search.clean, search.run.arithmetic)).max(dim=1).values  # (n,)
    return max(float(own.median()), 1e-6)


def lone_p(lead: float, tests: int) -> float:
    """How likely the largest of some leads is at least this, if they are exponential with the mean of a task's words.

    >>> round(lone_p(math.log(100) / 10, 1), 6), lone_p(0.0, 24), lone_p(-1.0, 1)
    (0.01, 1.0, 1.0)

    Args:
        lead: the largest.
        tests: how many there are.
    """
    return min(1.0, tests * math.exp(-max(lead, 0.0) / NATURAL))
