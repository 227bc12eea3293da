"""Vocabulary scan: the word that moves texts to each class more than any other."""

import random
from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._inversion.driving_words import anomaly_index, anomaly_p
from unbackdoor._models.calling import embeddings
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._shared_search import shared_search
from unbackdoor.detectors._words import inserted, single_words


@value
class VocabularyScan:
    """Try all words of one token, first in groups, then the strongest alone, and compare the first with the rest.

    For each class the margins of the 32 strongest words are compared by the anomaly index: how far the first lies above
    the least, in units of an exponential distribution with the same median. For such values the probability of an index
    has a formula, which is multiplied by the number of classes (and of sides, for pairs of texts); so two classes are
    enough. Words of the task drive it less: the comparison with clean models is for these.

    Cannot see: triggers of style or syntax, words of several tokens, words that do nothing one by one, and triggers
    from one class only; of a sentence it may see the most telling word.

    Args:
        group: words that are tried at once, at least 1; more is faster, and misses weaker ones.
        text_words: words of the texts that a group is put into, at least 1.
        shortlist: words of each class that are tried alone, at least 32.

    Differences from the paper: there is no paper on this detector; it is the search of `WordDistillation`, in larger
    groups and shorter texts.
    """

    group: Annotated[int, Field(ge=1)] = 16
    text_words: Annotated[int, Field(ge=1)] = 4
    shortlist: Annotated[int, Field(ge=32)] = 64

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search all classes."""
        words = list(single_words(clean, len(embeddings(model).weight), "VocabularyScan"))
        search = shared_search(self, model, clean, run)
        sides = range(len(clean.texts.columns))
        strongest = {side: search.strongest(words, side) for side in sides}
        tests = sum(len(of_side) for of_side in strongest.values())
        draw = random.Random(run.seed)
        candidates: dict[int, Candidate] = {}
        for side in sides:
            for target, (names, margins) in strongest[side].items():
                index = float(anomaly_index(margins)[0])
                candidate = Candidate(
                    target=target,
                    strength=index,
                    size=1.0,
                    trigger=inserted(names[0], target, side, clean),
                    control=inserted(draw.choice(words), target, side, clean),
                    nominal_p=min(1.0, tests * anomaly_p(index, len(margins))),
                )
                if target not in candidates or candidates[target].strength < index:
                    candidates[target] = candidate
        return Finding(candidates=tuple(candidates[target] for target in sorted(candidates)), unit="words")
