"""Suppressing the shortcut that carries a backdoor."""

import math
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.masks import MaskSearch
from unbackdoor._inversion.triggers import in_pixels, refuse_texts
from unbackdoor._inversion.unlearning import WithTrigger
from unbackdoor._models.calling import probe
from unbackdoor._models.shortcuts import scaled, shortcuts
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._pruning import silence_


@value
class ShortcutSuppression:
    """Remove the skip connection that carries a backdoor, and tune without it.

    Skip connections carry a trigger past the layers that would lose it. This method inverts a trigger, scales the
    shortcuts one at a time by gamma = 0, 0.2, ... 0.8, and chooses the one that, at any gamma, has the largest sum of
    two accuracies: on held-out clean examples, and on the same with the inverted trigger. Its gamma is set to 0, and
    the model is tuned.

    Yang, Li, Jiang and Xia, "Backdoor Defense via Suppressing Model Shortcuts", ICASSP 2023,
    https://arxiv.org/abs/2211.05631

    Args:
        reverse_steps: steps of the search for a trigger, at least 1.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01.
        batch_size: examples per step, at least 2; None is 128.

    Differences from the paper: its script chooses the shortcut by attack success on triggered test images, which no
    user has; here Neural Cleanse inverts a trigger instead. Clean accuracy also counts, since removing an early
    shortcut breaks everything. A shortcut that ends in a BatchNorm of its own is removed for good, by zeroing that
    layer; if the model has such shortcuts, only they are candidates. An identity cannot be folded into weights: it is
    absent at first, and comes back linearly while tuning, so that the result is a plain model. All weights are tuned,
    not only those of one stage.
    """

    version: ClassVar[int] = 2

    reverse_steps: Annotated[int, Field(ge=1)] = 100
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_texts(self, clean)
        norms = shortcuts(model, probe(model, clean))
        if not norms:
            raise UnbackdoorError(
                f"ShortcutSuppression needs skip connections; {type(model).__name__} has none. Try fine-pruning."
            )
        critical = self.critical(model, norms, clean, run)
        norm, scales = norms[critical], {critical: 0.0}
        lasting = "for good" if norm is not None else "while tuning, as no BatchNorm ends it that could be zeroed"
        run.note(f"ShortcutSuppression removed shortcut {critical + 1} of {len(norms)}, {lasting}.")
        if norm is not None:
            silence_(norm, norm.weight.isfinite())
            norm.requires_grad_(False)
        batch_size = run.setting(self, "batch_size")
        steps = self.epochs * math.ceil(len(clean) / batch_size)

        def bring_back() -> None:
            scales[critical] = min(1.0, scales[critical] + 1 / steps)

        with scaled(model, scales if norm is None else {}):
            run.tune(
                model,
                clean,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                batch_size=batch_size,
                after_step=bring_back,
            )
        return model

    def critical(self, model: nn.Module, norms: list[_BatchNorm | None], clean: Dataset, run: Run) -> int:
        """Returns the number of the shortcut whose weakening hurts the inverted trigger most, clean accuracy least."""
        seen, held = run.hold_out(clean)
        trigger = MaskSearch(steps=self.reverse_steps)(model, seen, run)
        with_trigger, pixels = WithTrigger(model, clean, run, trigger, 1.0), in_pixels(held, augmented=False)
        foldable = [number for number, norm in enumerate(norms) if norm is not None]
        sums: dict[int, float] = {}
        for number in foldable or range(len(norms)):
            for gamma in (0.0, 0.2, 0.4, 0.6, 0.8):
                with scaled(model, {number: gamma}):
                    both = run.accuracy(model, held).value + run.accuracy(with_trigger, pixels).value
                sums[number] = max(sums.get(number, -1.0), both)
        return max(sums, key=lambda number: sums[number])
