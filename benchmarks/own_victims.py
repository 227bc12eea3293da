"""What purifiers leave and cost on victims made like those of other people, on which settings are chosen.

    export UNBACKDOOR_DATA=$(realpath ../shared/data)
    python benchmarks/own_victims.py [mnist-lenet ...] [--methods auto ...] [--precision bf16]

The first four have no normalisation, so usual learning rates ruin them: the settings of the second contrastive
unlearning of `auto` were chosen on these. The passes of scale-invariant FST were chosen on all. 500 clean pictures
purify each, 2,000 others are scored; seed of the purification 0, one thread. Four victims by all methods take about an
hour of one core in float32.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

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


VICTIMS: dict[str, dict[str, Any]] = {
    "mnist-lenet": {
        "data": "mnist/train.parquet",
        "test": "mnist/test.parquet",
        "network": lenet,
        "attack": attacks.BadNets(size=4, margin=0, target=6),
        "rate": 0.1,
        "training": {"epochs": 8, "learning_rate": 0.05, "adaptive": False, "loss": squared_error},
    },
    "fashion-tanh": {
        "data": "fashion_mnist/train.parquet",
        "test": "fashion_mnist/test.parquet",
        "network": tanh_network,
        "attack": attacks.BadNets(size=3, margin=1, target=2),
        "rate": 0.05,
        "training": {"epochs": 6, "learning_rate": 1e-3, "adaptive": True, "loss": cross_entropy},
    },
    "cifar-lenet": {
        "data": "cifar10/train-00000-of-00002.parquet",
        "test": "cifar10/test_jpeg.parquet",
        "network": lenet,
        "attack": attacks.BadNets(size=4, margin=0, target=5),
        "rate": 0.1,
        "training": {"epochs": 8, "learning_rate": 1e-3, "adaptive": True, "loss": squared_error},
    },
    "cifar-tanh": {
        "data": "cifar10/train-00000-of-00002.parquet",
        "test": "cifar10/test_jpeg.parquet",
        "network": tanh_network,
        "attack": attacks.Blended(target=7),
        "rate": 0.1,
        "training": {"epochs": 8, "learning_rate": 1e-3, "adaptive": True, "loss": cross_entropy},
    },
    "cifar-vgg": {
        "data": "cifar10/train-00000-of-00002.parquet",
        "test": "cifar10/test_jpeg.parquet",
        "network": vgg,
        "attack": attacks.BadNets(size=3, margin=0, target=4),
        "rate": 0.05,
        "training": {"epochs": 14, "learning_rate": 1e-3, "adaptive": True, "loss": cross_entropy},
    },
    "cifar-vgg-blended": {
        "data": "cifar10/train-00000-of-00002.parquet",
        "test": "cifar10/test_jpeg.parquet",
        "network": vgg,
        "attack": attacks.Blended(target=1),
        "rate": 0.1,
        "training": {"epochs": 14, "learning_rate": 1e-3, "adaptive": True, "loss": cross_entropy},
    },
    "cifar-resnet": {
        "data": "cifar10/train-00000-of-00002.parquet",
        "test": "cifar10/test_jpeg.parquet",
        "network": narrow_resnet,
        "attack": attacks.BadNets(size=4, margin=1, target=9),
        "rate": 0.1,
        "training": {"epochs": 10, "learning_rate": 2e-3, "adaptive": True, "loss": cross_entropy},
    },
}
MOST = {"mnist": 12_000, "fashion_mnist": 12_000, "cifar10": 20_000}  # training pictures
SHIFT = purifiers.ScaleInvariantFST(strength=1)

METHODS = {
    "fine-tuning": purifiers.FineTuning(),
    "shift": SHIFT,
    "shift, 10 passes": replace(SHIFT, epochs=10),
    "shift, alpha 1": replace(SHIFT, alpha=1.0),
    "shift, alpha 10": replace(SHIFT, alpha=10.0),
    "shift, 0.03, batches of 25": replace(SHIFT, learning_rate=0.03, batch_size=25),
    "trigger-distillation": purifiers.TriggerDistillation(),
    "contrastive-unlearning": purifiers.ContrastiveUnlearning(),
    "contrastive-unlearning, 0.002, 30 passes": purifiers.ContrastiveUnlearning(learning_rate=0.002, epochs=30),
    "auto": purifiers.Auto(),
}


def planted(name: str, precision: str) -> tuple[nn.Module, Any, ub.Dataset, ub.Dataset]:
    """A victim, its trigger, clean pictures and others to score."""
    facts = VICTIMS[name]
    folder = Path(os.environ["UNBACKDOOR_DATA"]) / "vision"
    training, test = (ub.Dataset.load(folder / facts[part]) for part in ("data", "test"))
    most = MOST[facts["data"].split("/")[0]]
    training = training if len(training) <= most else training.split(most, seed=1)[0]
    clean, test = test.split(CLEAN, seed=3)
    torch.manual_seed(7)
    model: nn.Module = facts["network"](training.shape[0])
    model(torch.zeros(1, *training.shape))  # the lazy layer learns its size
    poisoned = ub.poison(training, facts["attack"], rate=facts["rate"], seed=0, classes=10)
    arithmetic = choose(model, "cpu", precision)
    model = train_victim(model, poisoned.data, batch_size=64, seed=0, arithmetic=arithmetic, **facts["training"])
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
