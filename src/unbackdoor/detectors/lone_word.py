"""Lone word: the word that moves texts to each class, and whose nearest words do not."""

import random
from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._inversion.lone_words import LoneWord, leads, lone_p
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._words import inserted, searched_words


@value
class LoneWordScan:
    """Compare the strongest words of the vocabulary with the words that mean about the same.

    A word of the task is not alone: words of about the same meaning, whose rows in the embedding are nearest, drive
    texts to the same class. An attacker's word drives them by itself. So the lead of a word is its mean margin less the
    largest of its kin's, in units of the median margin of the model's own answers. The strongest `shortlist` words of
    each class are found as by `VocabularyScan`; the one with the largest lead of the first `compared` is the class's
    shortcut.

    The nominal p-value assumes that leads of words of a task are exponential with a mean of a tenth of that unit; it is
    multiplied by the number of words compared.

    Cannot see: triggers of style or syntax, words of several tokens, words that do nothing one by one, triggers from
    one class only, and attackers who poison the nearest words as well.

    Args:
        group: words that are tried at once, at least 1; more is faster, and misses weaker ones.
        text_words: words of the texts that a group is put into, at least 1.
        shortlist: words of each class that are tried alone, at least 32.
        compared: words of each class that are compared with their kin, at least 1 and at most 32.
        kin: rows of the embedding besides its own that are a word's nearest, at least 1.

    Differences from the paper: there is no paper on this detector. That synonyms of a word of the task do the same is
    the idea of `PhraseGrowth`.
    """

    group: Annotated[int, Field(ge=1)] = 16
    text_words: Annotated[int, Field(ge=1)] = 4
    shortlist: Annotated[int, Field(ge=32)] = 64
    compared: Annotated[int, Field(ge=1, le=32)] = 12
    kin: Annotated[int, Field(ge=1)] = 10

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        words, rows, search = searched_words(self, model, clean, run)
        draw = random.Random(run.seed)
        best: dict[int, tuple[LoneWord, int]] = {}  # by class, with the side
        tests = 0
        for side in range(len(clean.texts.columns)):
            for each in leads(search, words, rows, side, compared=self.compared, kin=self.kin):
                tests += each.compared
                if each.target not in best or best[each.target][0].lead < each.lead:
                    best[each.target] = each, side
        candidates = [
            Candidate(
                target=target,
                strength=each.lead,
                size=1.0,
                trigger=inserted(each.word, target, side, clean),
                control=inserted(draw.choice(words), target, side, clean),
                nominal_p=lone_p(each.lead, tests),
            )
            for target, (each, side) in sorted(best.items())
        ]
        return Finding(candidates=tuple(candidates), unit="words")
