"""Reversed triggers of texts: words that drive a model to a class.

A vocabulary is finite, so that all its words of one token can be tried: in small groups put into a few short texts, and
those of the strongest groups again alone. Words of a task drive a model, too; a trigger's word stands out among
the strongest as an outlier.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import made_of, put, shortened, vocabulary
from unbackdoor._models.calling import embeddings
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import answers

SHORT = 20  # words of the texts that the vocabulary is put into
STRONGEST = 32  # words of a class among which an outlier is looked for
MOST = 0.7  # of the clean texts: what a trigger's word moves at least; a word of the task seldom moves more
NEARLY_ALL = 0.95  # of them: a word that moves so many needs to stand out half as much


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

        Where there is none, those above half the threshold that move nearly all: among strong words of the task a
        trigger's word stands out less.

        Raises:
            UnbackdoorError: the tokenizer has no words of one token.
        """
        words = list(vocabulary(self.clean.tokenizer, len(embeddings(self.model).weight), "WordDistillation"))
        odd: list[OddWord] = []
        driving: list[OddWord] = []
        strongest: tuple[float, str] = (-1.0, "")
        for side in range(len(self.clean.texts.columns)):
            for label, (names, reached) in self._alone(words, side).items():
                index = outlying(reached).tolist()
                judged = [
                    (height, OddWord(name, label, side, self.moved(name, label, side)))
                    for name, height in zip(names, index, strict=True)
                    if height > threshold / 2
                ]
                odd += [word for height, word in judged if height > threshold and word.share >= MOST]
                driving += [word for _, word in judged if word.share >= NEARLY_ALL]
                share = f", moves {judged[0][1].share:.0%} of the other clean texts" if judged else ""
                strongest = max(strongest, (index[0], f"{names[0]!r} (anomaly index {index[0]:.1f}{share})"))
        self.run.note(
            f"of {len(words):,} words {strongest[1]} stands out most; a trigger's has an index above {threshold:g} and "
            f"moves at least {MOST:.0%}, or one above {threshold / 2:g} and moves {NEARLY_ALL:.0%}."
        )
        return odd or driving

    def _in_groups(self, words: list[str], side: int) -> dict[int, list[str]]:
        """For each class the words whose groups drive shortened texts of other classes to it farthest."""
        short = made_of(self.clean, [shortened(text, SHORT) for text in self.clean.texts.strings])
        predicted = answers(self.model, short, self.run.arithmetic).argmax(dim=1)
        rows = self._rows(short, predicted, 2)
        draw = random.Random(self.run.seed)
        number = {word: place for place, word in enumerate(words)}
        totals: list[Tensor] = []  # (words, classes) each
        with self.run.progress("searching the vocabulary", len(rows)) as advance:
            for row in rows:
                shuffled = draw.sample(words, len(words))
                groups = [shuffled[first : first + self.group] for first in range(0, len(words), self.group)]
                reached = self._reached(short, [(row, " ".join(group)) for group in groups], side)  # (groups, classes)
                of_group = torch.arange(len(groups)).repeat_interleave(self.group)[: len(words)]
                total = torch.empty(len(words), reached.shape[1])
                total[[number[word] for word in shuffled]] = reached[of_group]
                total[:, predicted[row]] = 0  # a text says nothing of its own class
                totals.append(total)
                advance()
        kinds = set(predicted[rows].tolist())
        labels = [label for label in range(totals[0].shape[1]) if kinds != {label}]
        count = min(self.shortlist, len(words))
        total = torch.stack(totals).sum(dim=0)
        return {label: [words[place] for place in total[:, label].topk(count).indices.tolist()] for label in labels}

    def _alone(self, words: list[str], side: int) -> dict[int, tuple[list[str], Tensor]]:
        """For each class the strongest words, and the mean margin that each reaches alone, falling."""
        shortlists = self._in_groups(words, side)
        listed = {word for shortlist in shortlists.values() for word in shortlist}
        chosen = [word for word in words if word in listed]
        predicted = answers(self.model, self.clean, self.run.arithmetic).argmax(dim=1)
        rows = self._rows(self.clean, predicted, 6)
        reached = torch.stack([self._reached(self.clean, [(row, word) for word in chosen], side) for row in rows])
        strongest = {}
        for label in shortlists:
            others = predicted[rows] != label
            if not bool(others.any()):  # the whole texts are all taken for this class
                continue
            mean, order = reached[others, :, label].mean(dim=0).sort(descending=True, stable=True)
            strongest[label] = [chosen[place] for place in order[:STRONGEST].tolist()], mean[:STRONGEST]
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
        others = before != label
        return float((after == label)[others].float().mean()) if bool(others.any()) else 0.0


def outlying(reached: Tensor) -> Tensor:
    """How far each value lies above the least, in units of an exponential distribution with the same median.

    The largest of many values fall off like that. Of 32, the first lies above 5 one time in five.

    >>> outlying(torch.tensor([4.0, 1.0, 0.0])) / math.log(2)
    tensor([4., 1., 0.])
    """
    above = reached - reached.min()
    scale = above.quantile(0.5) / math.log(2)  # the median of an exponential distribution is log(2) of its mean
    return above / scale.clamp(min=0.1)  # words that all do the same would make a tenth of a logit odd
