"""Query-based reactivation: a learnt input perturbation that searches for the backdoor of a purified model.

No weight changes. A small network adds a faint perturbation to each picture, so that the purified model answers as a
retuned copy of itself does, while a model that was never poisoned still answers with the true class: without that
second half, any adversarial example would suffice.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.images import ImageEncoder
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import evaluating, logits
from unbackdoor._poisoning.trigger import stamped
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._tasks.classification import predict
from unbackdoor._tasks.proportion import Proportion, proportion_of

MODALITY = ("images",)  # whose inputs are pixels
EXAMPLES = 500  # clean ones, and as many triggered
EPOCHS, LEARNING_RATE, BATCH = 50, 0.1, 128


class Perturbation(nn.Module):
    """A perturbation for each picture, of at most 16 of 255 levels, made by a network of four linear layers.

    Args:
        encode: encoder that normalises the pictures for the network.
        shape: (channels, height, width) of the pictures.
        bound: bound of the perturbation, in levels of 255.
        width: width of the hidden layers.
    """

    def __init__(self, encode: ImageEncoder, shape: tuple[int, ...], *, bound: float = 16.0, width: int = 1024) -> None:
        super().__init__()
        self.normalise = replace(encode, size=None, shortest_edge=None, crop=None)
        self.bound = bound
        values = int(torch.Size(shape).numel())
        sides = (values, width, width, width, values)
        layers: list[nn.Module] = []
        for before, after in pairwise(sides):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, pixels: Tensor) -> Tensor:
        """The perturbed pictures, floats in [0, 255], of pictures (batch, channels, height, width) in that range."""
        drawn: Tensor = self.layers(self.normalise(pixels).flatten(1)).view_as(pixels)
        return (pixels + self.bound * drawn).clamp(0, 255)


def learn(
    purified: nn.Module,
    teacher: nn.Module,
    data: Dataset,
    *,
    control: nn.Module | None,
    control_encode: Encoder | None,
    alpha: float,
    seed: int,
    arithmetic: Arithmetic,
    advance: Callable[[], None],
    epochs: int,
) -> Perturbation:
    """Learn a perturbation d by SGD, all classifiers being frozen and in eval mode. Over (x, y) it minimises

        alpha * KL( teacher(x) || purified(x + d(x)) ) + CE( control(x + d(x)), y )

    Args:
        purified: the model to reactivate.
        teacher: the same model, retuned; it gets pictures without perturbation.
        data: clean and triggered pictures with their true labels.
        control: a model that was never poisoned; without one the second half of the loss is missing.
        control_encode: makes its inputs, if they are not made as the model's.
        alpha: weight of the first half; a larger one reactivates more, but makes the result more of an adversarial
            example.
        seed: seed of the first weights and the batches.
        arithmetic: device, precision, layout.
        advance: function that is called after each epoch.
        epochs: passes over the pictures.
    """
    data = data.to(arithmetic.device)
    encode: Any = data.encode
    by_control: Any = data.encoded_by(control_encode or encode).encode
    pixels = data.pixels.float()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        perturbation = Perturbation(encode, data.shape).to(arithmetic.device)
    optimizer = torch.optim.SGD(perturbation.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def answers(model: nn.Module, shown: Tensor, by: Any) -> Tensor:
        with arithmetic.autocast():
            return logits(model, arithmetic.lay(by(shown))).float()

    frozen = [model for model in (purified, teacher, control) if model is not None]
    for model in frozen:
        arithmetic.place(model).requires_grad_(False)  # gradients of weights would be computed for nothing
    try:
        with ExitStack() as stack:
            for model in frozen:
                stack.enter_context(evaluating(model))
            with torch.no_grad():
                wanted = torch.cat([answers(teacher, part, encode).softmax(dim=1) for part in pixels.split(BATCH)])
            for _ in range(epochs):
                for rows in torch.randperm(len(data), generator=generator).to(arithmetic.device).split(BATCH):
                    shown = perturbation(pixels[rows])
                    reactivated = answers(purified, shown, encode).log_softmax(dim=1)
                    loss = alpha * F.kl_div(reactivated, wanted[rows], reduction="batchmean")
                    if control is not None:
                        loss = loss + F.cross_entropy(answers(control, shown, by_control), data.labels[rows])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                advance()
    finally:
        for model in frozen:
            model.requires_grad_(True)
    return perturbation.eval()


@torch.no_grad()
def perturbed(data: Dataset, perturbation: Perturbation) -> Dataset:
    """The pictures of a data set with their perturbations, rounded to 8 bits as exported pictures are."""
    home = next(perturbation.parameters()).device
    return replace(
        data,
        items=stamped(data.pixels.to(home), lambda pixels: perturbation(255 * pixels) / 255).to(data.labels.device),
    )


@dataclass(frozen=True)
class Reach:
    """Shares of pictures that a model classifies as the attacker wants, of the classes that the attack moves.

    Args:
        clean: share without trigger and perturbation.
        clean_perturbed: share with the perturbation alone.
        triggered: share with the trigger alone.
        triggered_perturbed: share with both.
    """

    clean: Proportion
    clean_perturbed: Proportion
    triggered: Proportion
    triggered_perturbed: Proportion


def reach_of(
    model: nn.Module, clean: Dataset, attacked: Triggered, perturbation: Perturbation, arithmetic: Arithmetic,
    encode: Encoder | None = None,
) -> Reach:  # fmt: skip
    """Count the pictures that are classified as the attacker wants, with and without perturbation and trigger.

    Args:
        model: the purified one, or the control.
        clean: the pictures of `attacked` before they got the trigger, row for row.
        attacked: the triggered ones.
        perturbation: the learnt one.
        arithmetic: device, precision, layout.
        encode: makes the model's inputs, if they are not made as the data's encoder makes them.
    """
    wanted = attacked.wanted.cpu()

    def share(data: Dataset) -> Proportion:
        shown = data if encode is None else data.encoded_by(encode)
        return proportion_of(predict(model, shown, arithmetic) == wanted)

    return Reach(
        share(clean),
        share(perturbed(clean, perturbation)),
        share(attacked.data),
        share(perturbed(attacked.data, perturbation)),
    )
