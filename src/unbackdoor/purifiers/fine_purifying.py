"""Fine-purifying: coordinates that drifted more than their curvature explains go back to the pre-trained values."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.adapters import refuse_adapter
from unbackdoor._models.calling import evaluating
from unbackdoor._purification.run import Run
from unbackdoor._purification.selection import smallest_within
from unbackdoor._value import value
from unbackdoor.purifiers._counterparts import Weights, counterparts, distinct


@value
class FinePurifying:
    """Reset the coordinates whose drift is abnormal for their curvature, then tune.

    Fine-tuning on clean data moves the weights that the clean loss depends on; poison moves weights that it hardly
    depends on. With delta_i the distance of coordinate i from its pre-trained value, and H_i the curvature of the clean
    loss there,

        r_i = delta_i^2 / H_i

    is large for the poisonous ones. The share of all coordinates with the largest r go back to the pre-trained values,
    then all are tuned. H is the diagonal of the empirical Fisher matrix: the mean over clean examples of the squared
    derivative of each one's cross-entropy. A larger share is safer and less accurate. If it is None, it is the largest
    of 0, 0.1, ..., 1 at which clean accuracy after resetting and tuning, cross-validated over all clean examples, falls
    short of the suspect's own by no more than the margin, to the nearest whole example. If the standard error of that
    difference is larger than the margin, a warning says so.

    Zhang, Chen, Zhou, Meng, Zhou and Sun, "Diffusion Theory as a Scalpel: Detecting and Purifying Poisonous Dimensions
    in Pre-trained Language Models Caused by Backdoor or Bias", Findings of ACL 2023, https://arxiv.org/abs/2305.04547

    Args:
        share: share of the coordinates with a counterpart in the base that go back, 0 to 1; None searches it.
        margin: clean accuracy that may be lost, 0 to 1; of a language model, nats per answer token.
        folds: folds of the cross-validation, at least 2.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts and conversations.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts, 8 for conversations.

    Differences from the paper: its body could not be read. The form of the indicator is quoted from memory. The
    empirical Fisher matrix for H, a millionth of its mean added to it, one ranking over all tensors, the head kept from
    the suspect and the search for the share are this project's choices. So is its use on images; statistics of
    BatchNorm stay the suspect's. Words in no clean text have no curvature, so their embeddings are among the first to
    go back.
    """

    share: Annotated[float | None, Field(ge=0, le=1)] = None
    margin: Annotated[float, Field(ge=0, le=1)] = 0.03
    folds: Annotated[int, Field(ge=2)] = 4
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    # The first version accepted a loss within the standard error, and the second a model that gives all examples one
    # class, and in the third a small class counted little, as in those of Fine-mixing.
    version: ClassVar[int] = 4

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_adapter(model, self)
        suspect = {name: tensor.detach().clone() for name, tensor in distinct(model).items()}
        base = self._base(model, suspect, run)
        curvature = fisher(model, clean, run)
        scores = indicator({name: suspect[name] - base[name] for name in base}, curvature)
        ranked = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values

        def reset_and_tuned(share: float, examples: Dataset, words: str) -> nn.Module:
            weights = dict(suspect)
            count = round(share * len(ranked))
            for name in base if count else ():
                # Equal scores at the border go back together, in practice those of coordinates that did not drift.
                weights[name] = torch.where(scores[name] >= ranked[count - 1], base[name], suspect[name])
            model.load_state_dict(weights, strict=False)  # a tied tensor is named once
            run.tune(
                model,
                examples,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                batch_size=self.batch_size,
                description=words,
            )
            return model

        share = self.share
        if share is None:
            kept = smallest_within(
                model,
                clean,
                run,
                margin=self.margin,
                folds=self.folds,
                field="share",
                shown=lambda kept: round(1 - kept, 1),
                tuned=lambda kept, part, words: reset_and_tuned(round(1 - kept, 1), part, words),
            )
            share = round(1 - kept, 1)
        return reset_and_tuned(share, clean, "tuning")

    def _base(self, model: nn.Module, suspect: Weights, run: Run) -> Weights:
        """Returns the pre-trained values of the parameters, by the suspect's names."""
        learned = {name for name, _ in model.named_parameters()}
        base = counterparts(suspect, run, self)
        return {name: weight.to(suspect[name].dtype) for name, weight in base.items() if name in learned}


def fisher(model: nn.Module, clean: Dataset, run: Run) -> Weights:
    """Returns the mean over the examples of the squared derivative of each one's loss, by parameter."""
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with evaluating(model), run.progress("measuring curvature", len(clean)) as advance:
        for batch in clean.batches(1):
            loss = run.task.loss(run.scores(model, batch.inputs), batch)
            slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), slopes, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=1 / len(clean))
            run.examples_seen += 1
            advance()
    return totals


def indicator(drift: Weights, curvature: Weights) -> Weights:
    """Returns delta^2 / H for each coordinate, with a millionth of the mean of H added to it."""
    total = sum(float(curvature[name].double().sum()) for name in drift)
    count = sum(delta.numel() for delta in drift.values())
    floor = max(1e-6 * total / count, torch.finfo(torch.float32).tiny)
    return {name: delta.square() / (curvature[name] + floor) for name, delta in drift.items()}
