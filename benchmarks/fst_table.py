"""The tables of docs/results/fst.md: victims, purifications and their scores, one cell each, resumable.

    python benchmarks/fst_table.py victims --store runs/fst --part 0/2
    python benchmarks/fst_table.py cells --store runs/fst --part 0/2
    python benchmarks/fst_table.py report --store runs/fst

Run as many parts at once as there are cores to spare, each with OMP_NUM_THREADS=1. A part that finds a cell done leaves
it alone. The data is found by UNBACKDOOR_DATA (default ../shared/data).
"""

import argparse
import dataclasses
import logging
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor import attacks, purifiers
from unbackdoor._attack import Trigger, load_trigger, triggered
from unbackdoor._bench import Store, identity
from unbackdoor._commands import write_victim
from unbackdoor._data import Dataset
from unbackdoor._evaluate import score
from unbackdoor._files import load
from unbackdoor._models import class_names
from unbackdoor._options import AttackOptions
from unbackdoor._output import directory
from unbackdoor._precision import Arithmetic, choose, description
from unbackdoor._purify import purify
from unbackdoor._registry import name_of, to_json
from unbackdoor._victim import plant

DATA = Path(os.environ.get("UNBACKDOOR_DATA", "../shared/data")) / "vision"
EPOCHS = 15
WIDTH = 16
SEEDS = (0, 1, 2)
BUDGET = 1000
JPEG_SEED = 0  # test_jpeg is scored for this purification seed alone

# In the order in which they are wanted: the core first.
VICTIMS: list[tuple[str, Any, float]] = [
    ("cifar10", attacks.Blended(), 0.01),
    ("cifar10", attacks.BadNets(), 0.01),
    ("cifar10", None, 0.0),
    ("cifar10", attacks.BadNets(), 0.05),
    ("cifar10", attacks.Blended(), 0.05),
    ("cifar10", attacks.SIG(), 0.05),
    ("cifar10", attacks.WaNet(), 0.05),
    ("cifar10", attacks.LabelConsistent(), 0.05),
    ("gtsrb", attacks.Blended(), 0.05),
    ("cifar10", attacks.Blended(), 0.005),
    ("cifar10", attacks.SIG(), 0.01),
    ("cifar10", attacks.WaNet(), 0.01),
    ("cifar10", attacks.LabelConsistent(), 0.01),
    ("cifar10", attacks.BadNets(), 0.005),
    ("cifar10", attacks.SIG(), 0.005),
    ("cifar10", attacks.WaNet(), 0.005),
    ("cifar10", attacks.LabelConsistent(), 0.005),
]

METHODS = [
    purifiers.FST(),
    purifiers.FineTuning(),
    purifiers.FTInit(),
    purifiers.FETuning(),
    purifiers.LinearProbing(),
    purifiers.ShiftDistillation(),
]

TASKS = {
    "cifar10": ("cifar10/train-*.parquet", "cifar10/validation.parquet", None),
    "gtsrb": ("gtsrb/train.parquet", "gtsrb/test.parquet", None),
}


def victim_spec(task: str, attack: Any, rate: float) -> dict[str, Any]:
    return {
        "task": task,
        "arch": "resnet18",
        "width": WIDTH,
        "epochs": EPOCHS,
        "attack": None if attack is None else to_json(attack, attacks.REGISTRY),
        "rate": rate,
        "victim_seed": 0,
    }


def cell_spec(victim: dict[str, Any], method: Any, budget: str, seed: int) -> dict[str, Any]:
    method_json = None if method is None else to_json(method, purifiers.REGISTRY)
    return {"victim": victim, "method": method_json, "clean": {"from": budget, "n": BUDGET, "seed": 0}, "seed": seed}


def train(store: Path, task: str, attack: Any, rate: float) -> None:
    spec = victim_spec(task, attack, rate)
    out = store / "victims" / identity(spec)
    if out.exists():
        return
    surrogate = None
    if getattr(attack, "needs_surrogate", False):
        control = store / "victims" / identity(victim_spec(task, None, 0.0))
        while not control.exists():  # another part may be at it
            time.sleep(10)
        surrogate = load(control).model
    train_files, test_file, _ = TASKS[task]
    data = Dataset.load(DATA / train_files)
    test = Dataset.load(DATA / test_file, data.encode, classes=data.classes, augment="none")
    options = AttackOptions(data=[], out="", rate=rate or 0.05, width=WIDTH, epochs=EPOCHS, seed=0)
    victim = plant(data, test, attack, options, surrogate=surrogate)
    with directory(out) as folder:
        write_victim(victim, folder)
    print(task, attack, rate, victim.score, f"{victim.record['seconds']:.0f} s", sep="\n", flush=True)


def measure(store: Path, task: str, attack: Any, rate: float, budgets: dict[str, tuple[Dataset, Dataset]]) -> None:
    spec = victim_spec(task, attack, rate)
    folder = store / "victims" / identity(spec)
    if not folder.exists():
        return
    cells = Store(store)
    model, encode = load(folder)
    wanted: list[tuple[Any, int]] = [(None, 0), *((method, seed) for method in METHODS for seed in SEEDS)]
    trigger = load_trigger(folder) if attack is not None else None
    arithmetic = choose(model)
    for budget, (clean, test) in budgets.items():
        clean = dataclasses.replace(clean, encode=encode)
        test = dataclasses.replace(test, encode=encode)
        classes = len(class_names(model) or ())
        attacked = None if trigger is None else triggered(test, trigger, classes)
        for method, seed in wanted:
            cell = cell_spec(spec, method, budget, seed)
            if cells.get(cell) is not None:
                continue
            record: dict[str, Any] = {"seconds": 0.0, "device": description(arithmetic)}
            result_model = model
            if method is not None:
                made = purify(model, clean, method, seed=seed)
                result_model, record = made.model, made.record
            scores = score(result_model, test, attacked, arithmetic)
            result = {"score": scores.to_json(), "commit": commit()}
            if attack is None:
                result["flips"] = flips(result_model, test, arithmetic, classes)
            result |= {key: record[key] for key in ("seconds", "device", "peak_memory_bytes") if key in record}
            if budget == "validation" and seed == JPEG_SEED and task == "cifar10":
                jpeg = Dataset.load(DATA / "cifar10/test_jpeg.parquet", encode, classes=class_names(model))
                on_jpeg = None if trigger is None else triggered(jpeg, trigger, classes)
                result["test_jpeg"] = score(result_model, jpeg, on_jpeg, arithmetic).to_json()
            cells.put(cell, result)
            success = "" if scores.attack_success is None else f"{scores.attack_success.value:.3f}"
            print(budget, attack, rate, method, seed, f"{scores.clean_accuracy.value:.3f}", success, flush=True)


def flips(model: nn.Module, test: Dataset, arithmetic: Arithmetic, classes: int) -> dict[str, Any]:
    """How often a model without a backdoor sends triggered examples to the target, for the trigger of each attack."""
    found = {}
    for attack in {
        victim_attack for task, victim_attack, _ in VICTIMS if victim_attack is not None and task == "cifar10"
    }:
        attacked = triggered(test, Trigger.of(attack, test), classes)
        success = score(model, attacked.data, attacked, arithmetic).attack_success
        found[name_of(attack, attacks.REGISTRY)] = success.to_json()
    return found


def report(store: Path) -> str:
    """The cells as Markdown: mean, standard deviation over purification seeds, n; what is missing says so."""
    cells = list(Store(store).cells())
    lines = []
    for budget, title in (("validation", "1,000 images that the victim never saw"), ("train", "1,000 training images")):
        for task in TASKS:
            mine = [cell for cell in cells if cell[0]["clean"]["from"] == budget and cell[0]["victim"]["task"] == task]
            if mine:
                lines += [f"### {task}, clean budget: {title}", "", *table(mine, task, "score"), ""]
    jpeg = [cell for cell in cells if "test_jpeg" in cell[1]]
    if jpeg:
        lines += [
            "### cifar10, official test images as JPEG (one purification seed)",
            "",
            *table(jpeg, "cifar10", "test_jpeg"),
            "",
        ]
    return "\n".join([*lines, *flip_table(cells)])


def table(cells: list[Any], task: str, part: str) -> list[str]:
    """Victims by methods: clean accuracy / attack success / recovered accuracy, in per cent."""
    methods = [None, *METHODS]
    names = ["none" if method is None else name_of(method, purifiers.REGISTRY) for method in methods]
    n = next(iter(cells))[1][part]["clean_accuracy"]["n"]
    lines = [f"Clean accuracy / attack success in %, mean and (standard deviation); {n:,} clean test images.", ""]
    lines += ["| victim | n triggered | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for victim_task, attack, rate in VICTIMS:
        spec = victim_spec(victim_task, attack, rate)
        mine = [cell for cell in cells if cell[0]["victim"] == spec]
        if victim_task != task:
            continue
        label = "clean control" if attack is None else f"{name_of(attack, attacks.REGISTRY)} {rate:.1%}"
        if not mine:
            lines.append(f"| {label} | not run |" + " |" * len(names))
            continue
        row, count = [], "-"
        for method in methods:
            json_method = None if method is None else to_json(method, purifiers.REGISTRY)
            found = [result[part] for cell, result in mine if cell["method"] == json_method]
            row.append(
                " / ".join(spread(found, key) for key in ("clean_accuracy", "attack_success")) if found else "not run"
            )
            count = next((f"{entry['attack_success']['n']:,}" for entry in found if "attack_success" in entry), count)
        lines.append(f"| {label} | {count} | " + " | ".join(row) + " |")
    return lines


def spread(found: list[Any], key: str) -> str:
    values = [100 * entry[key]["value"] for entry in found if key in entry]
    if not values:
        return "-"
    deviation = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def flip_table(cells: list[Any]) -> list[str]:
    """How often the clean control, before and after each method, sends triggered images to the target."""
    rows = [cell for cell in cells if "flips" in cell[1] and cell[0]["clean"]["from"] == "validation"]
    if not rows:
        return []
    names = sorted(rows[0][1]["flips"])
    lines = [
        "### Flip rate of the clean control on the same triggers, in %",
        "",
        "| method | " + " | ".join(names) + " |",
    ]
    lines.append("| --- " * (len(names) + 1) + "|")
    for method in [None, *METHODS]:
        json_method = None if method is None else to_json(method, purifiers.REGISTRY)
        found = [result["flips"] for cell, result in rows if cell["method"] == json_method]
        label = "none" if method is None else name_of(method, purifiers.REGISTRY)
        lines.append(f"| {label} | " + " | ".join(spread(found, name) for name in names) + " |")
    return lines


def clean_budgets(task: str) -> dict[str, tuple[Dataset, Dataset]]:
    """For each kind of clean budget: the 1,000 examples and the test examples."""
    train_files, test_file, _ = TASKS[task]
    test = Dataset.load(DATA / test_file)
    training = Dataset.load(DATA / train_files)
    budgets = {"train": (training.split(BUDGET, seed=0)[0], test)}
    if task == "cifar10":
        unseen, rest = test.split(BUDGET, seed=0)
        # The same test examples for both budgets, so that the blocks can be compared.
        budgets = {"validation": (unseen, rest), "train": (budgets["train"][0], rest)}
    return budgets


def commit() -> str:
    made = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return made.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["victims", "cells", "report"])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="which share of the work: I/N")
    parser.add_argument("--budget", choices=["validation", "train"], help="one kind of clean budget alone")
    parser.add_argument("--only", type=int, default=len(VICTIMS), help="the first so many victims")
    options = parser.parse_args()
    if options.stage == "report":
        print(report(options.store))
        return
    part, parts = map(int, options.part.split("/"))
    logging.getLogger("unbackdoor").setLevel(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    mine = [entry for index, entry in enumerate(VICTIMS[: options.only]) if index % parts == part]
    budgets: dict[str, Any] = {}
    for task, attack, rate in mine:
        if options.stage == "victims":
            train(options.store, task, attack, rate)
        else:
            budgets[task] = budgets.get(task) or clean_budgets(task)
            chosen = {kind: parts for kind, parts in budgets[task].items() if options.budget in (None, kind)}
            measure(options.store, task, attack, rate, chosen)


if __name__ == "__main__":
    main()
