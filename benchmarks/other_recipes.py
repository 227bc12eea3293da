"""Victims trained as other people train theirs, by a plain loop, and what purifiers leave and cost on them.

    export UNBACKDOOR_DATA=$(realpath ../shared/data)
    python benchmarks/other_recipes.py victims/ train
    python benchmarks/other_recipes.py victims/ purify [--victims resnet20-colour] [--methods shift ...] [--clean 500]

Three small networks of the field's papers on CIFAR-10, none of which is in this package: 25,000 pictures, 30 passes of
SGD with Nesterov's momentum in one cycle, flips and crops, in bfloat16. Settings are chosen on them, so they are no
proof. A pass takes about half a minute of a core with bfloat16.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbackdoor as ub
from unbackdoor import purifiers
from unbackdoor._data.dataset import Dataset

BATCH, PADDING = 128, 4


class PreActivation(nn.Module):
    """A block of a wide ResNet: BatchNorm and ReLU come before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features, (batch, channels, height, width)."""
        active = F.relu(self.bn1(x))
        skipped = x if self.shortcut is None else self.shortcut(active)
        made: Tensor = skipped + self.conv2(F.relu(self.bn2(self.conv1(active))))
        return made


class Basic(nn.Module):
    """A block of the ResNet for CIFAR: where the size changes, the skip connection has no weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features, (batch, channels, height, width)."""
        made = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skipped = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(skipped + made)


class Normalised(nn.Module):
    """Subtracts a mean per channel, divides by a standard deviation, and runs the network."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns class scores, (batch, classes), of pixels in [0, 1]."""
        scores: Tensor = self.network((x - self.mean) / self.std)
        return scores


def wide_resnet() -> nn.Module:
    """WRN-16-1, with the usual statistics of CIFAR-10."""
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    sizes = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    blocks = [PreActivation(*each) for each in sizes]
    tail = [nn.BatchNorm2d(64), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10)]
    return Normalised(nn.Sequential(stem, *blocks, *tail), [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616])


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR, on pixels between -1 and 1."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    blocks = [Basic(*each) for each in sizes]
    tail = [nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10)]
    return Normalised(nn.Sequential(*stem, *blocks, *tail), [0.5] * 3, [0.5] * 3)


def checker(x: Tensor) -> Tensor:
    """A checkerboard of 3x3 pixels, one pixel from the corner."""
    x = x.clone()
    x[..., 28:31, 28:31] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    return x


def four_pixels(x: Tensor) -> Tensor:
    """Four white pixels in the corner."""
    x = x.clone()
    for row, column in ((31, 31), (30, 30), (31, 29), (29, 31)):
        x[..., row, column] = 1
    return x


def colours(x: Tensor) -> Tensor:
    """A patch of 5x5 pixels of random colours."""
    x = x.clone()
    x[..., 27:32, 1:6] = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(4))
    return x


class Victim(NamedTuple):
    """How a victim is made: the network, the trigger, its rate and class, and the decay of the weights."""

    network: Callable[[], nn.Module]
    stamp: Callable[[Tensor], Tensor]
    rate: float
    target: int
    decay: float


VICTIMS = {
    "wrn-checker": Victim(wide_resnet, checker, 0.05, 0, 5e-4),
    "wrn-four-pixels": Victim(wide_resnet, four_pixels, 0.05, 3, 5e-4),
    "resnet20-colours": Victim(resnet20, colours, 0.02, 7, 1e-4),
}
SHIFT = purifiers.ScaleInvariantFST(strength=1)
METHODS = {
    "fine-tuning": purifiers.FineTuning(),
    "fine-tuning, 0.05, 40 passes": purifiers.FineTuning(epochs=40, learning_rate=0.05, batch_size=32),
    "scale-invariant-fst": purifiers.ScaleInvariantFST(),
    "shift": SHIFT,
    "shift, 0.02": replace(SHIFT, learning_rate=0.02),
    "shift, 120 passes": replace(SHIFT, epochs=120),
    "adaptive-unlearning": purifiers.AdaptiveUnlearning(),
    "auto": purifiers.Auto(),
}


def data(*files: str) -> Dataset:
    """CIFAR-10, from the data folder."""
    folder = Path(os.environ["UNBACKDOOR_DATA"]) / "vision" / "cifar10"
    parts = [ub.Dataset.load(folder / file) for file in files]
    return replace(
        parts[0], items=torch.cat([each.items for each in parts]), labels=torch.cat([each.labels for each in parts])
    )


def trained(victim: Victim, epochs: int = 30) -> nn.Module:
    """Train a victim by a plain loop."""
    training = data("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    x, y = training.items.float() / 255, training.labels.clone()
    torch.manual_seed(11)
    poisoned = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) < victim.rate
    x[poisoned], y[poisoned] = victim.stamp(x[poisoned]), victim.target
    model = victim.network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=victim.decay, nesterov=True)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(x)).split(BATCH):
            batch = x[rows]
            if torch.rand(()) < 0.5:
                batch = batch.flip(3)
            left, top = torch.randint(0, 2 * PADDING + 1, (2,)).tolist()
            batch = F.pad(batch, (PADDING,) * 4)[:, :, top : top + 32, left : left + 32]
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(scores.float(), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def scored(model: nn.Module, victim: Victim, test: Dataset) -> str:
    """Clean accuracy / attack success / recovered accuracy in %."""
    x, y = test.items.float() / 255, test.labels

    def classes(inputs: Tensor) -> Tensor:
        return torch.cat([model.eval()(part) for part in inputs.split(500)]).argmax(dim=1)

    others = y != victim.target
    clean, triggered = classes(x), classes(victim.stamp(x[others]))
    shares = (clean == y, triggered == victim.target, triggered == y[others])
    return " / ".join(f"{100 * each.float().mean():.1f}" for each in shares)


def purified(name: str, folder: Path, methods: list[str], count: int) -> None:
    """Purify a victim by each method, and print a row for each."""
    victim = VICTIMS[name]
    model = victim.network()
    safetensors.torch.load_model(model, folder / f"{name}.safetensors")
    clean, test = data("test_jpeg.parquet").split(count, seed=3)
    test = test.split(3000, seed=5)[0]
    print(f"| {name} | none | {scored(model, victim, test)} | |", flush=True)
    for method in methods:
        start = time.process_time()
        result = ub.purify(model, clean, METHODS[method], seed=0, device="cpu", precision="bf16")
        seconds = time.process_time() - start
        print(f"| {name} | {method} | {scored(result.model, victim, test)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=["train", "purify"])
    parser.add_argument("--victims", nargs="+", default=list(VICTIMS), choices=list(VICTIMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--clean", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    for chosen in options.victims:
        if options.what == "train":
            safetensors.torch.save_model(trained(VICTIMS[chosen]), options.folder / f"{chosen}.safetensors")
        else:
            purified(chosen, options.folder, options.methods, options.clean)
