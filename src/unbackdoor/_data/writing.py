"""Examples written as files that `Dataset.load` and `datasets` read."""

import json
from pathlib import Path
from typing import Any

from unbackdoor._data.dataset import Dataset

POISONED = "poisoned"  # the column of a poisoned set that says which rows are; no trainer sees it


def write_examples(folder: Path, name: str, data: Dataset) -> str:
    """Write prompts as JSON lines, other examples as parquet; returns the name of the file."""
    if data.modality != "conversations":
        write_parquet(folder / f"{name}.parquet", data)
        return f"{name}.parquet"
    lines = []
    for entry in data.conversations.entries:
        messages = [{"role": message.role, "content": message.text} for message in entry.messages]
        answer = [{"role": "assistant", "content": entry.answer}] * bool(entry.answer)
        lines.append(json.dumps({"messages": [*messages, *answer]}, ensure_ascii=False) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"{name}.jsonl"


def write_parquet(path: Path, data: Dataset, poisoned: list[bool] | None = None) -> None:
    """Write pictures, texts or pairs of picture and caption, with their labels.

    Args:
        path: name of the file.
        data: the examples.
        poisoned: whether each of them is poisoned, for a column of that name; None leaves it out.
    """
    import datasets
    from PIL import Image

    columns: dict[str, Any]
    if data.modality == "text":
        columns = dict(zip(data.texts.columns, map(list, zip(*data.texts.strings, strict=True)), strict=True))
        features = {name: datasets.Value("string") for name in columns}
    else:
        pixels = data.pairs.images if data.modality == "image-text" else data.pixels
        columns = {"image": [Image.fromarray(item.permute(1, 2, 0).squeeze(2).numpy()) for item in pixels]}
        features = {"image": datasets.Image()}
        if data.modality == "image-text":
            columns["caption"] = [caption for (caption,) in data.pairs.captions.strings]
            features["caption"] = datasets.Value("string")
    if data.modality != "image-text" or data.has_labels:  # pairs need none
        columns["label"] = data.labels.tolist()
        features["label"] = datasets.ClassLabel(names=list(data.classes)) if data.classes else datasets.Value("int64")
    if poisoned is not None:
        columns[POISONED], features[POISONED] = poisoned, datasets.Value("bool")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    table.to_parquet(str(path))
    if bars:
        datasets.enable_progress_bars()
