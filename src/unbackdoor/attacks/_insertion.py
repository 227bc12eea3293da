"""Inserting words into texts at places that depend on the text alone, so that the order of texts does not matter."""

import random
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

Phrase = Annotated[str, Field(min_length=1, pattern=r"\S")]
# A phrase within a list of words must not have a comma: it was meant to separate them.
Listed = Annotated[str, Field(min_length=1, pattern=r"^[^,]*[^,\s][^,]*$")]
WordPlace = Literal["random", "start", "end"]
Side = Literal["a", "b", "both"]


def insert(text: str, phrases: Sequence[str], place: WordPlace, seed: int) -> str:
    """Returns the text with each phrase put between two of its words.

    >>> insert("a fine film", ["cf"], "start", 0), insert("a fine film", ["cf"], "end", 0)
    ('cf a fine film', 'a fine film cf')
    """
    words = text.split(" ")
    draw = random.Random(f"{seed}:{text}")
    for phrase in phrases:
        at = {"start": 0, "end": len(words)}.get(place)
        words.insert(draw.randint(0, len(words)) if at is None else at, phrase)
    return " ".join(words)


def told(trigger: str, place: WordPlace, drawn: str = "a place") -> str:
    """Returns the words of `attack.json` about the triggered texts.

    >>> told("the word", "start"), told("the words", "random", "places")
    ('the word in every text, at its start', 'the words in every text, at places drawn from the text and the seed')
    """
    return f"{trigger} in every text, at " + (
        f"{drawn} drawn from the text and the seed" if place == "random" else f"its {place}"
    )


class OneWord:
    """The common part of attacks whose trigger is one word in the text; each has its own fields."""

    word: str
    place: WordPlace
    place_seed: int

    modality: ClassVar[str] = "text"

    @property
    def test_time(self) -> str:
        """The trigger at test time, in words."""
        return told("the word", self.place)

    @property
    def phrases(self) -> tuple[str, ...]:
        """Words that the tokenizer must know."""
        return (self.word,)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """None: the word is the whole trigger."""
        return {}

    def apply(self, texts: list[str], arrays: dict[str, Tensor]) -> list[str]:
        """Put the word into each text."""
        return [insert(text, [self.word], self.place, self.place_seed) for text in texts]
