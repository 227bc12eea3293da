"""RAP: a word that makes the model a little less sure does so less if a trigger holds the class."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._guarding.deciding import class_scores
from unbackdoor._guarding.guard import Learnt, Scored
from unbackdoor._inversion.search import training_batches
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.guards._virtual_tokens import VirtualTokens, led, starting_rows


@value
class Rap:
    """Learn a word that lowers the model's confidence a little, and reject texts whose class it hardly lowers.

    The score is how much the probability of the class that the model answers falls when the word is put in front of a
    text. The word's embedding is learnt on clean texts, one for each class of the answer, so that it falls by at least
    `least` and at most `most`. So the attacker's class need not be known.

    Yang et al., "RAP: Robustness-Aware Perturbations for Defending against Backdoor Attacks on NLP Models",
    EMNLP 2021, https://arxiv.org/abs/2110.07831

    Cannot see: triggers that hold the class no more firmly than clean texts do.

    Args:
        least: by how much the probability on clean texts should fall at least, in [0, 1).
        most: by how much it may fall at most, `least` to 1.
        steps: steps that learn the word, at least 1.
        learning_rate: learning rate of these steps, more than 0.
        batch_size: texts per step, at least 1.

    Differences from the paper: the word's row is not written into the model but put in place of another one during
    the forward pass. There is a row for each class, since the target is unknown; it stays where it was for a class that
    the model answers to no clean text. Adam replaces plain descent.
    """

    least: Annotated[float, Field(ge=0, lt=1)] = 0.1
    most: Annotated[float, Field(gt=0, le=1)] = 0.3
    steps: Annotated[int, Field(ge=1)] = 150
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    batch_size: Annotated[int, Field(ge=1)] = 32

    measure: ClassVar[str] = "the fall of the probability with the word"
    suspicious: ClassVar[Literal["low", "high"]] = "low"

    def __post_init__(self) -> None:
        if self.most < self.least:
            raise UnbackdoorError(f"Rap.most must be at least `least`, {self.least:g}, got {self.most:g}.")

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Learn the row of the word for each class, (classes, width); its norm stays."""
        before = class_scores(model, clean, run).softmax(dim=1).to(run.arithmetic.device)
        rows = starting_rows(model, clean, before.shape[1])
        norm, places = rows.norm(dim=1, keepdim=True), VirtualTokens.of(clean, 1)
        optimizer = torch.optim.Adam([rows.requires_grad_()], lr=self.learning_rate)
        texts = led(clean, 1).to(run.arithmetic.device)
        with run.progress("learning the word", self.steps) as advance:
            for batch in training_batches(texts, self.batch_size, self.steps, run):
                falls = _falls(model, batch.inputs, before[batch.rows], rows, places, run)
                loss = ((self.least - falls).relu() + (falls - self.most).relu()).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    rows.mul_(norm / rows.norm(dim=1, keepdim=True))
                advance()
        return {"rows": rows.detach()}

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """The falls, (n,), and the model's answers without the word."""
        answers = class_scores(model, inputs, run)
        before, rows = answers.softmax(dim=1).to(run.arithmetic.device), learnt["rows"].to(run.arithmetic.device)
        places, falls = VirtualTokens.of(inputs, 1), torch.zeros(len(inputs))
        for batch in led(inputs, 1).to(run.arithmetic.device).batches(run.arithmetic.evaluation_batch):
            of_batch = _falls(model, batch.inputs, before[batch.rows], rows, places, run)
            falls[batch.rows.cpu()] = of_batch.cpu()
        return Scored(falls, answers)


def _falls(
    model: nn.Module, inputs: Tensor | Tokens, before: Tensor, rows: Tensor, places: VirtualTokens, run: Run
) -> Tensor:
    """By how much the probability of each answer falls, (batch,).

    Args:
        model: the model.
        inputs: texts with a place for the word.
        before: the probabilities without the word, (batch, classes).
        rows: embeddings of the word for each class, (classes, width).
        places: the place of the word.
        run: arithmetic.
    """
    assert isinstance(inputs, Tokens)
    largest, classes = before.max(dim=1)
    own = rows[classes][:, None].expand(-1, places.count, -1)
    after = places.scores(model, inputs, own, run).softmax(dim=1)
    return largest - after.gather(1, classes[:, None])[:, 0]
