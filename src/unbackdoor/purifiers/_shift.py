"""One shift of the features at the scale of the head: the descent of scale-invariant FST."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.calling import probe
from unbackdoor._models.head import Head
from unbackdoor._models.hooks import without_dropout
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import divergence
from unbackdoor.purifiers._calibrated import calibrated_temperature
from unbackdoor.purifiers._equal_steps import equal_steps
from unbackdoor.purifiers._head_units import centred, in_own_units, turn_


def shift_(
    model: nn.Module,
    suspect: nn.Module,
    clean: Dataset,
    run: Run,
    *,
    degrees: float,
    alpha: float,
    share: float,
    temperature: float,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    first: nn.Module | None = None,
) -> None:
    """Minimise the loss of `ScaleInvariantFST` in place, from a turned head of one length, without dropout.

    Args:
        model: a copy of the suspect.
        suspect: the teacher, in eval mode and without gradients of its own.
        clean: the examples; one with the label -1 is taught by the teachers alone.
        run: of the purification.
        degrees: the angle by which the head is turned at the start, 0 to 180.
        alpha: weight of the cosine between the head and the suspect's, at least 0.
        share: weight of the teacher's answers against the labels, 0 to 1.
        temperature: temperature of both softmaxes, more than 0.
        epochs: passes over the examples.
        learning_rate: of steps of equal angles, see `equal_steps`.
        batch_size: examples per step.
        first: an earlier result, the teacher where it names another class than the suspect; None for the suspect alone.
    """
    head = run.head(model)
    sureness = calibrated_temperature(suspect, clean, run.arithmetic)
    with in_own_units(model, Head(run.head_name, head), probe(model, clean), sureness), without_dropout(model):
        goal = centred(head.weight.detach())  # (classes, features)
        length = goal.norm()

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            distance = divergence(scores, taught(suspect, first, batch, run) / sureness, temperature)
            cosine = (centred(head.weight) * goal).sum() / length**2
            total: Tensor = (1 - share) * labelled(scores, batch) + share * temperature**2 * distance + alpha * cosine
            return total

        def project_() -> None:
            rows = centred(head.weight)
            head.weight.add_((length / rows.norm() - 1) * rows)

        turn_(head.weight, degrees, run.generator)
        with equal_steps(model, Head(run.head_name, head), probe(model, clean)):
            run.tune(
                model,
                clean,
                epochs=epochs,
                learning_rate=learning_rate,
                batch_size=batch_size,
                loss=loss,
                after_step=project_,
            )


@torch.no_grad()
def taught(suspect: nn.Module, first: nn.Module | None, batch: Batch, run: Run) -> Tensor:
    """Returns the answers to learn, (batch, classes): the suspect's, or a first result's where the class differs."""
    answers = run.scores(suspect, batch.inputs)
    if first is None:
        return answers
    others = run.scores(first, batch.inputs)
    return torch.where((answers.argmax(dim=1) == others.argmax(dim=1))[:, None], answers, others)


def labelled(scores: Tensor, batch: Batch) -> Tensor:
    """Returns the cross-entropy of the examples with a label, summed, per example of the batch."""
    return F.cross_entropy(scores, batch.labels, ignore_index=-1, reduction="sum") / len(batch.labels)
