"""The generator of BTI-DBF, which changes pictures as a trigger does, and its training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.benign import Learned
from unbackdoor._inversion.carrying import Reversed, encoded, in_pixels
from unbackdoor._inversion.searching import training_batches
from unbackdoor._models.calling import logits
from unbackdoor._models.hooks import watching
from unbackdoor._purification.run import Run


class Generator(nn.Module):
    """A small U-Net that changes pixels in [0, 1]; untrained, it changes them by next to nothing.

    Args:
        channels: of the images.
        width: channels of its first level; the two below have twice and four times as many.
        generator: of the initial weights.

    Attributes:
        leads_to: the class that it was found to move most examples to.
    """

    leads_to: int | None = None

    def __init__(self, channels: int, width: int, generator: torch.Generator) -> None:
        super().__init__()

        def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)

        self.top = convolution(channels, width)
        self.middle = convolution(width, 2 * width, stride=2)
        self.bottom = convolution(2 * width, 4 * width, stride=2)
        self.up_middle = convolution(6 * width, 2 * width)
        self.up_top = convolution(3 * width, width)
        self.last = convolution(width, channels)
        for layer in self.children():
            assert isinstance(layer, nn.Conv2d)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            # Not zero: where nothing changes, a squared distance has no gradient.
            self.last.weight.mul_(0.01)

    def forward(self, pixels: Tensor) -> Tensor:
        """Changed pixels in [0, 1], in the shape and type of those given."""
        top = F.relu(self.top(pixels.to(self.top.weight.dtype)))
        middle = F.relu(self.middle(top))
        bottom = F.relu(self.bottom(middle))
        middle = F.relu(self.up_middle(torch.cat([F.interpolate(bottom, middle.shape[2:]), middle], dim=1)))
        top = F.relu(self.up_top(torch.cat([F.interpolate(middle, top.shape[2:]), top], dim=1)))
        changed: Tensor = (pixels + self.last(top).tanh().to(pixels.dtype)).clamp(0, 1)
        return changed


def train_(
    generator: Generator,
    model: nn.Module,
    clean: Dataset,
    run: Run,
    learned: Learned,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
) -> None:
    """Train a generator in place (Adam at 1e-3), from the second time on also to lead where it led before.

    Args:
        generator: of images like the clean ones.
        model: the suspect, frozen.
        clean: images.
        run: of the purification.
        learned: the features of the clean examples.
        loss: of the change of pixels (batch, channels, height, width) and that of features (batch, in_features).
        epochs: passes over the clean examples.
        batch_size: examples per step.
    """
    steps = epochs * -(-len(clean) // batch_size)
    optimizer = torch.optim.Adam(generator.requires_grad_(True).parameters(), lr=1e-3)
    data = in_pixels(clean, augmented=False)
    with watching(run.head(model)) as seen, run.progress("training the generator", steps) as advance:
        for batch in training_batches(data, batch_size, steps, run):
            assert isinstance(batch.inputs, Tensor)
            with run.arithmetic.autocast():
                changed = generator(batch.inputs)
                scores = logits(model, encoded(clean, changed, run))
            moved = seen[0].to(learned.features.dtype) / learned.scale - learned.features[batch.rows]
            total = loss(changed.float() - batch.inputs, moved)
            if generator.leads_to is not None:
                total = total + F.cross_entropy(scores.float(), torch.full_like(batch.labels, generator.leads_to))
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            advance()


@torch.no_grad()
def target_of(found: Reversed, model: nn.Module, clean: Dataset, run: Run) -> int:
    """The class that most triggered examples are taken for, under a little noise."""
    votes = []
    for batch in in_pixels(clean, augmented=False).batches(run.arithmetic.evaluation_batch):
        assert isinstance(batch.inputs, Tensor)
        noise = 0.03 * torch.randn(batch.inputs.shape, generator=run.generator).to(batch.inputs.device)
        with run.arithmetic.autocast():
            votes.append(logits(model, encoded(clean, found((batch.inputs + noise).clamp(0, 1)), run)).argmax(1))
    taken_for = torch.cat(votes)
    target = int(taken_for.mode().values)
    share = float((taken_for == target).double().mean())
    run.note(f"BTI-DBF: the reversed trigger leads to {clean.class_name(target)} ({share:.0%} of the examples).")
    return target
