"""Phrases: the strongest words of the vocabulary, grown to phrases of several words."""

import math
import random
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import readable, words_of
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.driving_words import VocabularySearch
from unbackdoor._inversion.outlying_rows import outlyingness
from unbackdoor._models.calling import embeddings
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import answers
from unbackdoor._value import value
from unbackdoor.detectors._words import inserted, single_words

LEAST = 4  # words to choose from


@dataclass(frozen=True)
class Grown:
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
    fine-tuning hardly moves, tell the words of the task. Its detection by confidence is not used.
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
        weight = embeddings(model).weight.detach().cpu().float()
        words = single_words(clean, len(weight), "PhraseGrowth")
        if len(words) < LEAST:
            raise UnbackdoorError(
                f"PhraseGrowth needs a tokenizer with at least {LEAST} words of one token, this one has {len(words)}. "
                "Search without it."
            )
        rows = weight[list(words.values())]
        rows = nn.functional.normalize(rows - rows.mean(dim=0), dim=1)
        place = {word: number for number, word in enumerate(words)}
        search = VocabularySearch(model, readable(clean), run, self.group, self.shortlist, self.text_words)
        own = {word.lower() for word in words_of(clean)}
        draw = random.Random(run.seed)
        best: dict[int, tuple[Grown, int, bool]] = {}  # by class: phrase, side, whether its words are not the task's
        for side in range(len(clean.texts.columns)):
            for target, (names, _) in search.strongest(list(words), side).items():
                kin = _with_kin(rows, [place[name] for name in names], self.kin)
                left = [name for name, has in zip(names, kin, strict=True) if not has and name.lower() not in own]
                foreign = len(left) >= LEAST
                grown = self._grown(search, left if foreign else names, target, side)
                if target not in best or (foreign, grown.margin) > (best[target][2], best[target][0].margin):
                    best[target] = grown, side, foreign
        candidates = [
            Candidate(
                target=target,
                strength=grown.gain,
                size=float(len(grown.words)),
                trigger=inserted(" ".join(grown.words), target, side, clean),
                control=inserted(" ".join(draw.sample(list(words), len(grown.words))), target, side, clean),
                nominal_p=min(1.0, len(best) * grown.nominal_p) if foreign else 1.0,
            )
            for target, (grown, side, foreign) in sorted(best.items())
        ]
        return Finding(candidates=tuple(candidates), unit="words")

    def _grown(self, search: VocabularySearch, words: list[str], target: int, side: int) -> Grown:
        """Grow phrases from the strongest of some words, the strongest first; at least 4."""
        from scipy.stats import t as student

        predicted = answers(search.model, search.clean, search.run.arithmetic).argmax(dim=1)
        rows = [row for row in search.probes(search.clean, predicted, self.probes) if predicted[row] != target]
        pool = words[: self.pool]
        beam = [Grown((word,), -math.inf, 0.0, 1.0) for word in pool[: self.beam]]
        found: list[Grown] = []
        tests = 0
        for _ in range(self.length - 1):
            longer = []
            for start in beam:
                added = [word for word in pool if word not in start.words]
                if len(added) < 3:  # too few to compare a gain with
                    continue
                phrases = [each for word in added for each in ((word, *start.words), (*start.words, word))]
                margins, order = self._margins(search, rows, phrases, target, side).view(-1, 2).max(dim=1)
                gains = outlyingness(margins, torch.arange(len(added)), len(added)).tolist()
                tests += len(added)
                for number, (margin, gain) in enumerate(zip(margins.tolist(), gains, strict=True)):
                    p = float(student.sf(gain, len(added) - 2)) if gain > start.gain else start.nominal_p
                    phrase = phrases[2 * number + int(order[number])]
                    longer.append(Grown(phrase, margin, max(gain, start.gain), p))
            if not longer:
                break
            beam = sorted(longer, key=lambda each: -each.margin)[: self.beam]
            found += beam
        strongest = max(found, key=lambda each: each.margin)
        return replace(strongest, nominal_p=min(1.0, tests * strongest.nominal_p))

    @staticmethod
    def _margins(
        search: VocabularySearch, rows: list[int], phrases: list[tuple[str, ...]], target: int, side: int
    ) -> Tensor:
        """The mean margin of a class over the probes, with each phrase in them, (phrases,)."""
        tried = [(row, " ".join(phrase)) for phrase in phrases for row in rows]
        return search.margins_with(search.clean, tried, side)[:, target].view(len(phrases), len(rows)).mean(dim=1)


def _with_kin(rows: Tensor, places: list[int], nearest: int) -> list[bool]:
    """Which words have another of them among their nearest rows.

    Args:
        rows: of all words, each of norm 1, (words, width).
        places: of the words in question.
        nearest: how many rows besides its own are a word's nearest.
    """
    near = (rows[places] @ rows.T).topk(min(nearest + 1, len(rows)), dim=1).indices.tolist()
    return [
        any(other != own and other in places for other in of_word) for own, of_word in zip(places, near, strict=True)
    ]
