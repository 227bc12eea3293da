"""PSIM: a side model that unlearnt to be sure of clean texts is still sure of texts with a trigger."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import NoHeadError
from unbackdoor._guarding.guard import Learnt, Scored
from unbackdoor._inversion.search import training_batches
from unbackdoor._models.hooks import removing
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.guards._virtual_tokens import VirtualTokens, led, starting_rows


@value
class Psim:
    """Teach a side model random classes of clean texts, and reject texts of which it is sure nevertheless.

    The side model is the suspect with virtual tokens in front of each text and a head of its own; these two alone are
    trained. The score is the largest class probability that it gives: 1 over the number of classes if it has learnt
    that clean texts say nothing.

    Zhao et al., "Defending Against Weight-Poisoning Backdoor Attacks for Parameter-Efficient Fine-Tuning", Findings of
    NAACL 2024, https://arxiv.org/abs/2402.12168

    Cannot see: triggers that move the features of a text no more than its own words do.

    Args:
        tokens: number of virtual tokens, 1 to 1,000.
        steps: steps that teach the side model, at least 1.
        learning_rate: learning rate of these steps, more than 0.
        batch_size: texts per step, at least 1.

    Differences from the paper: the threshold is set on held-out clean texts instead of 0.7, for any number of classes.
    Virtual tokens are learnt themselves, without an encoder of theirs. A text gets another random class each time it
    comes up, so that there is nothing to learn by heart. The rate and the steps are for a few hundred texts.
    """

    tokens: Annotated[int, Field(ge=1, le=1000)] = 5
    steps: Annotated[int, Field(ge=1)] = 150
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    batch_size: Annotated[int, Field(ge=1)] = 32

    measure: ClassVar[str] = "the largest probability of the side model"
    suspicious: ClassVar[Literal["low", "high"]] = "high"

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Learn the virtual tokens, (count, width), and the weight and the bias of the side model's head."""
        if not run.head_name:
            raise NoHeadError(
                f"{type(model).__name__} has no final linear layer that makes its logits, whose place Psim's own "
                "takes. Name one with `head`, or take strip."
            )
        places, head = VirtualTokens.of(clean, self.tokens), run.head(model)
        bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
        side = {"weight": head.weight.detach().float().clone(), "bias": bias.to(head.weight.device).float().clone()}
        side["tokens"] = starting_rows(model, clean, places.count)
        optimizer = torch.optim.Adam([array.requires_grad_() for array in side.values()], lr=self.learning_rate)
        texts = led(clean, self.tokens).to(run.arithmetic.device)
        with run.progress("teaching the side model", self.steps) as advance:
            for batch in training_batches(texts, self.batch_size, self.steps, run):
                scores = _side_scores(model, batch.inputs, side, places, run)
                labels = torch.randint(head.out_features, (len(batch.labels),), generator=run.generator)
                optimizer.zero_grad()
                F.cross_entropy(scores, labels.to(scores.device)).backward()
                optimizer.step()
                advance()
        return {name: array.detach() for name, array in side.items()}

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """The largest probabilities of the side model, (n,)."""
        device, places = run.arithmetic.device, VirtualTokens.of(inputs, self.tokens)
        side, surest = {name: array.to(device) for name, array in learnt.items()}, torch.zeros(len(inputs))
        for batch in led(inputs, self.tokens).to(device).batches(run.arithmetic.evaluation_batch):
            probabilities = _side_scores(model, batch.inputs, side, places, run).softmax(dim=1)
            surest[batch.rows.cpu()] = probabilities.amax(dim=1).cpu()
        return Scored(surest)


def _side_scores(
    model: nn.Module, inputs: Tensor | Tokens, side: dict[str, Tensor], places: VirtualTokens, run: Run
) -> Tensor:
    """Class scores of the side model, (batch, classes)."""
    assert isinstance(inputs, Tokens)
    tokens = side["tokens"].expand(len(inputs), -1, -1)
    with _other_head(run.head(model), side["weight"], side["bias"]):
        return places.scores(model, inputs, tokens, run)


@contextmanager
def _other_head(head: nn.Linear, weight: Tensor, bias: Tensor) -> Iterator[None]:
    """While the block runs, a linear layer answers with another weight and bias; its own stay as they are."""

    def answer(_layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.linear(arguments[0], weight.to(arguments[0]), bias.to(arguments[0])).to(output)

    with removing([head.register_forward_hook(answer)]):
        yield
