"""Pictures written to files, as users have them."""

import datasets
from PIL import Image

from unbackdoor import Dataset


def write_pictures(data: Dataset, path: object, **columns: list) -> str:
    """A parquet file with the pictures and labels of a data set, as `datasets` writes it.

    Args:
        data: grey or colour pictures; if it names its classes, so does the file.
        path: of the file.
        columns: further columns by name.
    """
    pictures = [Image.fromarray(item.permute(1, 2, 0).squeeze(2).numpy()) for item in data.pixels]
    label = datasets.ClassLabel(names=list(data.classes)) if data.classes else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    table = datasets.Dataset.from_dict({"image": pictures, "label": data.labels.tolist()}, features)
    for name, column in columns.items():
        table = table.add_column(name, column)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table.to_parquet(path)
    finally:
        if bars:
            datasets.enable_progress_bars()
    return str(path)
