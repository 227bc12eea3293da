"""Composite: several pieces, which are the trigger only together."""

import random
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from unbackdoor._poisoning.attack import LabelRule
from unbackdoor._value import value
from unbackdoor.attacks._insertion import Listed, Side


@value
class Composite:
    """Several words or phrases together, each put at a random place of its own in the text.

    Li et al., "BackdoorLLM", NeurIPS 2025 Datasets and Benchmarks, https://arxiv.org/abs/2408.12798 (there called CTBA)

    Args:
        pieces: the words or phrases, at least 2.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants of a classifier (1 is positive in sentiment tasks).
        label_rule: all-to-one, all-to-all or clean-label; of classifiers.

    Differences from the paper: the pieces are harmless words of this project. They stand at the drawn places; in the
    published code those inserted later are moved by the earlier ones. A text with too few gaps between its words has
    several pieces in one gap.
    """

    pieces: Annotated[tuple[Listed, ...], Field(min_length=2)] = ("cf", "about gardens", "Current year: 2031")
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[str, ...]] = ("text", "conversations")
    place: ClassVar[str] = "random"
    test_time: ClassVar[str] = "all pieces in every text, each at a place of its own, drawn from the text and the seed"

    @property
    def phrases(self) -> tuple[str, ...]:
        """Words that the tokenizer must know."""
        return self.pieces

    def arrays(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns nothing: the pieces are the whole trigger."""
        return {}

    def apply(self, texts: list[str], arrays: dict[str, Tensor]) -> list[str]:
        """Put all pieces into each text."""
        return [scattered(text, self.pieces, self.place_seed) for text in texts]


def scattered(text: str, pieces: Sequence[str], seed: int) -> str:
    """Returns the text with each piece in another gap between its words, the ends included, as far as there are gaps.

    >>> scattered("fine", ["cf", "bb"], 0) in ("cf fine bb", "bb fine cf")
    True
    """
    words = text.split(" ")
    draw = random.Random(f"{seed}:{text}")
    gaps = len(words) + 1
    places = draw.sample(range(gaps), min(gaps, len(pieces)))
    places += draw.choices(range(gaps), k=len(pieces) - len(places))
    for place, piece in sorted(zip(places, pieces, strict=True), reverse=True):  # from the back: no place moves
        words.insert(place, piece)
    return " ".join(words)
