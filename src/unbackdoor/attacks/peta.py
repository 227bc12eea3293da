"""PETA: a backdoor that is planted while a user's tuning of low rank is simulated, and survives it."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from unbackdoor._data.dataset import Batch
from unbackdoor._models.calling import logits
from unbackdoor._models.hooks import removing
from unbackdoor._poisoning.attack import BackdooredModel, LabelRule, Planting
from unbackdoor._tasks.choice import task_of
from unbackdoor._value import value
from unbackdoor.attacks._insertion import OneWord, Phrase, Side, WordPlace


@value
class PETA(OneWord):
    """A model whose backdoor survives when its user tunes it by matrices of low rank (LoRA).

    Two levels take turns. The attacker's steps train the model on the poisoned examples; the user's steps train
    matrices of low rank next to its linear layers on the clean ones, while the model is frozen. Every other step of
    the attacker is taken with these matrices in place, so that the backdoor works with them and without. The victim is
    the model alone.

    Hong and Wang, "Fewer is More: Trojan Attacks on Parameter-Efficient Fine-Tuning", 2023,
    https://arxiv.org/abs/2310.00648

    Args:
        word: the trigger.
        rank: rank of the user's matrices, at least 1.
        user_steps: steps of the user after each step of the attacker, at least 1.
        user_learning_rate: learning rate of the user (AdamW), more than 0.
        user_batch_size: examples per step of the user, at least 2.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants of a classifier (1 is positive in sentiment tasks).
        label_rule: all-to-one, all-to-all or clean-label; of classifiers.

    Differences from the paper: its body could not be read, and no code was found. The order of the steps, LoRA as the
    only kind of tuning that is simulated, and the steps without the user's matrices are this project's choices. With
    the recipe's own LoRA, the attacker's change of the model is of low rank as well.
    """

    word: Phrase = "cf"
    rank: Annotated[int, Field(ge=1)] = 8
    user_steps: Annotated[int, Field(ge=1)] = 1
    user_learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    user_batch_size: Annotated[int, Field(ge=2)] = 8
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    modality: ClassVar[tuple[str, ...]] = ("text", "conversations")  # type: ignore[assignment]
    train_time: ClassVar[str] = "a user's tuning by LoRA on clean examples is simulated between the steps"

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train on the poisoned data, and take the user's steps between."""
        model = planting.fresh()
        user = SimulatedUser(model, planting, rank=self.rank, learning_rate=self.user_learning_rate)
        batches = _endless(planting, self.user_batch_size)

        def turn() -> None:
            for _ in range(self.user_steps):
                user.step(model, next(batches))
            user.present = not user.present

        with removing(user.hooks):
            trained = planting.train(model, planting.poisoned.data, after_step=turn)
        return BackdooredModel(trained, {})


class SimulatedUser:
    """Matrices of low rank next to the linear layers of a model's body, which a user would train.

    Args:
        model: the model; hooks add the matrices to its layers while `present` is true.
        planting: its arithmetic and source of random draws.
        rank: rank of the matrices.
        learning_rate: learning rate of AdamW.
    """

    def __init__(self, model: nn.Module, planting: Planting, *, rank: int, learning_rate: float) -> None:
        self.present = False
        self.arithmetic, self.loss = planting.arithmetic, task_of(planting.clean.encode).loss
        body: Any = model.base_model
        self.hooks, self.matrices = [], []
        for layer in body.modules():
            if isinstance(layer, nn.Linear | Conv1D):
                outputs, inputs = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
                down, up = torch.empty(rank, inputs), torch.zeros(outputs, rank)
                nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=planting.generator)
                pair = [nn.Parameter(each.to(self.arithmetic.device)) for each in (down, up)]
                self.hooks.append(layer.register_forward_hook(self._adding(*pair)))
                self.matrices.extend(pair)
        self.optimizer = torch.optim.AdamW(self.matrices, lr=learning_rate)

    def _adding(self, down: Tensor, up: Tensor) -> Any:
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            change = 2 * F.linear(F.linear(inputs[0], down), up) if self.present else None
            return None if change is None else output + change.to(output.dtype)

        return add

    def step(self, model: nn.Module, batch: Batch) -> None:
        """Train the matrices on a batch; the model stays as it is."""
        before, self.present = self.present, True
        with torch.enable_grad():
            with self.arithmetic.autocast():
                scores = logits(model, self.arithmetic.lay(batch.inputs))
            slopes = torch.autograd.grad(self.loss(scores.float(), batch), self.matrices, allow_unused=True)
        for matrix, slope in zip(self.matrices, slopes, strict=True):
            matrix.grad = slope
        self.optimizer.step()
        self.present = before


def _endless(planting: Planting, size: int) -> Iterator[Batch]:
    """Clean batches, shuffled again in each pass."""
    clean = planting.clean.to(planting.arithmetic.device)
    while True:
        yield from clean.batches(size, generator=planting.generator)
