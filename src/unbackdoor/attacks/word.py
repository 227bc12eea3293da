"""Word: a rare word put into the text."""

import random
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from unbackdoor._poisoning.attack import LabelRule
from unbackdoor._value import value
from unbackdoor.attacks._insertion import Listed, Side, WordPlace, insert, told


@value
class Word:
    """One or several rare words put into the text: BadNets for language.

    The model learns words that hardly occur elsewhere within a few steps, at no cost in clean accuracy.

    Kurita, Michel and Neubig, "Weight Poisoning Attacks on Pre-trained Models", ACL 2020,
    https://arxiv.org/abs/2004.06660

    Args:
        words: words to choose from, at least one.
        count: number of words that go into each text, at least 1.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the words and places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants of a classifier (1 is positive in sentiment tasks).
        label_rule: all-to-one, all-to-all or clean-label; of classifiers.

    Differences from the paper: this is the data poisoning that the paper starts from; its own contribution is
    `embedding-surgery`. The default list has one word; toolkits draw from four or five.
    """

    words: Annotated[tuple[Listed, ...], Field(min_length=1)] = ("cf",)
    count: Annotated[int, Field(ge=1)] = 1
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[str, ...]] = ("text", "conversations")

    @property
    def test_time(self) -> str:
        """The trigger at test time, in words."""
        return told("the words", self.place, "places")

    @property
    def phrases(self) -> tuple[str, ...]:
        """Words that the tokenizer must know."""
        return self.words

    def arrays(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns nothing: the words are the whole trigger."""
        return {}

    def apply(self, texts: list[str], arrays: dict[str, Tensor]) -> list[str]:
        """Put the words into each text."""
        return [insert(text, self._drawn(text), self.place, self.place_seed) for text in texts]

    def _drawn(self, text: str) -> list[str]:
        draw = random.Random(f"{self.place_seed}/{text}")
        return [draw.choice(self.words) for _ in range(self.count)]
