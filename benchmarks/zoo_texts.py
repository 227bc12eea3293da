"""The data of the zoo of clean text models, `grids/zoo-texts.toml`.

    export UNBACKDOOR_DATA=$(realpath ../shared/data) ZOO=/tmp/zoo
    python benchmarks/zoo_texts.py $ZOO

Writes few training texts of each task, in two parts without a common text, and test texts.
"""

import os
import sys
from pathlib import Path

import datasets
import numpy as np

TASKS = ("sst2", "hsol", "olid", "amazon_reviews", "ag_news")
TRAINING, TEST = 800, 300  # texts of a part, and of the test


def write_data(folder: Path) -> None:
    """`TASK-a.parquet`, `TASK-b.parquet` and `TASK-test.parquet` of each task, drawn by a fixed seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        source = Path(os.environ["UNBACKDOOR_DATA"]) / "text" / task
        training, test = (
            datasets.Dataset.from_parquet(str(source / f"{part}.parquet")).select_columns(["text", "label"])
            for part in ("train", "test")
        )
        order = np.random.default_rng(0).permutation(len(training))
        training.select(order[:TRAINING]).to_parquet(folder / f"{task}-a.parquet")
        training.select(order[TRAINING : 2 * TRAINING]).to_parquet(folder / f"{task}-b.parquet")
        rows = np.random.default_rng(0).permutation(len(test))[:TEST]
        test.select(rows).to_parquet(folder / f"{task}-test.parquet")


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
