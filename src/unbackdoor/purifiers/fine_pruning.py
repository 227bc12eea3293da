"""Fine-Pruning."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data import Dataset
from unbackdoor._models import probe
from unbackdoor._purify import Run
from unbackdoor._units import as_far_as_accurate_, feed_forward, mean_activation
from unbackdoor._values import value


@value
class FinePruning:
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.1
    step: Annotated[float, Field(gt=0, le=1)] = 0.01
    epochs: Annotated[int, Field(ge=0)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        blocks = feed_forward(model, probe(model, clean))
        reader = blocks[-1] if blocks else run.head(model)
        seen, held = run.hold_out(clean)
        order = mean_activation(model, reader, seen, run.arithmetic).argsort()  # (neurons,), dormant first
        groups = order.to(reader.weight.device).split(max(1, round(self.step * len(order))))[:-1]

        def silence_(neurons: Tensor) -> None:
            reader.weight[:, neurons] = 0

        floor = run.accuracy(model, held).value - self.tolerance
        kept = as_far_as_accurate_(
            [reader.weight],
            [partial(silence_, group) for group in groups],
            lambda: run.accuracy(model, held).value >= floor,
        )
        dead = torch.cat(groups[:kept]) if kept else order[:0]
        run.note(f"FinePruning pruned {len(dead)} of {len(order)} neurons.")
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
