"""Reversed triggers of texts: words that drive a model to a class.

A vocabulary is finite, so that all its words of one token can be tried: in small groups put into a few short texts, and
those of the strongest groups again alone. Words of a task drive a model, too; a trigger's word stands out among
the strongest as an outlier.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._evaluate import answers
from unbackdoor._models import embeddings
from unbackdoor._purify import Run
from unbackdoor._text import Texts

Strings = tuple[str, ...]  # a text, or the two of a pair


@dataclass(frozen=True)
class OddWord:
    """A word that drives a model to a class.

    Args:
        word: as it stands in a text.
        label: the class.
        side: of a pair, the text that it was put into; else 0.
        share: of the clean texts of other classes, by the model's answers, those that it moves, 0 to 1.
    """

    word: str
    label: int
    side: int
    share: float


def vocabulary(tokenizer: Any, rows: int) -> dict[str, int]:
    """The words that are one token each, and their tokens.

    Args:
        tokenizer: of transformers.
        rows: of the embedding; tokens beyond have none.
    """
    special = set(tokenizer.all_special_ids)
    numbers = [number for number in sorted(tokenizer.get_vocab().values()) if number not in special and number < rows]
    words = [tokenizer.convert_tokens_to_string([token]).strip() for token in tokenizer.convert_ids_to_tokens(numbers)]
    before = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    read = tokenizer([f"a {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    return {word: n for word, n, ids in zip(words, numbers, read, strict=True) if word and ids[before:] == [n]}


def put(strings: Strings, words: str, side: int, place: float) -> Strings:
    """Texts with words in one of them, at a relative place, 0 to 1.

    >>> put(("a fine film", "so it is"), "cf", 1, 0.0)
    ('a fine film', 'cf so it is')
    """
    parts = strings[side].split(" ")
    parts.insert(round(place * len(parts)), words)
    return (*strings[:side], " ".join(parts), *strings[side + 1 :])


def made_of(clean: Dataset, strings: Sequence[Strings]) -> Dataset:
    """Texts read as the clean ones are; their labels say nothing."""
    return Dataset(
        items=Texts(tuple(strings), clean.texts.columns),
        labels=torch.zeros(len(strings), dtype=torch.int64, device=clean.labels.device),
        encode=clean.encode,
        classes=clean.classes,
        name=f"texts made of {clean.name}",
    )


def shortened(clean: Dataset, words: int) -> Dataset:
    """The first words of each text; of a pair, half of them from each."""
    share = max(1, words // len(clean.texts.columns))
    return made_of(clean, [tuple(" ".join(text.split(" ")[:share]) for text in pair) for pair in clean.texts.strings])


def readable(clean: Dataset) -> Dataset:
    """The texts; where the model does not read them to the end, so few words of all that it does.

    A word put behind the last one that is read would do nothing. A word is taken to be two tokens at most.
    """
    cut, limit = clean.texts.cut, getattr(clean.encode, "max_length", None)
    if cut is None or not bool(cut.any()) or limit is None:
        return clean
    return made_of(clean, shortened(clean, limit // 2).texts.strings)


def margins(scores: Tensor) -> Tensor:
    """How far each class is ahead of the best other, (n, classes).

    >>> margins(torch.tensor([[1.0, 4.0, 2.0]]))
    tensor([[-3.,  2., -2.]])
    """
    first, second = scores.topk(2, dim=1).values.unbind(dim=1)
    return scores - torch.where(scores == first[:, None], second[:, None], first[:, None])


@dataclass(frozen=True)
class Search:
    """Words that stand out among those that drive a model to a class.

    Args:
        model: the suspect.
        clean: texts.
        run: arithmetic, randomness, notes.
        group: words that are tried at once.
        shortlist: words of each class that are tried alone.
    """

    model: nn.Module
    clean: Dataset
    run: Run
    group: int
    shortlist: int

    def odd_words(self, threshold: float) -> list[OddWord]:
        """The words whose anomaly index is above a threshold and that move most clean texts.

        Raises:
            UnbackdoorError: the tokenizer has no words of one token.
        """
        words = list(vocabulary(self.clean.encode.tokenizer, len(embeddings(self.model).weight)))  # type: ignore[union-attr]
        if not words:
            raise UnbackdoorError(
                "WordDistillation needs a tokenizer with whole words among its tokens; this one has none. Try "
                "mixing-distillation."
            )
        found: list[OddWord] = []
        strongest: tuple[float, str] = (-1.0, "")
        for side in range(len(self.clean.texts.columns)):
            for label, (names, reached) in self._alone(words, side).items():
                index = outlying(reached).tolist()
                odd = [name for name, height in zip(names, index, strict=True) if height > threshold]
                moved = [OddWord(name, label, side, self.moved(name, label, side)) for name in odd]
                found += [word for word in moved if word.share >= MOST]
                share = f", moves {moved[0].share:.0%} of the other clean texts" if moved else ""
                strongest = max(strongest, (index[0], f"{names[0]!r} (anomaly index {index[0]:.1f}{share})"))
        self.run.note(
            f"of {len(words):,} words {strongest[1]} stands out most; a trigger's has an index above {threshold:g} and "
            f"moves at least {MOST:.0%}."
        )
        return found

    def _alone(self, words: list[str], side: int) -> dict[int, tuple[list[str], Tensor]]:
        """For each class the strongest words, and the mean margin that each reaches alone, falling."""
        short = shortened(self.clean, SHORT)
        predicted = answers(self.model, short, self.run.arithmetic).argmax(dim=1)
        rows = self._rows(short, predicted, 2)
        draw = random.Random(self.run.seed)
        number = {word: place for place, word in enumerate(words)}
        total, count = torch.empty(0), torch.empty(0)
        with self.run.progress("searching the vocabulary", len(rows)) as advance:
            for row in rows:
                shuffled = draw.sample(words, len(words))
                groups = [shuffled[first : first + self.group] for first in range(0, len(words), self.group)]
                reached = self._reached(short, [(row, " ".join(group)) for group in groups], side)  # (groups, classes)
                if len(total) == 0:
                    total, count = torch.zeros(len(words), reached.shape[1]), torch.zeros(reached.shape[1])
                other = torch.arange(reached.shape[1]) != predicted[row]  # a text says nothing of its own class
                of_word = torch.tensor([number[word] for group in groups for word in group])
                of_group = torch.tensor([place for place, group in enumerate(groups) for _ in group])
                total[of_word] += reached[of_group] * other
                count += other
                advance()
        tested = count.nonzero().flatten().tolist()
        best = {label: total[:, label].topk(min(self.shortlist, len(words))).indices.tolist() for label in tested}
        chosen = sorted({place for places in best.values() for place in places})
        predicted = answers(self.model, self.clean, self.run.arithmetic).argmax(dim=1)
        tried = self._rows(self.clean, predicted, 6)
        trials = [[(row, words[place]) for place in chosen] for row in tried]
        reached = torch.stack([self._reached(self.clean, trial, side) for trial in trials])
        strongest = {}
        for label in tested:
            others = predicted[torch.tensor(tried)] != label
            if not bool(others.any()):  # the whole texts are all taken for this class
                continue
            mean, order = reached[others, :, label].mean(dim=0).sort(descending=True, stable=True)
            strongest[label] = [words[chosen[place]] for place in order[:STRONGEST].tolist()], mean[:STRONGEST]
        return strongest

    @staticmethod
    def _rows(texts: Dataset, predicted: Tensor, count: int) -> list[int]:
        """Some texts of each of two classes, by the model's answers: short ones, but not the shortest quarter."""
        lengths = texts.texts.lengths
        assert lengths is not None
        order = lengths.argsort(stable=True).tolist()
        order = [*order[len(order) // 4 :], *order[: len(order) // 4]]
        kinds = list(dict.fromkeys(int(predicted[row]) for row in order))[:2]
        return [row for kind in kinds for row in [row for row in order if predicted[row] == kind][:count]]

    def _reached(self, texts: Dataset, tried: Iterable[tuple[int, str]], side: int) -> Tensor:
        """The margins of all classes, (n, classes), with words put into the middle of texts."""
        strings = [put(texts.texts.strings[row], words, side, 0.5) for row, words in tried]
        return margins(answers(self.model, made_of(texts, strings), self.run.arithmetic))

    def moved(self, words: str, label: int, side: int) -> float:
        """The share of the clean texts of other classes, by the model's answers, that words move to a class."""
        strings = self.clean.texts.strings
        places = [put(text, words, side, random.Random(" ".join(text)).random()) for text in strings]
        before = answers(self.model, self.clean, self.run.arithmetic).argmax(dim=1)
        after = answers(self.model, made_of(self.clean, places), self.run.arithmetic).argmax(dim=1)
        return float((after == label)[before != label].float().mean())


SHORT = 20  # words of the texts that the vocabulary is put into
STRONGEST = 32  # words of a class among which an outlier is looked for
MOST = 0.7  # of the clean texts: what a trigger's word moves at least; a word of the task seldom moves more


def outlying(reached: Tensor) -> Tensor:
    """How far each value lies above the least, in units of an exponential distribution with the same median.

    The largest of many values fall off like that. Of 32, the first lies above 5 one time in five.

    >>> outlying(torch.tensor([4.0, 1.0, 0.0])) / math.log(2)
    tensor([4., 1., 0.])
    """
    above = reached - reached.min()
    scale = above.quantile(0.5) / math.log(2)  # the median of an exponential distribution is log(2) of its mean
    return above / scale.clamp(min=0.1)  # words that all do the same would make a tenth of a logit odd
