"""The zoo of clean text models, `grids/zoo-texts.toml`: its data, and its statistics for `audit`.

    export UNBACKDOOR_DATA=$(realpath ../shared/data) ZOO=/tmp/zoo
    python benchmarks/zoo_texts.py data $ZOO
    python benchmarks/zoo_texts.py nulls docs/results/cells/zoo-texts

`data` writes few training texts of each task, in two parts without a common text, and test texts. `nulls` writes the
scores of the audited models of part `a` into `src/unbackdoor/_detection/nulls.json`, in place of those of the text
models that are there; what the file says about images stays. A model near chance has no findings and is left out.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from unbackdoor._artifacts.null_table import CleanModel, NullTable
from unbackdoor._bench import Store
from unbackdoor._detection.judging import PROVEN
from unbackdoor._detection.nulls import shipped
from unbackdoor._registry.detectors import REGISTRY
from unbackdoor._value import fields_of

ROOT = Path(__file__).parents[1]
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


def score(finding: dict[str, Any]) -> float:
    """-log10 of the smallest nominal p-value of a class whose shortcut the held-out examples confirm."""
    confirmed = [each for each in finding["classes"] if each["moved"] is None or each["moved"]["value"] >= PROVEN]
    return max((abs(math.log10(max(each["nominal_p"], 1e-300))) for each in confirmed), default=0.0)


def clean_models(store: Store, used: dict[str, dict[str, Any]], part: str) -> list[CleanModel]:
    """The clean models of a part that went through all these detectors, with these settings."""
    found = []
    for spec, result in store.cells():
        method, victim = spec["method"], spec["victim"]
        if method["name"] != "audit" or result["status"] != "done" or victim["attack"]["name"] != "none":
            continue
        given = {name: {**fields} for name, fields in method["parameters"].items()}
        for fields in given.values():
            fields.pop("version")
        data, _, which = victim["task"]["name"].rpartition("-")
        findings = {finding["detector"]: finding for finding in result["audit"]["findings"]}
        if which != part or given != used or findings.keys() != used.keys():
            continue
        found.append(
            CleanModel(
                arch="bert",
                width=None,
                data=data,
                modality="text",
                classes=len(next(iter(findings.values()))["classes"]),
                recipe=f"MiniLM, {TRAINING} texts, {victim['task']['epochs']} epochs",
                seed=victim["seed"],
                accuracy=round(result["score"]["clean_accuracy"]["value"], 4),
                scores={name: round(score(finding), 4) for name, finding in findings.items()},
            )
        )
    return sorted(found, key=lambda model: (model.data, model.seed))


def with_texts(table: NullTable, store: Store, folder: str) -> NullTable:
    """The table with the text models of a store in place of its own."""
    texts = [entry for entry in REGISTRY if "text" in entry.modality]
    used = {entry.name: json.loads(json.dumps(fields_of(entry.resolve()()))) for entry in texts}
    models = clean_models(store, used, "a")
    if not models:
        raise SystemExit(f"No clean text model of part a in {folder} went through {', '.join(used)} as they are today.")
    others = [model for model in table.models if model.modality != "text"]
    said = [part for part in table.provenance.split("; ") if others and "zoo_texts.py" not in part]
    return NullTable(
        provenance="; ".join([*said, f"texts: benchmarks/zoo_texts.py, from {folder}"]),
        detectors={**{name: given for name, given in table.detectors.items() if name not in used}, **used},
        models=[*others, *models],
    )


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "data":
        write_data(Path(where))
    else:
        target = ROOT / "src/unbackdoor/_detection/nulls.json"
        table = with_texts(shipped(), Store(Path(where)), where)
        target.write_text(json.dumps(table.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        print(f"{sum(model.modality == 'text' for model in table.models)} clean text models are in {target.name}")
