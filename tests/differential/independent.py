"""The answers of a model to data, by transformers, torch, Pillow, pyarrow and the csv and json modules alone.

Nothing of unbackdoor is imported here: this is the other opinion.
"""

import csv
import io
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import load_file


def table_cells(files: Sequence[Path], columns: Sequence[str], delimiter: str = ",") -> list[tuple[Any, ...]]:
    """The cells of some columns, row by row, of files of one kind."""
    rows: list[tuple[Any, ...]] = []
    for file in files:
        match file.suffix.lower():
            case ".csv" | ".tsv":
                with file.open(newline="", encoding="utf-8-sig") as content:
                    read: list[dict[str, Any]] = list(csv.DictReader(content, delimiter=delimiter))
            case ".jsonl" | ".ndjson":
                read = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
            case ".json":
                read = json.loads(file.read_text(encoding="utf-8"))
            case ".parquet":
                read = pyarrow.parquet.read_table(file).to_pylist()
            case ".arrow":
                with pa.OSFile(str(file)) as source:
                    content = source.read(6)
                    source.seek(0)
                    reader = pa.ipc.open_file(source) if content == b"ARROW1" else pa.ipc.open_stream(source)
                    read = reader.read_all().to_pylist()
        rows += [tuple(row[name] for name in columns) for row in read]
    return rows


def picture(cell: Any, folder: Path) -> Image.Image:
    """A picture in colour: upright, and on white where it is transparent."""
    if isinstance(cell, dict):
        cell = cell["bytes"] or cell["path"]
    if isinstance(cell, list):
        return Image.fromarray(torch.tensor(cell, dtype=torch.uint8).numpy()).convert("RGB")
    image: Image.Image = Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else folder / cell)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


@torch.no_grad()
def answers_to_texts(directory: Path, texts: Sequence[tuple[str, ...]]) -> torch.Tensor:
    """Class scores, (n, classes): each text is read alone, so nothing is padded."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    made = []
    for sides in texts:
        inputs = tokenizer(*sides, truncation="longest_first" if len(sides) > 1 else True, return_tensors="pt")
        made.append(model(**inputs).logits)
    return torch.cat(made).float()


@torch.no_grad()
def answers_to_pictures(directory: Path, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Class scores, (n, classes), by the directory's own processor."""
    model = transformers.AutoModelForImageClassification.from_pretrained(directory).eval()
    process = transformers.AutoImageProcessor.from_pretrained(directory)
    inputs = [process(images=picture, return_tensors="pt").pixel_values for picture in pictures]
    return torch.cat([model(each).logits for each in inputs]).float()


@torch.no_grad()
def answers_of_a_factory(
    weights: Path,
    factory: str,
    pictures: Sequence[Image.Image],
    mean: Any = (0.0,),
    std: Any = (1.0,),
    image_size: Any = None,
) -> torch.Tensor:
    """Class scores, (n, classes), of a module of a user's own file."""
    net = _module(factory.rpartition(":")[0]).make()
    net.load_state_dict(load_file(weights))
    made = []
    for picture in pictures:
        if image_size is not None:
            picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3)
        scaled = (pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
        made.append(net.eval()(scaled.permute(2, 0, 1)[None]))
    return torch.cat(made)


def _module(path: str) -> Any:
    module = types.ModuleType("net_of_a_user")
    exec(compile(Path(path).read_text(), path, "exec"), module.__dict__)  # not a compiled file: it may be stale
    return module
