"""Fine-Pruning."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.adapters import refuse_adapter
from unbackdoor._models.calling import probe
from unbackdoor._models.units import feed_forward, matrix_of, mean_activation
from unbackdoor._models.weight_norms import check_weight_is_own
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._pruning import as_far_as_accurate_, still_accurate


@value
class FinePruning:
    """Prune the neurons that clean examples do not excite, then tune.

    A backdoor uses neurons that are dormant on clean inputs. The neurons of the last feature layer are sorted by their
    mean absolute activation on clean examples and silenced one group after another, the most dormant first, for as long
    as clean accuracy on held-out examples stays within a tolerance. Then the model is tuned; silenced neurons stay
    silent.

    Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID
    2018, https://arxiv.org/abs/1805.12185

    Args:
        tolerance: how much accuracy on held-out clean examples may fall by pruning, 0 to 1; of a language model, how
            much their loss may rise, in nats per answer token.
        step: share of the neurons per group, more than 0 and at most 1.
        epochs: passes of tuning over the clean examples, at least 0; 0 only prunes.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts and conversations.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts, 8 for conversations.

    Differences from the paper: it prunes channels of the last convolution. Here the neurons are the features that the
    head reads. In a chain of convolutions with pooling that is the same; in a residual network it also silences what
    the skip connection adds to such a channel. In a transformer the features that the head reads are all active, so the
    neurons are those inside the last feed-forward block. A neuron is silenced by zeroing the weights that read it. The
    tolerance is 0.1, the ratio that a public benchmark uses. A trigger with a low poison rate shares its neurons with
    clean examples, and is known to survive this method.
    """

    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.1
    step: Annotated[float, Field(gt=0, le=1)] = 0.01
    epochs: Annotated[int, Field(ge=0)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_adapter(model, self)
        blocks = feed_forward(model, probe(model, clean))
        reader = blocks[-1] if blocks else run.head(model)
        check_weight_is_own(reader, "its last feed-forward block" if blocks else "its last linear layer")
        seen, held = run.hold_out(clean)
        order = mean_activation(model, reader, seen, run.arithmetic).argsort()  # (neurons,), dormant first
        weights = matrix_of(reader)
        assert weights is not None
        groups = order.to(weights.device).split(max(1, round(self.step * len(order))))[:-1]

        def silence_(neurons: Tensor) -> None:
            weights[:, neurons] = 0

        kept = as_far_as_accurate_(
            [weights],
            [partial(silence_, group) for group in groups],
            still_accurate(model, held, run, self.tolerance),
        )
        dead = torch.cat(groups[:kept]) if kept else order[:0]
        if kept:
            run.note(f"FinePruning pruned {len(dead)} of {len(order)} neurons.")
        else:
            run.warn(
                f"FinePruning pruned nothing of {len(order)} neurons: {run.task.measure.quantity} on {len(held)} "
                "held-out examples allows pruning none. Raise its `tolerance`."
            )
        if self.epochs:
            run.tune(
                model,
                clean,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                batch_size=self.batch_size,
                after_step=partial(silence_, dead),
            )
        return model
