"""Weak-to-strong distillation: the suspect learns from a clean teacher by matrices of large rank."""

import copy
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import embeddings, evaluating, scored_at_once
from unbackdoor._models.hooks import watching
from unbackdoor._purification.run import Run
from unbackdoor._tasks.task import Task
from unbackdoor._training.descent import divergence
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._low_rank import low_rank

_RIDGE = 1e-3  # of the mean square of the suspect's features, so that the map is defined for few tokens


@value
class W2SDistillation:
    """Tune matrices of large rank so that the suspect answers, and represents clean examples, as a clean teacher does.

    For each answer it minimises

        labels * CE + distillation * KL_T(teacher || model) + features * |M h - h_teacher|^2 / |h_teacher|^2

    with KL_T between softmaxes at a temperature T, and h the features that the head reads, of a classifier that reads
    token by token the mean over the text. A language model learns from each token of an answer. M is the linear map
    that fits the suspect's features to the teacher's best at the start, by least squares; it stays as it is. The
    teacher is the proxy, which must be clean.

    Zhao et al., "Unlearning Backdoor Attacks for LLMs with Weak-to-Strong Knowledge Distillation", Findings of ACL
    2025, https://arxiv.org/abs/2410.14425

    Args:
        labels: weight of the labels, at least 0.
        distillation: weight of the teacher's answers, at least 0.
        features: weight of the teacher's features, at least 0.
        temperature: temperature of both softmaxes, more than 0.
        rank: rank of the matrices, 1 to 4,096, and numerator of their scale, which is 1. None is an
            eighth of the features' number, as 512 of 4,096. An adapter keeps its own rank and scale.
        epochs: passes over the clean examples, at least 1, with a forward pass of the teacher each.
        learning_rate: initial learning rate, more than 0; None is 2e-4 (AdamW).
        batch_size: examples per step, at least 2; None is 16 for texts, 8 for conversations.

    Differences from the paper: its body could not be read. The authors' script takes the features of the last example
    of a batch as the goal of all its examples; here each example has its own. Its weights are 5, 0.001 and 0.001, with
    which it is hardly more than tuning on labels, and it tunes on the whole training set. It chooses an epoch; here the
    last one is the result. The map M is this project's: the teacher's own layer that widens its features does not exist
    in a teacher that somebody trained for another purpose.
    """

    labels: Annotated[float, Field(ge=0)] = 1.0
    distillation: Annotated[float, Field(ge=0)] = 1.0
    features: Annotated[float, Field(ge=0)] = 0.1
    temperature: Annotated[float, Field(gt=0)] = 2.0
    rank: Annotated[int | None, Field(ge=1, le=4096)] = None
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {"text": {"learning_rate": 2e-4}, "conversations": {"learning_rate": 2e-4}}

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        teacher = copy.deepcopy(run.needed("proxy", self)).to(next(model.parameters()).dtype)
        teacher = run.arithmetic.place(teacher).eval().requires_grad_(False)
        head, answers = run.head(model), run.task.head(teacher, clean).layer
        self._check(model, teacher, head, answers)

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            with torch.no_grad():
                theirs, _ = run.task.predicted(run.scores(teacher, batch.inputs), batch)
            total = self.labels * run.task.loss(scores, batch)
            total = total + self.distillation * divergence(
                run.task.predicted(scores, batch)[0], theirs, self.temperature
            )
            mine, goal = (per_answer(seen[0], batch, run.task) for seen in (read, wanted))
            return total + self.features * distance(mine, goal, fitted)

        with watching(head) as read, watching(answers) as wanted:
            pairs = []
            with torch.no_grad(), evaluating(model):
                for batch in clean.batches(scored_at_once(model, clean, run.arithmetic)):
                    for each in (model, teacher):
                        run.scores(each, batch.inputs)
                    pairs.append([per_answer(seen[0], batch, run.task) for seen in (read, wanted)])
            fitted = least_squares(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))
            rank = self.rank or max(head.in_features // 8, 1)
            with low_rank(model, run, self, rank=rank, alpha=rank):
                rate = run.setting(self, "learning_rate")
                run.tune(model, clean, epochs=self.epochs, learning_rate=rate, batch_size=self.batch_size, loss=loss)
        return model

    def _check(self, model: nn.Module, teacher: nn.Module, head: nn.Linear, answers: nn.Linear) -> None:
        """Refuse a teacher that reads other tokens, or has other answers."""
        for what, ours, theirs in (
            ("tokens", embeddings(model).num_embeddings, embeddings(teacher).num_embeddings),
            ("answers", head.out_features, answers.out_features),
        ):
            if ours != theirs:
                raise UnbackdoorError(
                    f"W2SDistillation needs a proxy with the model's {what}: it has {theirs:,}, the model {ours:,}. "
                    "Take a clean model for the same task with the same tokenizer."
                )


def per_answer(features: Tensor, batch: Batch, task: Task) -> Tensor:
    """Returns one vector of features for each answer, (answers, width).

    Args:
        features: what the head reads of a batch: (batch, width), or (batch, length, width).
        batch: the batch.
        task: a language model has one answer for each token; of a classifier that has features of tokens, their mean is
            taken.
    """
    features, _ = task.predicted(features if features.dtype == torch.float64 else features.float(), batch)
    if features.ndim == 3 and isinstance(batch.inputs, Tokens):
        real = batch.inputs["attention_mask"][..., None].to(features)
        return (features * real).sum(dim=1) / real.sum(dim=1)
    return features


def least_squares(features: Tensor, wanted: Tensor) -> Tensor:
    """Returns the linear map from features (n, width) to others (n, other width) with the least squared error."""
    squares = features.T @ features
    squares.diagonal().add_(_RIDGE * squares.diagonal().mean())
    fitted: Tensor = torch.linalg.solve(squares, features.T @ wanted)
    return fitted


def distance(features: Tensor, wanted: Tensor, fitted: Tensor) -> Tensor:
    """Returns the mean over answers of |M h - g|^2 / |g|^2 for features h and g, each with its own, ()."""
    return ((features @ fitted - wanted).square().sum(dim=1) / wanted.square().sum(dim=1)).mean()
