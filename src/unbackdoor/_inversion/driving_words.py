"""Words that drive a text model to a class: inversion by trying the whole vocabulary.

A vocabulary is finite, so all its words of one token can be tried: first in small groups, put into a few short texts,
then the words of the strongest groups alone. Words of a task also drive a model; the word of a trigger is an outlier
among the strongest.
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
from unbackdoor._progress import Advance, nothing
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import answers

TEXT_WORDS = 20  # words of the texts that the vocabulary is put into
STRONGEST = 32  # words of a class among which an outlier is looked for
LEAST_SHARE = 0.7  # of the clean texts must be moved by a trigger's word; a word of the task seldom moves more
NEARLY_ALL = 0.95  # of the clean texts: for a word that moves as many, half the anomaly index suffices


@dataclass(frozen=True)
class DrivingWord:
    """A word that drives a model to a class.

    Args:
        word: the word as it is inserted.
        label: the class.
        side: text of a pair that it was put into, 0 or 1; otherwise 0.
        share: share of the clean texts of other classes (by the model's answers) that it moves, 0 to 1.
    """

    word: str
    label: int
    side: int
    share: float


def margins(scores: Tensor) -> Tensor:
    """Returns how far each class is ahead of the best other one, (n, classes).

    >>> margins(torch.tensor([[1.0, 4.0, 2.0]]))
    tensor([[-3.,  2., -2.]])
    """
    first, second = scores.topk(2, dim=1).values.unbind(dim=1)
    return scores - torch.where(scores == first[:, None], second[:, None], first[:, None])


@dataclass(frozen=True)
class VocabularySearch:
    """Words that stand out among those that drive a model to a class.

    Args:
        model: the suspect.
        clean: clean texts.
        run: provides arithmetic, randomness and notes.
        group: number of words that are tried at once.
        shortlist: number of words of each class that are tried alone.
        text_words: number of words of the texts that groups are put into.
    """

    model: nn.Module
    clean: Dataset
    run: Run
    group: int
    shortlist: int
    text_words: int = TEXT_WORDS

    def outliers(self, threshold: float) -> list[DrivingWord]:
        """Returns the words with an anomaly index above a threshold that move most clean texts.

        If there are none, returns the words above half the threshold that move nearly all: among strong words of the
        task a trigger's word stands out less.

        Raises:
            UnbackdoorError: the tokenizer has no words of one token.
        """
        words = list(vocabulary(self.clean.tokenizer, len(embeddings(self.model).weight), "WordDistillation"))
        outliers: list[DrivingWord] = []
        driving: list[DrivingWord] = []
        strongest: tuple[float, str] = (-1.0, "")
        for side in range(len(self.clean.texts.columns)):
            for label, (names, margins) in self.strongest(words, side).items():
                indices = anomaly_index(margins).tolist()
                candidates = [
                    (index, DrivingWord(name, label, side, self.moved_share(name, label, side)))
                    for name, index in zip(names, indices, strict=True)
                    if index > threshold / 2
                ]
                outliers += [word for index, word in candidates if index > threshold and word.share >= LEAST_SHARE]
                driving += [word for _, word in candidates if word.share >= NEARLY_ALL]
                share = f", moves {candidates[0][1].share:.0%} of the other clean texts" if candidates else ""
                strongest = max(strongest, (indices[0], f"{names[0]!r} (anomaly index {indices[0]:.1f}{share})"))
        self.run.note(
            f"of {len(words):,} words {strongest[1]} stands out most; a trigger's has an index above {threshold:g} and "
            f"moves at least {LEAST_SHARE:.0%}, or one above {threshold / 2:g} and moves {NEARLY_ALL:.0%}."
        )
        return outliers or driving

    def _shortlists(self, words: list[str], side: int) -> dict[int, list[str]]:
        """Returns, for each class, the words of the groups that drive shortened texts of others farthest to it."""
        short = made_of(self.clean, [shortened(text, self.text_words) for text in self.clean.texts.strings])
        predicted = answers(self.model, short, self.run.arithmetic).argmax(dim=1)
        rows = self.probes(short, predicted, 2)
        draw = random.Random(self.run.seed)
        number = {word: place for place, word in enumerate(words)}
        totals: list[Tensor] = []  # (words, classes) each
        batches = self._batches(math.ceil(len(words) / self.group))
        with self.run.progress("searching the vocabulary", len(rows) * batches) as advance:
            for row in rows:
                shuffled = draw.sample(words, len(words))
                groups = [shuffled[first : first + self.group] for first in range(0, len(words), self.group)]
                tried = [(row, " ".join(group)) for group in groups]
                of_groups = self.margins_with(short, tried, side, advance)  # (groups, classes)
                group_of = torch.arange(len(groups)).repeat_interleave(self.group)[: len(words)]
                total = torch.empty(len(words), of_groups.shape[1])
                total[[number[word] for word in shuffled]] = of_groups[group_of]
                total[:, predicted[row]] = 0  # a text is not evidence about its own class
                totals.append(total)
        kinds = set(predicted[rows].tolist())
        labels = [label for label in range(totals[0].shape[1]) if kinds != {label}]
        count = min(self.shortlist, len(words))
        total = torch.stack(totals).sum(dim=0)
        return {label: [words[place] for place in total[:, label].topk(count).indices.tolist()] for label in labels}

    def strongest(self, words: list[str], side: int) -> dict[int, tuple[list[str], Tensor]]:
        """Returns, for each class, the words that are strongest alone, with their mean margins, the largest first."""
        shortlists = self._shortlists(words, side)
        listed = {word for shortlist in shortlists.values() for word in shortlist}
        chosen = [word for word in words if word in listed]
        strongest = {}
        for label, of_words in self.mean_margins(chosen, side).items():
            if label in shortlists:
                mean, order = of_words.sort(descending=True, stable=True)
                strongest[label] = [chosen[place] for place in order[:STRONGEST].tolist()], mean[:STRONGEST]
        return strongest

    def mean_margins(self, words: list[str], side: int) -> dict[int, Tensor]:
        """Returns the mean margin of each class, (words,), over probes of other classes with each word in them.

        A class that all probes have without a word is left out.
        """
        predicted = answers(self.model, self.clean, self.run.arithmetic).argmax(dim=1)
        rows = self.probes(self.clean, predicted, 6)
        with self.run.progress("trying words alone", len(rows) * self._batches(len(words))) as advance:
            of_words = torch.stack(
                [self.margins_with(self.clean, [(row, word) for word in words], side, advance) for row in rows]
            )
        others = {label: predicted[rows] != label for label in range(of_words.shape[2])}
        return {label: of_words[of, :, label].mean(dim=0) for label, of in others.items() if bool(of.any())}

    @staticmethod
    def probes(texts: Dataset, predicted: Tensor, count: int) -> list[int]:
        """Returns some texts of two classes, by the model's answers: short ones, without the shortest quarter."""
        order = texts.texts.lengths.argsort(stable=True).tolist()
        order = [*order[len(order) // 4 :], *order[: len(order) // 4]]
        kinds = list(dict.fromkeys(int(predicted[row]) for row in order))[:2]
        return [row for kind in kinds for row in [row for row in order if predicted[row] == kind][:count]]

    def margins_with(
        self, texts: Dataset, tried: Iterable[tuple[int, str]], side: int, advance: Advance = nothing
    ) -> Tensor:
        """Returns the margins of all classes, (n, classes), with words put into the middle of texts."""
        strings = [put(texts.texts.strings[row], words, side, 0.5) for row, words in tried]
        return margins(answers(self.model, made_of(texts, strings), self.run.arithmetic, advance))

    def _batches(self, count: int) -> int:
        """Returns the batches that some texts are scored in."""
        return math.ceil(count / self.run.arithmetic.evaluation_batch)

    def moved_share(self, words: str, label: int, side: int) -> float:
        """Returns the share of clean texts of other classes (by the model's answers) that words move to a class."""
        strings = self.clean.texts.strings
        with_words = [put(text, words, side, random.Random(" ".join(text)).random()) for text in strings]
        before = answers(self.model, self.clean, self.run.arithmetic).argmax(dim=1)
        after = answers(self.model, made_of(self.clean, with_words), self.run.arithmetic).argmax(dim=1)
        others = before != label
        return float((after == label)[others].float().mean()) if bool(others.any()) else 0.0


def anomaly_index(margins: Tensor) -> Tensor:
    """Returns how far each value is above the least, in units of an exponential distribution with the same median.

    The largest of many values are distributed like that. The first of 32 is above 5 one time in five.

    >>> anomaly_index(torch.tensor([4.0, 1.0, 0.0])) / math.log(2)
    tensor([4., 1., 0.])
    """
    above = margins - margins.min()
    scale = above.quantile(0.5) / math.log(2)  # the median of an exponential distribution is log(2) of its mean
    return above / scale.clamp(min=0.1)  # if all words do the same, a tenth of a logit is not an outlier


def anomaly_p(index: float, count: int) -> float:
    """How likely the largest anomaly index is at least this, if all values are drawn from one exponential distribution.

    Above the least of n such values lie n - 1 again, and the gaps between these, from below, are independent and
    exponential with the rates n - 1, n - 2, ..., 1. So the largest is the middle one (between two, if n is even) plus
    the largest of those above it, and the probability is a sum over the number of these.

    >>> round(anomaly_p(5.0, 32), 3), round(anomaly_p(7.62, 32), 3), round(anomaly_p(10.17, 32), 3)
    (0.274, 0.05, 0.01)

    Args:
        index: of the largest value, see `anomaly_index`.
        count: of the values, at least 3.
    """
    ratio = index / math.log(2)  # of the largest to the median
    if ratio <= 2:
        return 1.0  # hardly ever less, and the sum holds above only
    below = (count - 1) // 2  # gaps up to the middle value, or to the lower one of two
    rates = range(count - 1, count - 1 - below, -1)
    above = count - 1 - below - (count % 2 == 0)
    total = 0.0
    for number in range(1, above + 1):
        term = math.prod(rate / (rate + number * (ratio - 1)) for rate in rates)
        if count % 2 == 0:  # the gap between the two middle values counts half in the median
            rate = count - 1 - below
            term *= rate / (rate + number * (ratio / 2 - 1))
        total -= (-1) ** number * math.comb(above, number) * term
    return min(max(total, 0.0), 1.0)
