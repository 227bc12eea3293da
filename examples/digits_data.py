"""Write scikit-learn's handwritten digits as parquet files, the data of `grids/digits.toml`.

python examples/digits_data.py grids/digits
"""

import io
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def png(picture: np.ndarray) -> bytes:
    """An 8x8 picture with values 0 to 16, twice as large and with 8 bits."""
    pixels = np.kron(picture * 255 / 16, np.ones((2, 2))).round().astype(np.uint8)  # (16, 16)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write(folder: Path) -> None:
    """`train.parquet` with 1,200 pictures and `test.parquet` with the other 597, drawn by a fixed seed."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    for name, rows in (("train", order[:1200]), ("test", order[1200:])):
        columns = {
            "image": [{"bytes": png(digits.images[row]), "path": None} for row in rows],
            "label": [int(digits.target[row]) for row in rows],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "grids/digits"))
