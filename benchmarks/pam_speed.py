"""Seconds of PAM's unlearning beside a bare loop with as many forward and backward passes.

    python benchmarks/pam_speed.py [--width 8] [--images 512] [--epochs 1] [--rounds 3]

The bare loop is SGD on the same batches in the same precision and layout, a fifth of each carrying the same trigger; it
does not probe. They take turns; the ratio is that of the medians of processor seconds, which a busy machine disturbs
least.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch.nn import functional as F

import unbackdoor as ub
from unbackdoor import archs
from unbackdoor._precision import choose


def negative(model: object, clean: object, run: object, last: object) -> object:
    """A trigger that costs nothing to reverse."""
    return lambda pixels: 1 - pixels


def ours(model: torch.nn.Module, data: ub.Dataset, epochs: int) -> float:
    method = ub.purifiers.PAM(trigger="pam_speed:negative", rounds=1, epochs=epochs, batch_size=128)
    seconds = 0.0

    def timed(*given: object) -> torch.nn.Module:
        nonlocal seconds
        start = time.process_time()
        purified = method(*given)
        seconds = time.process_time() - start
        return purified

    ub.purify(model, data, timed, device="cpu")
    return seconds


def bare(model: torch.nn.Module, data: ub.Dataset, epochs: int) -> float:
    arithmetic = choose(model, "cpu")
    model = arithmetic.place(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.1)
    start = time.process_time()
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(128):
            pixels = data.items[rows].float() / 255
            pixels[:26] = 1 - pixels[:26]
            inputs = ((pixels - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
            with arithmetic.autocast():
                scores = model(inputs).logits
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(scores.float(), data.labels[rows]).backward()
            optimizer.step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 8), ("images", 512), ("epochs", 1), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    data = ub.Dataset(
        items=torch.randint(0, 256, (options.images, 3, 32, 32), generator=generator, dtype=torch.uint8),
        labels=torch.arange(options.images) % 10,
        encode=ub.ImageEncoder(mean=(0.5,), std=(0.25,), channels=3),
    )

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        names = [str(label) for label in range(10)]
        return archs.build("resnet18", classes=names, channels=3, image_size=32, width=options.width)

    small = replace(data, items=data.items[:128], labels=data.labels[:128])
    ours(model(), small, 1), bare(model(), small, 1)  # the first pass makes kernels
    runs = [(ours(model(), data, options.epochs), bare(model(), data, options.epochs)) for _ in range(options.rounds)]
    mine, plain = (statistics.median(part) for part in zip(*runs, strict=True))
    print(f"PAM {mine:.2f} s, bare {plain:.2f} s, ratio {mine / plain:.2f} (at most 1.3); runs {runs}")


if __name__ == "__main__":
    main()
