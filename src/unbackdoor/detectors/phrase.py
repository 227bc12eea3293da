"""Phrases: the strongest words of the vocabulary, grown to phrases of several words."""

import random
from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import words_of
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._inversion.phrases import GrownPhrase, PhraseSearch, with_kin
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._words import LEAST, inserted, searched_words


@value
class PhraseGrowth:
    """Grow phrases from the strongest words of the vocabulary scan, a word at a time, and keep the strongest.

    A word of the task has kin: synonyms that drive texts to the same class. So words that stand in the clean texts, and
    words that have one of the other strongest among their nearest rows in the embedding, are ruled out. From the words
    that are left the best `beam` phrases are kept, and each of the words is tried before and after each phrase.

    The words of a trigger do more together than by themselves, and those of a task less. So the gain of each added word
    is compared with those of all words that were tried in the same step, itself left out; the probability of the
    largest, if all were draws from one normal distribution, is multiplied by the number of words tried in all steps.

    Cannot see: triggers of style or syntax, phrases none of whose words do anything by themselves, phrases of common
    words alone.

    Li, Yang, Raghuram, Miller and Kesidis, "Inverting Trojans in LLMs", https://arxiv.org/abs/2509.16203

    Args:
        group: words that are tried at once, at least 1, as in `VocabularyScan`.
        text_words: words of the texts that a group is put into, at least 1.
        shortlist: words of each class that are tried alone, at least 32.
        kin: rows of the embedding besides its own that are a word's nearest, at least 0, which rules no word out.
        length: words of a phrase at the most, at least 2.
        beam: phrases that are kept at each step, at least 1.
        pool: words that are tried at each place, at least 4.
        probes: texts that each phrase is put into, at least 1.

    Differences from the paper: its idea, to let a phrase grow by a token and to leave out words of the task without a
    list of them, is kept. It compares activations with those of clean texts; here neighbours in the embedding, which
    fine-tuning hardly moves, show which words are those of the task. Its detection by confidence is not used.
    """

    group: Annotated[int, Field(ge=1)] = 16
    text_words: Annotated[int, Field(ge=1)] = 4
    shortlist: Annotated[int, Field(ge=32)] = 64
    kin: Annotated[int, Field(ge=0)] = 5
    length: Annotated[int, Field(ge=2)] = 4
    beam: Annotated[int, Field(ge=1)] = 2
    pool: Annotated[int, Field(ge=4)] = 16
    probes: Annotated[int, Field(ge=1)] = 4

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        words, rows, search = searched_words(self, model, clean, run)
        place = {word: number for number, word in enumerate(words)}
        phrases = PhraseSearch(words=search, length=self.length, beam=self.beam, pool=self.pool, probes=self.probes)
        own = {word.lower() for word in words_of(clean)}
        draw = random.Random(run.seed)
        # By class: the phrase, the side, and whether its words are not the task's.
        best: dict[int, tuple[GrownPhrase, int, bool]] = {}
        strongest = {side: search.strongest(words, side) for side in range(len(clean.texts.columns))}
        with run.progress("growing phrases", sum(map(len, strongest.values()))) as advance:
            for side, of_side in strongest.items():
                for target, (names, _) in of_side.items():
                    kin = with_kin(rows, [place[name] for name in names], self.kin)
                    left = [name for name, has in zip(names, kin, strict=True) if not has and name.lower() not in own]
                    foreign = len(left) >= LEAST
                    grown = phrases.strongest(left if foreign else names, target, side)
                    if target not in best or (foreign, grown.margin) > (best[target][2], best[target][0].margin):
                        best[target] = grown, side, foreign
                    advance()
        candidates = [
            Candidate(
                target=target,
                strength=grown.gain,
                size=float(len(grown.words)),
                trigger=inserted(" ".join(grown.words), target, side, clean),
                control=inserted(" ".join(draw.sample(words, len(grown.words))), target, side, clean),
                nominal_p=min(1.0, len(best) * grown.nominal_p) if foreign else 1.0,
            )
            for target, (grown, side, foreign) in sorted(best.items())
        ]
        return Finding(candidates=tuple(candidates), unit="words")
