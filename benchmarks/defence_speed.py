"""Compares methods whose step is more than one backward pass with bare PyTorch loops of the same passes.

    python benchmarks/defence_speed.py                                              # ResNet-18 of width 16, 512 images
    python benchmarks/defence_speed.py --width 4 --images 64 --batch 32 --rounds 2  # a try

Each method runs through `unbackdoor.purify`, and as a loop written by hand with as many forward, backward and second
backward passes on batches of the same size, in the same precision and memory layout. They take turns in one process;
the ratio is that of the medians, and the target is 1.3 at most. Without a GPU the clock counts processor seconds,
which other work on the machine changes less. Augmentation is off in both. `purify` begins and ends with a check, one
pass without gradients over the images each; the bare loop makes the same passes. The images are random, which costs
the same.

To add a method, add a line to `CONTENDERS`: its settings, and its bare loop.
"""

import argparse
import copy
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbackdoor as ub
from unbackdoor._models.arithmetic import choose, description


class Bare:
    """Parts that the bare loops share: batches in the right layout, and the loss of a batch in the right precision."""

    def __init__(self, model: nn.Module, data: ub.Dataset, batch: int) -> None:
        arithmetic = choose(model)
        self.device, self.bf16 = arithmetic.device, arithmetic.bf16
        self.layout = torch.channels_last if arithmetic.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.parameters = list(model.parameters())
        self.pixels, self.labels, self.batch = data.pixels.to(self.device), data.labels.to(self.device), batch
        self.adam = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.evaluation_batch = arithmetic.evaluation_batch
        self.look()

    @torch.no_grad()
    def look(self) -> None:
        """A pass without gradients."""
        self.model.eval()
        for pixels in self.pixels.split(self.evaluation_batch):
            self.loss(self.inputs(pixels), torch.zeros(len(pixels), dtype=torch.int64, device=self.device))

    def inputs(self, pixels: Tensor) -> Tensor:
        """The model inputs of pixels."""
        return (pixels.float() / 255).contiguous(memory_format=self.layout)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """One shuffled pass: inputs and labels."""
        rows = torch.randperm(len(self.pixels), device=self.device).split(self.batch)
        return [(self.inputs(self.pixels[part]), self.labels[part]) for part in rows]

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            scores = self.model(inputs).logits
        return F.cross_entropy(scores.float(), labels)


def bare_i_bau(bare: Bare, rounds: int = 1, iterations: int = 5) -> None:
    """A search of one first derivative a batch; then, a batch, two first and `iterations` second derivatives."""
    for _ in range(rounds):
        shift = torch.zeros_like(bare.inputs(bare.pixels[:1]))
        for x, y in bare.batches():
            shift.requires_grad_(True)
            (slope,) = torch.autograd.grad(-bare.loss(x + shift, y), shift)
            shift = shift.detach() - 0.1 * slope / slope.norm()
        for x, y in bare.batches():
            shift.requires_grad_(True)
            along, *direct = torch.autograd.grad(bare.loss(x + shift, y), [shift, *bare.parameters])
            (slope,) = torch.autograd.grad(-bare.loss(x + shift, y), shift, create_graph=True)
            v = along
            for _ in range(iterations - 1):
                v = along + v - 0.1 * torch.autograd.grad(slope, shift, v, retain_graph=True)[0]
            mixed = torch.autograd.grad(slope, bare.parameters, v, materialize_grads=True)
            for parameter, one, other in zip(bare.parameters, direct, mixed, strict=True):
                parameter.grad = one - 0.1 * other
            bare.adam.step()


def bare_ft_sam(bare: Bare) -> None:
    """Two first derivatives a batch."""
    bare.model.train()
    for x, y in bare.batches():
        slopes = torch.autograd.grad(bare.loss(x, y), bare.parameters)
        norm = math.sqrt(
            sum(float((p.detach() * g).square().sum()) for p, g in zip(bare.parameters, slopes, strict=True))
        )
        steps = [p.detach().square() * g / norm for p, g in zip(bare.parameters, slopes, strict=True)]
        with torch.no_grad():
            torch._foreach_add_(bare.parameters, steps)
        bare.adam.zero_grad()
        bare.loss(x, y).backward()
        with torch.no_grad():
            torch._foreach_sub_(bare.parameters, steps)
        bare.adam.step()


def bare_anp(bare: Bare, steps: int = 4) -> None:
    """Three first derivatives a batch, by what BatchNorm scales and adds alone."""
    norms = [layer for layer in bare.model.modules() if isinstance(layer, nn.BatchNorm2d)]
    weights, biases = [layer.weight for layer in norms], [layer.bias for layer in norms]
    bare.model.requires_grad_(False).train()
    for parameter in (*weights, *biases):
        parameter.requires_grad_(True)
    descent = torch.optim.SGD(weights, lr=0.2, momentum=0.9)
    batches = itertools.chain.from_iterable(bare.batches() for _ in itertools.count())
    for x, y in itertools.islice(batches, steps):
        descent.zero_grad()
        bare.loss(x, y).backward(inputs=weights)
        torch.autograd.grad(bare.loss(x, y), [*weights, *biases])
        bare.loss(x, y).backward(inputs=weights)
        descent.step()


def negative(_model: nn.Module, _clean: ub.Dataset, _run: object, _last: object) -> Callable[[Tensor], Tensor]:
    """A trigger that costs nothing to reverse."""
    return lambda pixels: 1 - pixels


def bare_pam(bare: Bare) -> None:
    """One first derivative a batch, of which a fifth carries a trigger."""
    bare.model.train()
    descent = torch.optim.SGD(bare.parameters, lr=0.01, momentum=0.1)
    for x, y in bare.batches():
        some = int(0.2 * len(x) + 1)
        x[:some] = 1 - x[:some]
        descent.zero_grad()
        bare.loss(x, y).backward()
        descent.step()


CONTENDERS: dict[str, tuple[Callable[[int], Any], Callable[[Bare], None]]] = {
    "anp": (lambda batch: ub.purifiers.ANP(steps=4, batch_size=batch, threshold=0.0), bare_anp),
    "pam": (lambda batch: ub.purifiers.PAM(trigger="__main__:negative", epochs=1, batch_size=batch), bare_pam),
    "i-bau": (lambda batch: ub.purifiers.IBAU(rounds=1, batch_size=batch), bare_i_bau),
    "ft-sam": (lambda batch: ub.purifiers.FTSAM(epochs=1, batch_size=batch), bare_ft_sam),
}


def run_bare(loop: Callable[[Bare], None], model: nn.Module, data: ub.Dataset, batch: int) -> None:
    bare = Bare(model, data, batch)
    loop(bare)
    bare.look()


def seconds(work: Callable[[], Any]) -> float:
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    start = clock()
    work()
    if gpu:
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("width", 16, "channels of the first stage"),
        ("images", 512, "clean images"),
        ("batch", 128, "images per step"),
        ("rounds", 5, "turns that are measured, after one that is not"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="these alone")
    options = parser.parse_args()
    logging.getLogger("unbackdoor").setLevel(logging.ERROR)  # random weights are near chance, and it would say so
    torch.manual_seed(0)
    model = ub.archs.build(
        "resnet18", classes=[str(label) for label in range(10)], channels=3, image_size=32, width=options.width
    )
    data = ub.Dataset(
        items=torch.randint(256, (options.images, 3, 32, 32), dtype=torch.uint8),
        labels=torch.arange(options.images) % 10,
    )
    print(description(choose(model)))
    print(f"{'method':10} {'ours':>9} {'bare':>9} {'ratio':>6}   seconds, median of {options.rounds}")
    for name in options.only:
        made, loop = CONTENDERS[name]
        times: dict[str, list[float]] = {"ours": [], "bare": []}
        for _ in range(options.rounds + 1):
            times["ours"].append(seconds(lambda made=made: ub.purify(model, data, made(options.batch))))
            times["bare"].append(seconds(lambda loop=loop: run_bare(loop, copy.deepcopy(model), data, options.batch)))
        ours, bare = (statistics.median(part[1:]) for part in times.values())
        print(f"{name:10} {ours:9.2f} {bare:9.2f} {ours / bare:6.2f}", flush=True)


if __name__ == "__main__":
    main()
