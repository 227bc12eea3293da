"""Unlearning triggers with the suspect's own answers to the same examples without them as labels."""

from torch import nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._inversion.triggers import InvertedTrigger, encoded, in_pixels
from unbackdoor._inversion.unlearning import WithTrigger
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import cross_entropy
from unbackdoor.purifiers._path_aware import stepped_back


def unlearn(
    model: nn.Module,
    suspect: nn.Module,
    clean: Dataset,
    run: Run,
    trigger: InvertedTrigger,
    *,
    taught: float,
    share: float,
    epochs: int,
    learning_rate: float | None,
    batch_size: int | None,
    rho: float = 0.0,
) -> None:
    """Minimise taught * CE(f(x'), f_s(x)) + (1 - taught) * CE(f(x'), y) in place, x' = trigger(x) for some examples.

    Args:
        model: f.
        suspect: f_s, in eval mode and without gradients of its own.
        clean: images, augmented strongly and again each time.
        run: of the purification.
        trigger: put on pixels before encoding.
        taught: weight of the suspect's answers against the labels, 0 to 1.
        share: of each batch that carries a trigger, see `triggered_rows`.
        epochs: passes over the examples.
        learning_rate: None uses the recipe's.
        batch_size: None uses the recipe's.
        rho: length of the step back towards the suspect at which the gradient is taken.
    """
    with_trigger = WithTrigger(model, clean, run, trigger, share)
    weights, theirs = list(model.parameters()), list(suspect.parameters())

    def gradients(batch: Batch) -> None:
        answers = run.scores(suspect, encoded(clean, batch.pixels, run)).softmax(dim=1)  # (batch, classes)
        with stepped_back(weights, theirs, rho):
            scores = run.scores(with_trigger, batch.inputs)
            labelled = (1 - taught) * cross_entropy(scores, batch)
            (labelled + taught * F.cross_entropy(scores, answers)).backward()

    run.tune(
        with_trigger,
        in_pixels(clean.distorted()),
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gradients=gradients,
        description="unlearning",
    )
