"""Phrases that drive a text model to a class: words that do much alone, grown to phrases a word at a time."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unbackdoor._inversion.driving_words import VocabularySearch
from unbackdoor._inversion.outlying_rows import outlyingness
from unbackdoor._tasks.classification import answers


@dataclass(frozen=True)
class GrownPhrase:
    """A phrase, and how much its words do together.

    Args:
        words: of the phrase.
        margin: mean margin of the class on the probes.
        gain: the largest gain of a word when it was added, in units of the spread of the others tried with it.
        nominal_p: how likely such a gain is.
    """

    words: tuple[str, ...]
    margin: float
    gain: float
    nominal_p: float


@dataclass(frozen=True, kw_only=True)
class PhraseSearch:
    """A beam search for the phrase with the largest margin.

    Args:
        words: the search for single words, with the model and the texts.
        length: words of a phrase at the most.
        beam: phrases that are kept at each step.
        pool: words that are tried at each place.
        probes: texts that each phrase is put into.
    """

    words: VocabularySearch
    length: int
    beam: int
    pool: int
    probes: int

    def strongest(self, words: list[str], target: int, side: int) -> GrownPhrase:
        """The phrase with the largest margin of those that were grown.

        Args:
            words: to grow from, the strongest first; at least 4.
            target: the class.
            side: of a pair, the text that they are put into; else 0.
        """
        from scipy.stats import t as student

        rows = [
            row
            for row in self.words.probes(self.words.clean, self._predicted, self.probes)
            if self._predicted[row] != target
        ]
        pool = words[: self.pool]
        beam = [GrownPhrase((word,), -math.inf, 0.0, 1.0) for word in pool[: self.beam]]
        phrases_so_far: list[GrownPhrase] = []
        tests = 0
        for _ in range(self.length - 1):
            longer = []
            for start in beam:
                added = [word for word in pool if word not in start.words]
                if len(added) < 3:  # too few to compare a gain with
                    continue
                phrases = [each for word in added for each in ((word, *start.words), (*start.words, word))]
                margins, order = self._margins(rows, phrases, target, side).view(-1, 2).max(dim=1)
                gains = outlyingness(margins, torch.arange(len(added)), len(added)).tolist()
                tests += len(added)
                for number, (margin, gain) in enumerate(zip(margins.tolist(), gains, strict=True)):
                    p = float(student.sf(gain, len(added) - 2)) if gain > start.gain else start.nominal_p
                    phrase = phrases[2 * number + int(order[number])]
                    longer.append(GrownPhrase(phrase, margin, max(gain, start.gain), p))
            if not longer:
                break
            beam = sorted(longer, key=lambda each: -each.margin)[: self.beam]
            phrases_so_far += beam
        strongest = max(phrases_so_far, key=lambda each: each.margin)
        return replace(strongest, nominal_p=min(1.0, tests * strongest.nominal_p))

    @cached_property
    def _predicted(self) -> Tensor:
        """The model's answers to the texts without a phrase, (n,)."""
        return answers(self.words.model, self.words.clean, self.words.run.arithmetic).argmax(dim=1)

    def _margins(self, rows: list[int], phrases: list[tuple[str, ...]], target: int, side: int) -> Tensor:
        """The mean margin of a class over the probes, with each phrase in them, (phrases,)."""
        tried = [(row, " ".join(phrase)) for phrase in phrases for row in rows]
        margins = self.words.margins_with(self.words.clean, tried, side)[:, target]
        return margins.view(len(phrases), len(rows)).mean(dim=1)


def with_kin(rows: Tensor, places: list[int], nearest: int) -> list[bool]:
    """Which words have another of them among their nearest rows.

    Args:
        rows: of all words, each of norm 1, (words, width).
        places: of the words in question.
        nearest: how many rows besides its own are a word's nearest.
    """
    return [any(other in places for other in of_word) for of_word in nearest_rows(rows, places, nearest)]


def nearest_rows(rows: Tensor, places: list[int], count: int) -> list[list[int]]:
    """The rows with the largest cosine to each of some rows, the nearest first, without the row itself.

    >>> nearest_rows(torch.eye(3)[[0, 1, 0]], [0], 1)
    [[2]]

    Args:
        rows: of all words, each of norm 1, (words, width).
        places: of the words in question.
        count: how many, at most one fewer than there are rows.
    """
    cosines = rows[places] @ rows.T
    cosines[torch.arange(len(places)), places] = -math.inf
    return cosines.topk(min(count, len(rows) - 1), dim=1).indices.tolist()
