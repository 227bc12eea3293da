"""Reversed triggers: what the purifiers share that look for a trigger, put it on clean examples and unlearn it.

Masks, patterns and perturbations of images live on pixels in [0, 1] at the data set's own size; the model's own
preprocessing comes after them, and gradients flow through it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._images import Augmentation, ImageEncoder
from unbackdoor._models import Inputs, embeddings, evaluating, logits, perturbed_logits
from unbackdoor._purify import Run
from unbackdoor._text import Tokens

Reversed = Callable[[Tensor], Tensor]
"""A reversed trigger: from clean to triggered.

Of images: pixels in [0, 1], (batch, channels, height, width). Of texts: the output of the embedding layer, (batch,
length, width).
"""

Reverse = Callable[[nn.Module, Dataset, Run, "Reversed | None"], Reversed]
"""Of a model as it is now, clean examples, the run and the trigger of the round before, to a reversed trigger."""


def needs_pixels(owner: object, clean: Dataset) -> None:
    """Refuse texts, for a method that looks for its trigger among pixels."""
    if clean.modality != "images":
        raise UnbackdoorError(
            f"{type(owner).__name__} looks for a trigger among pixels, but {clean.name} holds {clean.modality}. Try "
            "pam, which on texts looks among embeddings."
        )


def in_pixels(clean: Dataset, *, augmented: bool = True) -> Dataset:
    """The same images, whose batches hold pixels in [0, 1] in place of the model's inputs; texts as they are."""
    if clean.modality != "images":
        return clean
    augment = clean.augment if augmented else Augmentation.none()
    return replace(clean, encode=ImageEncoder(), augment=augment)


def encoded(clean: Dataset, pixels: Tensor, run: Run) -> Inputs:
    """Pixels in [0, 1] as the model takes them."""
    assert isinstance(clean.encode, ImageEncoder)
    return run.arithmetic.lay(clean.encode(255 * pixels))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for weights while the block runs: only the trigger is searched."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def features_of(head: nn.Linear) -> Iterator[list[Tensor]]:
    """What the head sees in each forward pass of the block, appended to the list, with its gradient."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def training_batches(data: Dataset, size: int, steps: int, run: Run) -> Iterator[Batch]:
    """`steps` shuffled batches, pass after pass; they count as examples seen."""
    left = steps
    while left > 0:
        for batch in data.batches(size, generator=run.generator):
            run.examples_seen += len(batch.labels)
            yield batch
            left -= 1
            if left == 0:
                return


def carriers(count: int, share: float) -> Tensor:
    """Which of `count` examples carry the trigger: int(share * count + 1) of them, evenly spread.

    Spread, since batches of texts are sorted by length.

    >>> carriers(10, 0.2).tolist()
    [0, 3, 6]
    """
    carrying = min(int(share * count + 1), count)
    return torch.arange(carrying) * count // carrying


class Carrying(nn.Module):
    """A model that puts a reversed trigger on a share of each batch, for `run.tune` and `descend`.

    Args:
        model: what is tuned.
        clean: whose encoder the model's inputs come from.
        run: of the purification.
        reversed_trigger: put on before encoding; on texts, onto the embeddings.
        share: of each batch, see `carriers`.
    """

    def __init__(self, model: nn.Module, clean: Dataset, run: Run, reversed_trigger: Reversed, share: float) -> None:
        super().__init__()
        self.model, self.clean, self.run = model, clean, run
        self.reversed_trigger, self.share = reversed_trigger, share

    def forward(self, pixels: Tensor | None = None, **tokens: Tensor) -> Tensor:
        """Class scores of pixels as `in_pixels` hands them out, or of tokens."""
        if pixels is None:
            return self._of_text(Tokens(tokens))
        rows = carriers(len(pixels), self.share).to(pixels.device)
        with torch.no_grad():
            pixels = pixels.index_copy(0, rows, self.reversed_trigger(pixels[rows]).to(pixels.dtype))
        return logits(self.model, encoded(self.clean, pixels, self.run))

    def _of_text(self, tokens: Tokens) -> Tensor:
        rows = carriers(len(tokens), self.share)
        shift = self.reversed_trigger(torch.zeros((), device=tokens["input_ids"].device))  # (1, 1, width)
        mask = shift.new_zeros(len(tokens), 1, 1)
        mask[rows] = 1
        return perturbed_logits(self.model, tokens, mask * shift)


def stamp(mask: Tensor, pattern: Tensor) -> Reversed:
    """The triggers (1 - m) x + m p, one after the other over the examples of a batch.

    Args:
        mask: (triggers, 1, height, width), in [0, 1].
        pattern: (triggers, channels, height, width), in [0, 1].
    """

    def stamped(pixels: Tensor) -> Tensor:
        turn = torch.arange(len(pixels), device=pixels.device) % len(mask)
        return (1 - mask[turn]) * pixels + mask[turn] * pattern[turn]

    return stamped


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


def universal(
    model: nn.Module, clean: Dataset, run: Run, last: Reversed | None = None, *, steps: int = 100
) -> Reversed:
    """One perturbation for all examples that drives the model off their classes.

    It maximises CE(f(x + d), y). On images d is added to pixels, none of which moves by more than 0.2 of their range.
    On texts it is added to every word's embedding and is at most as long as the average word embedding.

    Args:
        model: in its present state.
        clean: examples; training batches of 64 are drawn from it.
        run: of the purification.
        last: not used: each search starts anew.
        steps: of Adam, at learning rate 0.1.
    """
    data, texts = in_pixels(clean, augmented=False), clean.modality == "text"
    table = embeddings(model).weight.detach().float() if texts else None
    shape = clean.shape if table is None else (1, table.shape[1])
    bound = 0.2 if table is None else float(table.norm(dim=1).mean())
    device = run.arithmetic.device
    free = (0.1 * torch.randn((1, *shape), generator=run.generator)).to(device).requires_grad_(True)

    def perturbation() -> Tensor:
        return bound * (F.normalize(free, dim=-1) if texts else free.tanh())

    optimizer = torch.optim.Adam([free], lr=0.1)
    with frozen(model), run.progress("reversing the trigger", steps) as advance:
        for batch in training_batches(data, 64, steps, run):
            with run.arithmetic.autocast():
                if isinstance(batch.inputs, Tokens):
                    scores = perturbed_logits(model, batch.inputs, perturbation())
                else:
                    scores = logits(model, encoded(clean, (batch.inputs + perturbation()).clamp(0, 1), run))
            optimizer.zero_grad(set_to_none=True)
            (-F.cross_entropy(scores.float(), batch.labels)).backward()
            optimizer.step()
            advance()
    found = perturbation().detach()
    return (lambda _embedded: found) if texts else (lambda pixels: (pixels + found).clamp(0, 1))
