"""The generator of BTI-DBF, which changes pictures like a trigger, and its training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.benign_features import CleanFeatures, benign_mask, clean_features
from unbackdoor._inversion.search import frozen, training_batches
from unbackdoor._inversion.triggers import InvertedTrigger, encoded, in_pixels
from unbackdoor._models.calling import logits
from unbackdoor._models.hooks import watching
from unbackdoor._purification.run import Run


class TriggerGenerator(nn.Module):
    """A small U-Net that changes pixels in [0, 1]; untrained, it hardly changes them.

    Args:
        channels: channels of the images.
        width: channels of its first level; the two below have twice and four times as many.
        generator: randomness of the initial weights.

    Attributes:
        target: the class that it moves most examples to; None until that is known.
    """

    target: int | None = None

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
            # Not zero: if nothing changes, a squared distance has no gradient.
            self.last.weight.mul_(0.01)

    def forward(self, pixels: Tensor) -> Tensor:
        """Changed pixels in [0, 1], in the shape and type of the input."""
        top = F.relu(self.top(pixels.to(self.top.weight.dtype)))
        middle = F.relu(self.middle(top))
        bottom = F.relu(self.bottom(middle))
        middle = F.relu(self.up_middle(torch.cat([F.interpolate(bottom, middle.shape[2:]), middle], dim=1)))
        top = F.relu(self.up_top(torch.cat([F.interpolate(middle, top.shape[2:]), top], dim=1)))
        changed: Tensor = (pixels + self.last(top).tanh().to(pixels.dtype)).clamp(0, 1)
        return changed


@dataclass(frozen=True, kw_only=True)
class GeneratorSearch:
    """The inversion of BTI-DBF; its defaults are those of `BTIDBF`, which has the formulas.

    Args:
        epochs: passes over the clean examples.
        distance: mean squared change of a pixel in [0, 1] that the generator may make.
        drift: mean squared change of the benign features that it may cause, in units of the features' variance.
        batch_size: examples per step; None is the recipe's.
    """

    epochs: int = 10
    distance: float = 0.002
    drift: float = 1.0
    batch_size: int | None = None

    def __call__(
        self, model: nn.Module, clean: Dataset, run: Run, last: InvertedTrigger | None = None
    ) -> InvertedTrigger:
        """Returns a generator that moves all but the benign features; that of the last round is trained further."""
        with frozen(model):
            features = clean_features(model, clean, run)
            mask = benign_mask(run.head(model), features, clean.labels, run)
            generator = (
                last if isinstance(last, TriggerGenerator) else TriggerGenerator(clean.shape[0], 16, run.generator)
            )
            generator.to(run.arithmetic.device)
            self._train(generator, model, clean, run, features, mask)
            # Before unlearning: afterwards the model no longer answers this class for the generator's pictures.
            generator.target = target_class(generator, model, clean, run)
        return generator.requires_grad_(False)

    def loss(self, change: Tensor, movement: Tensor, mask: Tensor) -> Tensor:
        """Returns the loss of the generator without the term for its target.

        Args:
            change: change of pixels, (batch, channels, height, width).
            movement: change of scaled features, (batch, in_features).
            mask: mask of benign features, (in_features,), in (0, 1).
        """
        picture, benign = change.square().mean(), (mask * movement).square().mean()
        if picture > self.distance or benign > self.drift:
            return picture
        return 0.01 * benign - ((1 - mask) * movement).square().mean()

    def _train(
        self,
        generator: TriggerGenerator,
        model: nn.Module,
        clean: Dataset,
        run: Run,
        features: CleanFeatures,
        mask: Tensor,
    ) -> None:
        """Train a generator in place (Adam at 1e-3); from the second round on it must also keep its target."""
        batch_size = run.setting(self, "batch_size")
        steps = self.epochs * -(-len(clean) // batch_size)
        optimizer = torch.optim.Adam(generator.requires_grad_(True).parameters(), lr=1e-3)
        data = in_pixels(clean, augmented=False)
        with watching(run.head(model)) as seen, run.progress("training the generator", steps) as advance:
            for batch in training_batches(data, batch_size, steps, run):
                with run.arithmetic.autocast():
                    changed = generator(batch.pixels)
                    scores = logits(model, encoded(clean, changed, run))
                movement = seen[0].to(features.scaled.dtype) / features.scale - features.scaled[batch.rows]
                loss = self.loss(changed.float() - batch.pixels, movement, mask)
                if generator.target is not None:
                    loss = loss + F.cross_entropy(scores.float(), torch.full_like(batch.labels, generator.target))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                advance()


@torch.no_grad()
def target_class(trigger: InvertedTrigger, model: nn.Module, clean: Dataset, run: Run) -> int:
    """Returns the class that most triggered examples are classified as, under a little noise."""
    predictions = []
    for batch in in_pixels(clean, augmented=False).batches(run.arithmetic.evaluation_batch):
        noise = 0.03 * torch.randn(batch.pixels.shape, generator=run.generator).to(batch.pixels.device)
        with run.arithmetic.autocast():
            inputs = encoded(clean, trigger((batch.pixels + noise).clamp(0, 1)), run)
            predictions.append(logits(model, inputs).argmax(1))
    predicted = torch.cat(predictions)
    target = int(predicted.mode().values)
    share = float((predicted == target).double().mean())
    run.note(f"BTI-DBF: the inverted trigger leads to {clean.class_name(target)} ({share:.0%} of the examples).")
    return target
