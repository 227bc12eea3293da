"""Which texts have most words in common with another one, rare words counting more."""

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


class Similarity:
    """The cosines of texts as vectors of their words, each weighted by how rare it is among the texts.

    A word that is in d of n texts has the weight log((1 + n) / (1 + d)) + 1.

    Args:
        texts: n of them.

    >>> texts = Similarity(["what does a cat say", "where does a dog live", "a cat and a dog"])
    >>> texts.closest("where is the cat", 2)
    [1, 0]
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_WORD.findall(text.casefold())) for text in texts]
        self.containing = Counter(word for each in counts for word in each)
        self.total = len(texts)
        self.vectors = [self._weighted(each) for each in counts]

    def closest(self, text: str, count: int) -> list[int]:
        """The numbers of the closest texts, the closest first; of equally close ones the first."""
        own = self._weighted(Counter(_WORD.findall(text.casefold())))
        cosines = [sum(weight * other.get(word, 0.0) for word, weight in own.items()) for other in self.vectors]
        return sorted(range(len(cosines)), key=lambda number: (-cosines[number], number))[:count]

    def _weighted(self, counts: Counter[str]) -> dict[str, float]:
        """The vector of a text, of length 1 if the text has a word."""
        plain = {
            word: count * (math.log((1 + self.total) / (1 + self.containing[word])) + 1)
            for word, count in counts.items()
        }
        length = math.hypot(*plain.values())
        return {word: weight / length for word, weight in plain.items()}
