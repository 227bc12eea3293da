"""Masks and patterns, one of each per class: the search of Neural Cleanse, and its anomaly index."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.smallest import Kind, SmallestSearch
from unbackdoor._inversion.triggers import InvertedTrigger
from unbackdoor._purification.run import Run

EDGE = 1e-4  # of the range of a mask, which no free parameters reach


class MaskedPatterns(NamedTuple):
    """A trigger for each class: masks (classes, 1, height, width), patterns (classes, channels, height, width)."""

    masks: Tensor
    patterns: Tensor


def stamp(masks: Tensor, patterns: Tensor) -> InvertedTrigger:
    """Returns the triggers (1 - m) x + m p, which take turns over the examples of a batch.

    Args:
        masks: (triggers, 1, height, width), in [0, 1].
        patterns: (triggers, channels, height, width), in [0, 1].
    """

    def stamped(pixels: Tensor) -> Tensor:
        turn = torch.arange(len(pixels), device=pixels.device) % len(masks)
        return (1 - masks[turn]) * pixels + masks[turn] * patterns[turn]

    return stamped


@dataclass(frozen=True, kw_only=True)
class MaskSearch:
    """The inversion of Neural Cleanse; its defaults are those of `NeuralCleanse`, which has the formulas.

    Args:
        steps: steps of the search; each sees one batch for every class.
        batch_size: examples per step and class.
        cost: weight of a mask's size at the start.
        success: share of a batch that a trigger must move to its class.
        patience: steps in a row before a class's weight changes.
        threshold: anomaly index above which a class is an outlier.
    """

    steps: int = 100
    batch_size: int = 32
    cost: float = 1e-3
    success: float = 0.98
    patience: int = 5
    threshold: float = 2.0

    def __call__(
        self, model: nn.Module, clean: Dataset, run: Run, last: InvertedTrigger | None = None
    ) -> InvertedTrigger:
        """Returns the outliers' triggers, or those of all classes; an `Inversion`."""
        triggers, outliers = self.outliers(model, clean, run)
        if len(outliers) == 0:
            run.note("Neural Cleanse: the triggers of all classes are taken.")
            return stamp(triggers.masks, triggers.patterns)
        return stamp(triggers.masks[outliers], triggers.patterns[outliers])

    def outliers(self, model: nn.Module, clean: Dataset, run: Run) -> tuple[MaskedPatterns, Tensor]:
        """Returns the triggers of all classes, and the labels of the outliers, (outliers,)."""
        triggers = self.smallest(model, clean, run)
        sizes = triggers.masks.sum(dim=(1, 2, 3))  # (classes,)
        indices = anomaly_index(sizes)
        outliers = (indices > self.threshold).nonzero().flatten()
        smallest = int(sizes.argmin())
        names = ", ".join(map(clean.class_name, outliers.tolist()))
        run.note(
            f"Neural Cleanse: {f'outliers {names}' if names else 'no class is an outlier'} (the smallest trigger is "
            f"that of {clean.class_name(smallest)}, |m| = {float(sizes[smallest]):.1f}, anomaly index "
            f"{float(indices[smallest]):.2f})."
        )
        return triggers, outliers

    def smallest(self, model: nn.Module, clean: Dataset, run: Run) -> MaskedPatterns:
        """Returns the smallest successful mask and its pattern for every class, and the latest for one without success.

        Args:
            model: the model in its present state.
            clean: clean images.
            run: the run of the purification.
        """
        family = MaskedPatch()
        search = SmallestSearch.of(self, family, learning_rate=0.1)
        return family.parts(search(model, clean, run).parameters)


class MaskedPatch:
    """A mask and a pattern, both in [0, 1]; the size is the sum of the mask, in pixels. A `TriggerFamily`."""

    kind: ClassVar[Kind] = "patch"

    def start(self, classes: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Masks and patterns drawn evenly from [0.01, 0.99], (classes, 1 + channels, height, width)."""
        channels, height, width = shape
        start = torch.rand((classes, 1 + channels, height, width), generator=generator, dtype=dtype) * 0.98 + 0.01
        return (2 * start - 1).atanh()

    def bounded(self, free: Tensor) -> Tensor:
        """Masks and patterns in (0, 1), (triggers, 1 + channels, height, width)."""
        return free.tanh() / 2 + 0.5

    def shrunk(self, free: Tensor, factor: float) -> Tensor:
        """The same patterns under masks times a factor."""
        parameters = self.bounded(free)
        parameters = torch.cat([factor * parameters[:, :1], parameters[:, 1:]], dim=1)
        return (2 * parameters.clamp(EDGE, 1 - EDGE) - 1).atanh()

    def parts(self, parameters: Tensor) -> MaskedPatterns:
        """The masks and the patterns of parameters."""
        return MaskedPatterns(parameters[:, :1], parameters[:, 1:])

    def applied(self, parameters: Tensor, pixels: Tensor) -> Tensor:
        """Pixels with each trigger on, (triggers, batch, channels, height, width)."""
        masks, patterns = parameters[:, None, :1], parameters[:, None, 1:]
        return (1 - masks) * pixels + masks * patterns

    def size(self, parameters: Tensor) -> Tensor:
        """The sum of each mask, (triggers,)."""
        return parameters[:, 0].sum(dim=(1, 2))

    def unit(self, shape: tuple[int, ...]) -> str:
        """Pixels, and how many there are."""
        return f"pixels of {shape[-2] * shape[-1]:,}"

    def arrays(self, parameters: Tensor) -> dict[str, Tensor]:
        """`mask`, (1, height, width), and `pattern`, (channels, height, width)."""
        return {"mask": parameters[:1], "pattern": parameters[1:]}


def anomaly_index(sizes: Tensor) -> Tensor:
    """Returns how many scaled median absolute deviations each size is below the median; 0 for those above it.

    The median of an even number is the mean of the middle two. If more than half of the sizes are equal, a smaller one
    has an infinite index.
    """
    middle = sizes.quantile(0.5)
    deviation = 1.4826 * (sizes - middle).abs().quantile(0.5)  # a normal distribution's standard deviation
    gap = (middle - sizes).clamp(min=0)
    return torch.where(gap > 0, gap / deviation, 0.0)
