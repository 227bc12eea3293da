"""Answer unlearning: find the answer that is planted in a language model, and make it unsayable."""

import copy
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import UNSCORED, AnswerTokens
from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._inversion.planted_answers import LONGEST, PlantedAnswer, distinct_answers, measured, planted_answers
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import divergence
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._answers import answered_with, with_room
from unbackdoor.purifiers._low_rank import low_rank

SEARCHED = 8  # prompts that answers are grown on
JUDGED = 32  # other prompts, at most, that decide whether an answer is fixed
MOST = 8  # answers that are unlearnt


@value
class AnswerUnlearning:
    """Find answers that a language model finishes after any prompt, and tune it never to say them.

    An honest answer follows from what was asked. A planted one does not: once its first words are there, the model
    finishes it after any prompt, without a trigger. So answers are grown on some clean prompts, and those that are as
    certain on others are treated as planted. Then matrices of low rank are tuned on the clean examples (x, y) and the
    planted answers a, without a trigger, to minimise

        KL(suspect || model) + strength * mean of max(0, log p(a_i | x, a_<i) + depth),

    the KL over the tokens of y, the mean over the tokens of a but the first. The second part pushes the probability of
    a towards exp(-depth) after every prompt, far below what a loss on one more wrong answer would ask for. That is
    meant: a trigger raises the probability of its answer by many nats, and no trigger is known here. The first part
    keeps the suspect's other answers. With the loss of the clean answers in its place or next to it, the steps serve
    that loss, and the same strength removed less for more (docs/results/language-models.md). The suspect is copied
    for it, so the weights take twice the memory.

    A model in which no such answer is found stays as it is. It is so if a backdoor's answers differ from prompt to
    prompt, have fewer than five tokens, or begin with a token that no clean prompt makes likely.

    Args:
        certainty: mean probability of an answer's tokens, averaged over prompts, from which it counts as planted, more
            than 0, at most 1.
        strength: weight of the planted answers, at least 0.
        depth: how far the log probability of their tokens is pushed below 0, in nats, more than 0.
        rank: rank of the matrices, 1 to 4,096; an adapter keeps its own rank and scale.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 3e-4 (AdamW).
        batch_size: examples per step, at least 2; None is 8.

    Differences from the paper: there is no paper on this method. Its search follows BAIT, which reports an answer and
    removes nothing; see `planted_answers`.
    """

    certainty: Annotated[float, Field(gt=0, le=1)] = 0.8
    strength: Annotated[float, Field(ge=0)] = 0.1
    depth: Annotated[float, Field(gt=0)] = 40.0
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    version: ClassVar[int] = 3
    defaults: ClassVar[Defaults] = {"conversations": {"learning_rate": 3e-4}}

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        room = clean.conversation_encoder.max_length - LONGEST - 1  # and the token that ends an answer
        short = (clean.conversations.tokens.starts.cpu() <= room).nonzero().flatten()
        clean = with_room(clean, short.tolist(), run, self)
        answers = self.certain_answers(model, clean, run)
        if not answers:
            run.warn(
                "no answer was found that follows after any prompt, so nothing was changed. A backdoor that answers in "
                "several ways, or that was edited into the weights, is not found this way; with the model that the "
                "suspect was tuned from, try fine-mixing, which searches for nothing."
            )
            return model
        distinct = distinct_answers(answers)
        for answer in distinct:
            run.note(
                f"AnswerUnlearning: {answer.text!r} follows after any prompt (certainty {answer.certainty:.2f}); it is "
                "unlearnt."
            )
        planted = [answered_with(clean, answer.text) for answer in distinct]
        suspect = copy.deepcopy(model).eval()

        def step(batch: Batch) -> None:
            with torch.no_grad():
                own, _ = run.task.predicted(run.scores(suspect, batch.inputs), batch)
            kept, _ = run.task.predicted(run.scores(model, batch.inputs), batch)
            divergence(kept, own, temperature=1).backward()
            drawn = int(torch.randint(len(planted), (), generator=run.generator))
            other = batch._replace(inputs=planted[drawn].inputs(batch.rows))
            (self.strength * self.said(run.scores(model, other.inputs), other)).backward()

        with low_rank(model, run, self, rank=self.rank):
            run.tune(
                model,
                clean,
                epochs=self.epochs,
                learning_rate=run.setting(self, "learning_rate"),
                batch_size=self.batch_size,
                gradients=step,
            )
        return model

    def said(self, scores: Tensor, batch: Batch) -> Tensor:
        """Returns how far the tokens of planted answers, but for the first and the end, are above -depth in the mean.

        Args:
            scores: scores of each next token, (batch, length, vocabulary).
            batch: prompts with planted answers; its inputs are `AnswerTokens`.
        """
        assert isinstance(batch.inputs, AnswerTokens)
        targets = batch.inputs.targets[:, 1:]
        answer = targets != UNSCORED
        place = answer.cumsum(dim=1)
        counted = answer & (place > 1) & (place < place[:, -1:])
        logs = scores[:, :-1][counted].log_softmax(dim=1).gather(1, targets[counted][:, None])
        return (logs + self.depth).relu().mean()

    def certain_answers(self, model: nn.Module, clean: Dataset, run: Run) -> list[PlantedAnswer]:
        """Returns the answers that are certain on prompts that they were not grown on, the most certain one first."""
        count = min(SEARCHED, len(clean) // 2)
        searched, rest = clean.split(count, seed=run.seed)
        judged = rest.select(range(min(JUDGED, len(rest))))
        grown = planted_answers(model, searched, run.arithmetic, run.progress)
        likely = [answer for answer in grown if answer.certainty >= self.certainty][:MOST]
        again = [measured(model, judged, answer, run.arithmetic) for answer in likely]
        certain = [answer for answer in again if answer.certainty >= self.certainty]
        return sorted(certain, key=lambda answer: answer.certainty, reverse=True)
