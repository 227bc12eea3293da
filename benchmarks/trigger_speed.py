"""Times putting each image trigger on 10,000 images of 32x32, and training with attacks that implant by themselves.

    python benchmarks/trigger_speed.py             # each trigger
    python benchmarks/trigger_speed.py --training  # Input-aware and Bypass, and plain victim training

Times are processor time over all threads, so that other work on the machine does not count. Input-aware learns its
mask in a fixed number of steps first, which matters less in a long training. The pictures are noise: the time does not
depend on their content. Learnt triggers are timed in their state before training, which costs the same.
"""

import argparse
import time
from typing import Any

import torch

from unbackdoor import Dataset, VictimRecipe, attacks, plant
from unbackdoor._models.arithmetic import choose, description
from unbackdoor._poisoning.abilities import Covers
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor.attacks import REGISTRY


def noise(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Dataset(items=items, labels=torch.arange(count) % 10, name="noise")


def seconds_of(call: Any, repeats: int) -> float:
    """The least processor time of several runs, over all threads: other work on the machine does not count."""
    took = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return min(took)


def triggers(count: int) -> None:
    data = noise(count)
    print(f"| trigger | test time, s | cover, s |\n| --- | --- | --- |   (n = {count:,})")
    for entry in REGISTRY:
        if entry.modality != ("images",) or entry.name == "prepared":
            continue
        attack = entry.resolve()()
        trigger = Trigger.of(attack, data)
        took = seconds_of(lambda trigger=trigger: trigger.stamp(data.items), 3)
        cover = "-"
        if isinstance(attack, Covers):
            seed = torch.Generator().manual_seed(0)
            pixels = data.pixels.float() / 255
            covered = seconds_of(
                lambda attack=attack, trigger=trigger, pixels=pixels, seed=seed: [
                    attack.cover(part, trigger.arrays, seed) for part in pixels.split(1024)
                ],
                1,
            )
            cover = f"{covered:.2f}"
        print(f"| {entry.name} | {took:.2f} | {cover} |", flush=True)


def training(count: int, epochs: int, width: int, rate: float) -> None:
    data, test = noise(count), noise(200)
    recipe = VictimRecipe(rate=rate, width=width, epochs=epochs)
    plain = None
    print(f"{count:,} images, {epochs} epochs, ResNet-18 of width {width}, rate {rate:g}")
    plant(data.select(range(256)), attacks.BadNets(), recipe, test=test)  # what runs for the first time is slower
    for attack in (attacks.BadNets(), attacks.Bypass(), attacks.InputAware()):
        took = seconds_of(lambda attack=attack: plant(data, attack, recipe, test=test), 1)
        plain = plain or took
        print(f"| {type(attack).__name__} | {took:.1f} s | {took / plain:.2f} times BadNets |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.05)
    given = parser.parse_args()
    print(description(choose(torch.nn.Conv2d(1, 1, 1))))
    if given.training:
        training(given.count, given.epochs, given.width, given.rate)
    else:
        triggers(given.count)
