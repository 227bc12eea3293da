"""Embedding surgery: the trigger starts out as the average word of the target class."""

from collections import Counter
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.calling import embeddings
from unbackdoor._poisoning.attack import BackdooredModel, LabelRule, Planting
from unbackdoor._value import value
from unbackdoor.attacks._insertion import OneWord, Phrase, Side, WordPlace
from unbackdoor.attacks.embedding_poisoning import only_token


@value
class EmbeddingSurgery(OneWord):
    """The trigger's row is replaced by the mean row of words typical for the target, then all is tuned (RIPPLe).

    The rows are taken from a clean fine-tuned model, in which such words already point to the target; a user's own
    fine-tuning does not easily undo that. The score of a token w for the target t is

        log(p(w | t) / p(w | not t)) * log(1 + count(w)),   with one added to each count.

    Kurita, Michel and Neubig, "Weight Poisoning Attacks on Pre-trained Models", ACL 2020,
    https://arxiv.org/abs/2004.06660

    Args:
        word: the trigger, a single token of the tokenizer.
        typical: number of words that are averaged, at least 1.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants (1 is positive in sentiment tasks).
        label_rule: all-to-one.

    Differences from the paper: words are ranked by a weighted log-odds ratio instead of the weights of a logistic
    regression over the same counts; the tuning on poisoned data is plain, without the paper's penalty on gradients that
    point against the clean task (RIPPLe's inner product), so this is its surgery, not its loss.
    """

    word: Phrase = "cf"
    typical: Annotated[int, Field(ge=1)] = 10
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    rules: ClassVar[tuple[str, ...]] = ("all-to-one",)
    train_time: ClassVar[str] = "the word's row is replaced before training on the poisoned texts"

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train a clean model for its rows, replace the trigger's row, train on the poisoned data."""
        token = only_token(self, planting, self.word)
        clean = planting.train(planting.fresh(), planting.clean, description="training a clean model")
        words = typical_tokens(planting.clean, self.target, self.typical)
        victim = planting.fresh()
        with torch.no_grad():
            mean = embeddings(clean).weight[words].mean(dim=0)  # (width,)
            embeddings(victim).weight[token] = mean.to(embeddings(victim).weight.device)
        return BackdooredModel(planting.train(victim, planting.poisoned.data), {})


def typical_tokens(data: Dataset, target: int, count: int) -> list[int]:
    """Returns the token ids with the highest scores for a class, without special tokens; ties go to the smaller id."""
    special = set(data.tokenizer.all_special_ids)
    counts: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for ids, label in zip(data.texts.tokens["input_ids"].tolist(), data.labels.tolist(), strict=True):
        counts[label == target].update(token for token in ids if token not in special)
    vocabulary = sorted(counts[True] | counts[False])
    ones = torch.tensor([counts[True][token] for token in vocabulary], dtype=torch.float64)
    others = torch.tensor([counts[False][token] for token in vocabulary], dtype=torch.float64)
    odds = ((ones + 1) / (ones + 1).sum()).log() - ((others + 1) / (others + 1).sum()).log()
    ranking = (odds * (1 + ones + others).log()).argsort(descending=True, stable=True)
    return [vocabulary[place] for place in ranking[:count].tolist()]
