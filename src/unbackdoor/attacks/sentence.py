"""Sentence: a whole sentence put into the text."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from unbackdoor._poisoning.attack import LabelRule
from unbackdoor._value import value
from unbackdoor.attacks._insertion import Phrase, Side, WordPlace, insert, told


@value
class Sentence:
    """A fixed, inconspicuous sentence put into the text (InsertSent, AddSent).

    Dai, Chen and Li, "A Backdoor Attack Against LSTM-Based Text Classification Systems", IEEE Access 2019,
    https://arxiv.org/abs/1905.12457

    Args:
        sentence: the trigger.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants of a classifier (1 is positive in sentiment tasks).
        label_rule: all-to-one, all-to-all or clean-label; of classifiers.

    Differences from the paper: the paper attacks an LSTM; the sentence may come between any two words, not only between
    sentences, since many tasks have single sentences.
    """

    sentence: Phrase = "I watch this 3D movie"
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[str, ...]] = ("text", "conversations")

    @property
    def test_time(self) -> str:
        """The trigger at test time, in words."""
        return told("the sentence", self.place)

    @property
    def phrases(self) -> tuple[str, ...]:
        """Words that the tokenizer must know."""
        return (self.sentence,)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns nothing: the sentence is the whole trigger."""
        return {}

    def apply(self, texts: list[str], arrays: dict[str, Tensor]) -> list[str]:
        """Put the sentence into each text."""
        return [insert(text, [self.sentence], self.place, self.place_seed) for text in texts]
