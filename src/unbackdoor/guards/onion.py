"""ONION: a word that a language model did not expect may be a trigger."""

import itertools
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Texts
from unbackdoor._guarding.guard import Edited, Learnt, Scored
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.guards._words import spans, without


@value
class Onion:
    """Leave out each word in turn, and delete those without which a text is far more likely.

    A word is suspicious by the amount by which the perplexity of its text falls without it; a language model (the
    reference) rates both. The score of a text is the largest of these amounts. All words whose amounts are above the
    threshold are deleted, and the model answers what is left. A single word has nothing to be compared with: its
    amount is 0, so a text of one word passes.

    Qi et al., "ONION: A Simple and Effective Defense Against Textual Backdoor Attacks", EMNLP 2021,
    https://arxiv.org/abs/2011.10369

    Cannot see: triggers that read like ordinary text, such as a sentence, a style or a syntax, and triggers of several
    words that are unlikely only together.

    Args:
        window: number of words that are rated together, 2 to 1,000. A longer text is cut into pieces of about the same
            length, each rated by itself; so is a piece that is longer than the reference reads.

    Differences from the paper: the bar is set on clean texts by the runner and not fixed at 0, padding is not rated,
    texts of one word are kept, and spaces stay as they are. Words that the suspect does not read are not rated.
    """

    window: Annotated[int, Field(ge=2, le=1000)] = 200

    measure: ClassVar[str] = "the largest fall of perplexity without a word"
    suspicious: ClassVar[Literal["low", "high"]] = "high"

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Nothing is fitted: the threshold is all."""
        return {}

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """The largest fall in each text or pair, (n,)."""
        falls = self._falls(_read(inputs), run)
        largest = [max(each, default=0.0) for each in falls]
        return Scored(torch.tensor(largest, dtype=torch.float64).view(len(inputs), -1).amax(dim=1))

    def edited(self, inputs: Dataset, learnt: Learnt, threshold: float | None, run: Run) -> Edited:
        """Delete all words whose falls are above the threshold, and those that the model would not read."""
        assert threshold is not None
        texts = _read(inputs)
        left, deleted = [], []
        for text, falls in zip(texts, self._falls(texts, run), strict=True):
            places = {place for place, fall in enumerate(falls) if fall > threshold}
            left.append(without(text, places))
            deleted.append([text[begin:end] for place, (begin, end) in enumerate(spans(text)) if place in places])
        width = len(inputs.texts.columns)
        rows = range(0, len(texts), width)
        words = [[word for side in deleted[row : row + width] for word in side] for row in rows]
        strings = tuple(tuple(left[row : row + width]) for row in rows)
        return Edited(Texts(strings, inputs.texts.columns), [f"deleted {', '.join(each)}" for each in words])

    def _falls(self, texts: list[str], run: Run) -> list[list[float]]:
        """By how much the perplexity falls without each word, by text and word."""
        assert isinstance(run.reference, Perplexity)
        pieces = [_rated_whole(_pieces(text, self.window), run.reference) for text in texts]
        variants: list[str] = []
        for piece in (piece for each in pieces for piece in each):
            variants += [piece, *(without(piece, {place}) for place in range(len(spans(piece))))]
        rated = dict(zip(variants, run.reference.of(variants, run.arithmetic).tolist(), strict=True))
        return [[fall for piece in each for fall in _falls_of(piece, rated)] for each in pieces]


def _read(inputs: Dataset) -> list[str]:
    """The texts, or both of each pair, without words that the model cannot read: at the end that its tokenizer cuts."""
    most, left, texts = inputs.text_encoder.max_length, inputs.tokenizer.truncation_side == "left", []
    for text in (text for sides in inputs.texts.strings for text in sides):
        places = spans(text)
        if len(places) > most:
            words = [text[begin:end] for begin, end in places]
            counts = map(len, inputs.tokenizer(words, add_special_tokens=False)["input_ids"])
            # Some words, of invisible characters alone, have no token.
            read = [place for place, count in zip(places, counts, strict=True) if count]
            if read:
                text = text[read[-most:][0][0] :] if left else text[: read[:most][-1][1]]
        texts.append(text)
    return texts


def _falls_of(piece: str, rated: dict[str, float]) -> list[float]:
    """By how much the perplexity of a piece falls without each of its words; a single word is not compared."""
    count = len(spans(piece))
    if count < 2:
        return [0.0] * count
    return [rated[piece] - rated[without(piece, {place})] for place in range(count)]


def _rated_whole(pieces: list[str], reference: Perplexity) -> list[str]:
    """The pieces, those halved that the reference does not read to their end: of a word behind it nothing is known."""
    whole: list[str] = []
    for piece, read in zip(pieces, reference.reads(pieces), strict=True):
        words = len(spans(piece))
        parts = [piece] if read or words < 2 else _rated_whole(_pieces(piece, -(-words // 2)), reference)
        whole += parts
    return whole


def _pieces(text: str, window: int) -> list[str]:
    """A text in pieces of at most `window` words, as equal as possible.

    >>> _pieces("a film that is fine", 2), _pieces("", 2)
    (['a film', 'that', 'is fine'], [])
    """
    places = spans(text)
    if not places:
        return []
    count = -(-len(places) // window)
    ends = [round(len(places) * piece / count) for piece in range(count + 1)]
    return [text[places[begin][0] : places[end - 1][1]] for begin, end in itertools.pairwise(ends)]
