"""Wall time and peak memory of one purification and one evaluation, compared with two loops written by hand.

    python benchmarks/purify_speed.py                                 # the real size: many minutes
    python benchmarks/purify_speed.py --width 16 --images 100 --test 200 --epochs 2 --rounds 1   # a try (seconds)

The work: Feature Shift Tuning of a ResNet-18 on 1,000 images of 32x32 for 10 epochs, then one evaluation of 10,000
clean images and the 9,000 of them that can carry the trigger. The contenders:

    ours   unbackdoor.purify and unbackdoor.evaluate
    bare   the same steps as a bare PyTorch loop: same precision, memory layout, batches, augmentation in tensors
    plain  the usual research script: float32, NCHW, PIL transforms per sample and epoch in a DataLoader without
           workers, an evaluation before and one after, in batches of 128

They take turns, each in a process of its own, so that peak memory is each one's own. UNBACKDOOR_DATA names the folder
of the real data sets (their CIFAR-10 is used); without it the images are random, which costs the same.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Nothing heavy is imported up here: the peak memory of a child process counts from its parent's.

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
TARGET, ALPHA, LEARNING_RATE, BATCH, PATCH = 0, 0.1, 0.01, 128, 3
CONTENDERS = ("ours", "bare", "plain")


# ---------------------------------------------------------------------------------------------------- the contenders
# Each takes the options and the arrays, and returns seconds by part, the number of images that each evaluation saw, and
# its precision. Imports and the making of the model come before the clock starts.


def run_ours(options: argparse.Namespace, arrays: dict[str, Any]) -> dict[str, Any]:
    import torch

    import unbackdoor as ub
    from unbackdoor._data.augmentation import Augmentation

    encode = ub.ImageEncoder(mean=MEAN, std=STD, channels=3)
    clean, test = (
        ub.Dataset(
            items=torch.from_numpy(arrays[f"{part}_pixels"]),
            labels=torch.from_numpy(arrays[f"{part}_labels"]),
            encode=encode,
            augment=Augmentation(),
        )
        for part in ("clean", "test")
    )
    model, attack = suspect(options), ub.attacks.BadNets(pattern="solid", size=PATCH, margin=0, target=TARGET)
    method = ub.purifiers.FST(alpha=ALPHA, epochs=options.epochs, learning_rate=LEARNING_RATE, batch_size=BATCH)
    clock = Clock(options.device)
    purified = ub.purify(model, clean, method, device=options.device)
    tuning = clock.lap()
    score = ub.evaluate(purified.model, test, attack=attack, device=options.device)
    evaluation = clock.lap()
    assert score.attack_success is not None
    return {
        "tuning": tuning,
        "evaluation": evaluation,
        "evaluated": score.clean_accuracy.n + score.attack_success.n,
        "precision": purified.record["device"].rsplit(", ", 2)[1],
    }


def run_bare(options: argparse.Namespace, arrays: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F

    device, bf16 = torch.device(options.device), multiplies_bf16(options.device)
    mean, std = (torch.tensor(part, device=device).view(1, 3, 1, 1) for part in (MEAN, STD))
    model = suspect(options)
    pixels, labels = (torch.from_numpy(arrays[f"clean_{part}"]).to(device) for part in ("pixels", "labels"))
    test_pixels, test_labels = (torch.from_numpy(arrays[f"test_{part}"]).to(device) for part in ("pixels", "labels"))

    def forward(batch: torch.Tensor) -> torch.Tensor:
        inputs = ((batch.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            scores: torch.Tensor = model(inputs).logits
        return scores.float()

    def augmented(batch: torch.Tensor) -> torch.Tensor:
        count, side = len(batch), batch.shape[-1]
        padded = F.pad(batch, (4, 4, 4, 4)).permute(0, 2, 3, 1)
        offsets = torch.randint(0, 9, (2, count, 1), device=device) + torch.arange(side, device=device)
        rows, columns = offsets[0, :, :, None], offsets[1, :, None, :]
        cropped = padded[torch.arange(count, device=device)[:, None, None], rows, columns].permute(0, 3, 1, 2)
        mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
        return torch.where(mirrored, cropped.flip(-1), cropped)

    clock = Clock(options.device)
    model.to(device, memory_format=torch.channels_last)
    head, original, optimizer, schedule = prepared(model, options.epochs)
    model.train()
    for _ in range(options.epochs):
        for rows in torch.randperm(len(pixels), device=device).split(BATCH):
            scores = forward(augmented(pixels[rows]))
            fst_step(F.cross_entropy(scores, labels[rows]), head, original, optimizer)
        schedule.step()
    tuning = clock.lap()
    model.eval()
    moved = test_labels != TARGET
    triggered = test_pixels[moved]
    triggered[:, :, -PATCH:, -PATCH:] = 255
    with torch.no_grad():
        for images in (test_pixels, triggered):
            torch.cat([forward(part).argmax(1) for part in images.split(evaluation_batch(options.device))]).cpu()
    return {
        "tuning": tuning,
        "evaluation": clock.lap(),
        "evaluated": len(test_pixels) + len(triggered),
        "precision": "bf16 autocast" if bf16 else "float32",
    }


def run_plain(options: argparse.Namespace, arrays: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch
    from PIL import Image, ImageOps
    from torch.nn import functional as F
    from torch.utils.data import DataLoader

    model = suspect(options).to(options.device)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (MEAN, STD))

    class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
        """Pictures by row, transformed by PIL each time."""

        def __init__(self, pixels: Any, labels: Any, augment: bool) -> None:
            self.pictures = [Image.fromarray(pixel.transpose(1, 2, 0)) for pixel in pixels]
            self.labels, self.augment, self.random = labels, augment, np.random.default_rng(0)

        def __len__(self) -> int:
            return len(self.pictures)

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
            picture = self.pictures[row]
            if self.augment:
                left, top = self.random.integers(0, 9, 2)
                width, height = picture.size
                picture = ImageOps.expand(picture, 4).crop((left, top, left + width, top + height))
                if self.random.random() < 0.5:
                    picture = ImageOps.mirror(picture)
            tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
            return (tensor - mean) / std, int(self.labels[row])

    moved = arrays["test_labels"] != TARGET
    stamped = arrays["test_pixels"][moved].copy()
    stamped[:, :, -PATCH:, -PATCH:] = 255
    training = Pictures(arrays["clean_pixels"], arrays["clean_labels"], augment=True)
    tests = [
        Pictures(arrays["test_pixels"], arrays["test_labels"], augment=False),
        Pictures(stamped, arrays["test_labels"][moved], augment=False),
    ]

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        for test in tests:
            for inputs, _ in DataLoader(test, batch_size=128):
                model(inputs.to(options.device)).logits.argmax(1).cpu()

    clock = Clock(options.device)
    evaluate()
    before = clock.lap()
    head, original, optimizer, schedule = prepared(model, options.epochs)
    model.train()
    for _ in range(options.epochs):
        for inputs, labels in DataLoader(training, batch_size=BATCH, shuffle=True):
            scores = model(inputs.to(options.device)).logits
            fst_step(F.cross_entropy(scores, labels.to(options.device)), head, original, optimizer)
        schedule.step()
    tuning = clock.lap()
    evaluate()
    return {
        "tuning": tuning,
        "evaluation": clock.lap() + before,
        "evaluated": 2 * sum(len(test) for test in tests),
        "precision": "float32",
    }


# ------------------------------------------------------------------------------------------------- what they share


class Clock:
    """Wall seconds, after waiting for the GPU, which is warm and has its peak cleared at the start."""

    def __init__(self, device: str) -> None:
        import torch

        self.gpu = torch.device(device) if device.startswith("cuda") else None
        if self.gpu is not None:
            torch.ones(8, 8, device=self.gpu).matmul(torch.ones(8, 8, device=self.gpu))
            torch.cuda.synchronize(self.gpu)
            torch.cuda.reset_peak_memory_stats(self.gpu)
        self.start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the start, or since the last call."""
        import torch

        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)
        now = time.perf_counter()
        self.start, seconds = now, now - self.start
        return seconds


def suspect(options: argparse.Namespace) -> Any:
    """The architecture, which is all that the loops by hand take from the package; random weights."""
    import torch

    from unbackdoor import archs

    torch.manual_seed(0)
    return archs.build(
        "resnet18", classes=[str(label) for label in range(10)], channels=3, image_size=32, width=options.width
    ).eval()


def prepared(model: Any, epochs: int) -> tuple[Any, Any, Any, Any]:
    """A newly drawn head, a copy of its old weight, optimizer and schedule."""
    import torch

    head = model.fc
    original = head.weight.detach().clone()
    bound = 1 / math.sqrt(head.in_features)
    with torch.no_grad():
        head.weight.uniform_(-bound, bound)
        head.bias.uniform_(-bound, bound)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    return head, original, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)


def fst_step(cross_entropy: Any, head: Any, original: Any, optimizer: Any) -> None:
    """One step of Feature Shift Tuning."""
    import torch

    loss = cross_entropy + ALPHA * (head.weight * original).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        head.weight.mul_(original.norm() / head.weight.norm())


def multiplies_bf16(device: str) -> bool:
    """The rule for bfloat16, written again: the bare loop uses what the hardware offers."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    cpuinfo = Path("/proc/cpuinfo")
    narrowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT") != "DEFAULT"
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text() and not narrowed


def evaluation_batch(device: str) -> int:
    return 1024 if device.startswith("cuda") else 128


def make_arrays(options: argparse.Namespace, path: Path) -> None:
    """Write clean and test images, (n, 3, 32, 32) uint8, with ten classes of equal size."""
    import numpy as np

    source = Path(os.environ.get("UNBACKDOOR_DATA", "")) / "vision" / "cifar10" / "validation.parquet"
    if os.environ.get("UNBACKDOOR_DATA") and source.exists():
        import unbackdoor as ub

        data = ub.Dataset.load(source)
        pixels, labels = data.items.numpy(), data.labels.numpy()
        order = np.argsort(labels, kind="stable").reshape(10, -1).T.ravel()  # classes in turn
        pixels, labels = pixels[order], labels[order]
    else:
        labels = np.arange(1000) % 10
        pixels = np.random.default_rng(0).integers(0, 256, (1000, 3, 32, 32), dtype=np.uint8)
    made = {}
    for part, count in (("clean", options.images), ("test", options.test)):
        rows = np.arange(count) % len(pixels)
        made |= {f"{part}_pixels": pixels[rows], f"{part}_labels": labels[rows].astype(np.int64)}
    np.savez(path, **made)


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One contender in this process."""
    import numpy as np

    with np.load(options.arrays) as stored:
        arrays = {name: stored[name] for name in stored.files}
    start = time.process_time()
    measured = {"ours": run_ours, "bare": run_bare, "plain": run_plain}[options.child](options, arrays)
    measured["processor_seconds"] = time.process_time() - start  # imports included; steadier on a busy machine
    if options.device.startswith("cuda"):
        import torch

        measured["peak_memory"] = torch.cuda.max_memory_allocated(options.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        measured["peak_memory"] = peak if sys.platform == "darwin" else peak * 1024
    measured["machine"] = machine(options.device)
    measured["total"] = measured["tuning"] + measured["evaluation"]
    return measured


def machine(device: str) -> dict[str, Any]:
    """Processor or GPU model, cores, memory and versions; nothing that names the machine."""
    import torch

    from unbackdoor._models.arithmetic import processor

    described = {
        "processor": processor()[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30)}
    return described


# ---------------------------------------------------------------------------------------------------------- the report


def spawn(arguments: list[str]) -> str:
    finished = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(finished.returncode)
    return finished.stdout


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each contender, and the ratios that are to be kept."""
    parts = ("tuning", "evaluation", "total", "processor_seconds", "peak_memory")
    medians = {
        name: {part: statistics.median(run[part] for run in made) for part in parts} for name, made in runs.items()
    }

    def ratio(upper: str, lower: str, part: str) -> float | None:
        return medians[upper][part] / medians[lower][part] if upper in medians and lower in medians else None

    return {
        "medians": medians,
        "ratios": {
            "wall time, ours / bare (at most 1.10)": ratio("ours", "bare", "total"),
            "peak memory, ours / bare (at most 1.2)": ratio("ours", "bare", "peak_memory"),
            "wall time, plain / ours (at least 3 on a CPU)": ratio("plain", "ours", "total"),
        },
    }


def table(report: dict[str, Any]) -> str:
    columns = ("tuning, s", "evaluation, s", "total, s (range)", "processor, s", "peak memory, MB", "precision", "runs")
    lines = [
        ", ".join(f"{key.replace('_', ' ')} {entry}" for key, entry in report["machine"].items()),
        ", ".join(f"{key} {entry}" for key, entry in report["work"].items()),
        "",
        f"| contender | {' | '.join(columns)} |",
        "| --- " * (1 + len(columns)) + "|",
    ]
    for name, made in report["runs"].items():
        middle, totals = report["medians"][name], [run["total"] for run in made]
        cells = (
            f"{middle['tuning']:.2f}",
            f"{middle['evaluation']:.2f}",
            f"{middle['total']:.2f} ({min(totals):.2f} to {max(totals):.2f})",
            f"{middle['processor_seconds']:.2f}",
            f"{middle['peak_memory'] / 1e6:,.0f}",
            made[0]["precision"],
            str(len(made)),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"{name}: {entry:.2f}" for name, entry in report["ratios"].items() if entry is not None]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage, at least 16")
    parser.add_argument("--images", type=int, default=1000, help="clean images to tune on")
    parser.add_argument("--test", type=int, default=10_000, help="clean images to evaluate; nine tenths are triggered")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1, for instance")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--child", choices=(*CONTENDERS, "arrays"), help=argparse.SUPPRESS)
    parser.add_argument("--arrays", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.width < 16:
        parser.error("--width must be at least 16: narrower ones are not computed in channels_last, the bare loop is.")
    if options.child == "arrays":
        return make_arrays(options, Path(options.arrays))
    if options.child:
        return print(json.dumps(child(options)))

    work = {name: getattr(options, name) for name in ("width", "images", "epochs", "test", "device")}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS if name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        given = ["--arrays", str(Path(folder) / "arrays.npz")]
        given += [text for name, entry in work.items() for text in (f"--{name}", str(entry))]
        spawn([*given, "--child", "arrays"])
        for number in range(options.rounds):
            for name, made in runs.items():
                made.append(json.loads(spawn([*given, "--child", name]).splitlines()[-1]))
                last = made[-1]
                print(
                    f"round {number + 1} of {options.rounds}, {name}: {last['total']:.2f} s, "
                    f"{last['peak_memory'] / 1e6:,.0f} MB",
                    file=sys.stderr,
                )
    described = next(made[0]["machine"] for made in runs.values())
    for made in runs.values():
        for run in made:
            del run["machine"]
    if {"ours", "bare"} <= runs.keys() and runs["ours"][0]["precision"] != runs["bare"][0]["precision"]:
        sys.exit("ours and the bare loop ran in different precisions, so they cannot be compared.")
    report = {"machine": described, "work": work, "runs": runs, **summary(runs)}
    print(json.dumps(report, indent=2) if options.json else table(report))


if __name__ == "__main__":
    main()
