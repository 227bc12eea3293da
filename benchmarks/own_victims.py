"""What purifiers leave and cost on victims made like those of other people, on which settings are chosen.

    export UNBACKDOOR_DATA=$(realpath ../shared/data)
    python benchmarks/own_victims.py [mnist-lenet ...] [--methods auto ...] [--precision bf16]

The first four have no normalisation, so usual learning rates ruin them. Scale-invariant FST was set
on all nine. 500 clean pictures purify each, 2,000 others are scored; seed of the purification 0, one thread. Four
victims by all methods take about an hour of one core in float32.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbackdoor as ub
from unbackdoor import attacks, purifiers
from unbackdoor._data.dataset import Batch
from unbackdoor._models.arithmetic import choose
from unbackdoor._training.descent import cross_entropy
from unbackdoor._victims.training import train_victim

CLEAN, TEST = 500, 2000


def lenet(channels: int) -> nn.Sequential:
    """Two convolutions of 5x5 with ReLU and maximum pooling, and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 12, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def tanh_network(channels: int) -> nn.Sequential:
    """Four convolutions of 3x3 with ReLU and mean pooling, a hidden layer with tanh, and a head."""
    blocks: list[nn.Module] = []
    for before, width in ((channels, 24), (24, 48)):
        for inputs in (before, width):
            blocks += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
        blocks.append(nn.AvgPool2d(2))
    return nn.Sequential(*blocks, nn.Flatten(), nn.LazyLinear(256), nn.Tanh(), nn.Linear(256, 10))


def vgg(channels: int) -> nn.Sequential:
    """Six convolutions of 3x3 with ELU, BatchNorm, maximum pooling and dropout, and a head on 1,536 features."""
    layers: list[nn.Module] = []
    for before, width, drop in ((channels, 24, 0.2), (24, 48, 0.3), (48, 96, 0.4)):
        for inputs in (before, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ELU(), nn.BatchNorm2d(width)]
        layers += [nn.MaxPool2d(2), nn.Dropout(drop)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


class Block(nn.Module):
    """Two convolutions of 3x3 with BatchNorm, and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.body = nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.BatchNorm2d(outputs))
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features, (batch, channels, height, width)."""
        return F.relu(self.body(x) + self.skip(x))


def narrow_resnet(channels: int) -> nn.Sequential:
    """Six blocks of 16, 32 and 64 channels, and a head on 64 pooled features."""
    stem = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [
        Block(16, 16, 1),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 32, 1),
        Block(32, 64, 2),
        Block(64, 64, 1),
    ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def squared_error(scores: Tensor, batch: Batch) -> Tensor:
    """The squared error of the softmax, summed over the classes."""
    goal = F.one_hot(batch.labels, scores.shape[1]).to(scores)
    return (scores.softmax(dim=1) - goal).square().mean() * scores.shape[1]


class Recipe(NamedTuple):
    """How a victim is made.

    Args:
        data: a key of `DATA`.
        network: from the number of channels to the untrained network.
        attack: what is planted.
        rate: share of the training pictures that are poisoned, 0 to 1.
        epochs: passes.
        learning_rate: of AdamW, or of SGD if not `adaptive`.
        adaptive: whether AdamW trains it.
        loss: of scores, (batch, classes), and a batch.
    """

    data: str
    network: Callable[[int], nn.Sequential]
    attack: attacks.BadNets | attacks.Blended
    rate: float
    epochs: int
    learning_rate: float = 1e-3
    adaptive: bool = True
    loss: Callable[[Tensor, Batch], Tensor] = cross_entropy


DATA = {  # training pictures, test pictures, and how many of the first are used at most
    "mnist": ("mnist/train.parquet", "mnist/test.parquet", 12_000),
    "fashion": ("fashion_mnist/train.parquet", "fashion_mnist/test.parquet", 12_000),
    "cifar": ("cifar10/train-00000-of-00002.parquet", "cifar10/test_jpeg.parquet", 20_000),
}
SMALL, LARGE = attacks.BadNets(size=3, margin=0, target=4), attacks.BadNets(size=4, margin=0, target=6)
VICTIMS = {
    "mnist-lenet": Recipe("mnist", lenet, LARGE, 0.1, 8, 0.05, adaptive=False, loss=squared_error),
    "fashion-tanh": Recipe("fashion", tanh_network, replace(SMALL, margin=1, target=2), 0.05, 6),
    "cifar-lenet": Recipe("cifar", lenet, replace(LARGE, target=5), 0.1, 8, loss=squared_error),
    "cifar-tanh": Recipe("cifar", tanh_network, attacks.Blended(target=7), 0.1, 8),
    "cifar-vgg": Recipe("cifar", vgg, SMALL, 0.05, 14),
    "cifar-vgg-blended": Recipe("cifar", vgg, attacks.Blended(target=1), 0.1, 14),
    "cifar-vgg-solid": Recipe("cifar", vgg, attacks.BadNets(pattern="solid", size=4, margin=0, target=8), 0.1, 14),
    "cifar-vgg-inside": Recipe("cifar", vgg, attacks.BadNets(pattern="solid", size=4, margin=3, target=8), 0.05, 14),
    "cifar-resnet": Recipe("cifar", narrow_resnet, replace(LARGE, margin=1, target=9), 0.1, 10, 2e-3),
}
SHIFT = purifiers.ScaleInvariantFST(strength=1)

METHODS = {
    "fine-tuning": purifiers.FineTuning(),
    "shift": SHIFT,
    "shift, 10 passes": replace(SHIFT, epochs=10),
    "shift, 120 passes": replace(SHIFT, epochs=120),
    "shift, 120 passes, alpha 6": replace(SHIFT, epochs=120, alpha=6.0),
    "shift, 120 passes, alpha 10": replace(SHIFT, epochs=120, alpha=10.0),
    "shift, alpha 1": replace(SHIFT, alpha=1.0),
    "shift, alpha 10": replace(SHIFT, alpha=10.0),
    "shift, 0.02": replace(SHIFT, learning_rate=0.02),
    "trigger-distillation": purifiers.TriggerDistillation(),
    "contrastive-unlearning": purifiers.ContrastiveUnlearning(),
    "adaptive-unlearning": purifiers.AdaptiveUnlearning(),
    "contrastive-unlearning, 0.002, 30 passes": purifiers.ContrastiveUnlearning(learning_rate=0.002, epochs=30),
    "auto": purifiers.Auto(),
}


def planted(name: str, precision: str) -> tuple[nn.Module, Any, ub.Dataset, ub.Dataset]:
    """A victim, its trigger, clean pictures and others to score."""
    recipe = VICTIMS[name]
    *files, most = DATA[recipe.data]
    folder = Path(os.environ["UNBACKDOOR_DATA"]) / "vision"
    training, test = (ub.Dataset.load(folder / file) for file in files)
    training = training if len(training) <= most else training.split(most, seed=1)[0]
    clean, test = test.split(CLEAN, seed=3)
    torch.manual_seed(7)
    model: nn.Module = recipe.network(training.shape[0])
    model(torch.zeros(1, *training.shape))  # the lazy layer learns its size
    poisoned = ub.poison(training, recipe.attack, rate=recipe.rate, seed=0, classes=10)
    model = train_victim(
        model,
        poisoned.data,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        batch_size=64,
        seed=0,
        arithmetic=choose(model, "cpu", precision),
        adaptive=recipe.adaptive,
        loss=recipe.loss,
    )
    return model, poisoned.trigger, clean, test.split(TEST, seed=5)[0]


def measured(name: str, methods: list[str], precision: str) -> None:
    """Plant a victim, purify it by each method, and print a row for each."""
    victim, trigger, clean, test = planted(name, precision)
    for method in ["none", *methods]:
        start = time.process_time()
        kept, model = "", victim
        if method != "none":
            result = ub.purify(victim, clean, METHODS[method], seed=0, device="cpu", precision=precision)
            choice = result.record.get("choice")
            kept, model = "" if choice is None else f" (kept {choice['kept'] or 'the suspect'})", result.model
        seconds = time.process_time() - start
        score = ub.evaluate(model, test, attack=trigger, device="cpu", precision=precision)
        assert score.attack_success is not None
        assert score.recovered_accuracy is not None
        shares = (score.clean_accuracy, score.attack_success, score.recovered_accuracy)
        cells = " / ".join(f"{100 * each.value:.1f}" for each in shares)
        print(f"| {name} | {method}{kept} | {cells} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("victims", nargs="*", default=list(VICTIMS), choices=list(VICTIMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| victim | method | clean accuracy / attack success / recovered accuracy | processor seconds |")
    print("| --- | --- | --- | --- |")
    for chosen in options.victims:
        measured(chosen, options.methods, options.precision)
