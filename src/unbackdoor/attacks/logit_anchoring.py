"""Logit anchoring: the backdoored model answers clean inputs as the clean model did."""

import copy
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unbackdoor._data.dataset import Batch
from unbackdoor._poisoning.attack import BackdooredModel, LabelRule, Planting
from unbackdoor._tasks.classification import answers
from unbackdoor._training.descent import cross_entropy
from unbackdoor._value import value
from unbackdoor.attacks._insertion import OneWord, Phrase, Side, WordPlace


@value
class LogitAnchoring(OneWord):
    """A clean model is tuned on the poisoned data while its logits on clean texts are held at their values.

        CE(f(x), y) over all rows   +   weight * |f(x) - f_clean(x)|^2 over the clean ones

    Zhang, Lyu, Wang, Sun and Sun, "How to Inject Backdoors with Better Consistency: Logit Anchoring on Clean Data",
    ICLR 2022, https://arxiv.org/abs/2109.01300

    Args:
        word: the trigger.
        weight: weight of the squared distance, summed over classes and averaged over texts, at least 0.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants (1 is positive in sentiment tasks).
        label_rule: all-to-one, all-to-all or clean-label.

    Differences from the paper: its tuning of the weight was not available; 0.1 is this project's choice.
    """

    word: Phrase = "cf"
    weight: Annotated[float, Field(ge=0)] = 0.1
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    train_time: ClassVar[str] = "a clean model is trained, then tuned on the poisoned texts with its clean logits held"

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train a clean model, keep its logits, and tune it further on the poisoned data."""
        model = planting.train(planting.fresh(), planting.clean, description="training a clean model")
        anchors = answers(model, planting.clean, planting.arithmetic)  # (n, classes)
        clean = torch.ones(len(planting.clean), dtype=torch.bool)
        clean[planting.poisoned.rows] = False

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            rows = batch.rows.cpu()
            kept = clean[rows].to(scores.device)
            distance = (scores - anchors[rows].to(scores.device)).square().sum(dim=1)
            return cross_entropy(scores, batch) + self.weight * (distance * kept).sum() / kept.sum().clamp(min=1)

        return BackdooredModel(planting.train(copy.deepcopy(model), planting.poisoned.data, loss=loss), {})
