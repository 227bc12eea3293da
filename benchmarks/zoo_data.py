"""Write the data of the zoo of small models, `grids/zoo-clean.toml`: digits, MNIST and Fashion-MNIST as small pictures.

    export UNBACKDOOR_DATA=$(realpath ../shared/data) ZOO=/tmp/zoo
    python benchmarks/zoo_data.py $ZOO

Small pictures, and few of them, so that a model is trained and audited within a minute on one core. The training
pictures come in two parts without a common picture: models of part `a` give the statistics of clean models, models of
part `b` are reported on.
"""

import io
import os
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SIDE = 14  # MNIST and Fashion-MNIST: the mean of each 2x2 pixels
SIZES = {"digits": (500, 797), "mnist": (3000, 2000), "fashion": (3000, 2000)}  # training pictures a part, and test


def pictures(name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All pictures, (n, height, width) with 8 bits, their labels, and the names of the classes."""
    if name == "digits":
        from sklearn.datasets import load_digits

        raw = load_digits()
        pixels = np.pad((raw.images * 255 / 16).round().astype(np.uint8), ((0, 0), (2, 2), (2, 2)))  # (1797, 12, 12)
        return pixels, raw.target, list("0123456789")
    folder = Path(os.environ["UNBACKDOOR_DATA"]) / "vision" / {"mnist": "mnist", "fashion": "fashion_mnist"}[name]
    loaded = datasets.concatenate_datasets(
        [datasets.Dataset.from_parquet(str(folder / f"{part}.parquet")) for part in ("train", "test")]
    )
    order = np.random.default_rng(0).permutation(len(loaded))[: 2 * SIZES[name][0] + SIZES[name][1]]
    chosen = loaded.select(order)
    large = np.stack([np.asarray(picture.convert("L")) for picture in chosen["image"]]).astype(np.float64)
    small = large.reshape(len(large), SIDE, 2, SIDE, 2).mean(axis=(2, 4)).round().astype(np.uint8)
    feature = chosen.features["label"]
    return small, np.asarray(chosen["label"]), getattr(feature, "names", None) or list("0123456789")


def png(picture: np.ndarray) -> bytes:
    """A grey picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def write(folder: Path) -> None:
    """`NAME-a.parquet`, `NAME-b.parquet` and `NAME-test.parquet` of each data set, drawn by a fixed seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (part, test) in SIZES.items():
        pixels, labels, classes = pictures(name)
        order = np.random.default_rng(1).permutation(len(labels))
        rows = {"a": order[:part], "b": order[part : 2 * part], "test": order[2 * part : 2 * part + test]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        for suffix, chosen in rows.items():
            columns = {
                "image": [{"bytes": png(pixels[row]), "path": None} for row in chosen],
                "label": [int(labels[row]) for row in chosen],
            }
            datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}-{suffix}.parquet")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
