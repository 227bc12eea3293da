"""A second round of hostile inputs: what people download in place of a file, archives that unfold, odd pictures."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from corpus import (
    DATA_PLACES,
    IMAGE_PLACES,
    NAMES,
    OWN_PLACES,
    PICTURE_PLACES,
    TEXT_PLACES,
    Build,
    Spoil,
    _device,
    _pipe,
    _saved,
    _with_picture,
    _write,
    at,
    filled,
    on_directory,
    on_file,
    with_fields,
)
from PIL import Image
from pyarrow import ipc, parquet
from safetensors.torch import load_file, save_file

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 437951328\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"


# Tables.


def _table(columns: dict[str, Any], cut: int | None = None, **options: Any) -> Spoil:
    def spoil(path: Path) -> None:
        table = pa.table(columns)
        if path.suffix == ".parquet":
            parquet.write_table(table, path, **options)
        else:
            with ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        if cut is not None:
            os.truncate(path, path.stat().st_size - cut)

    return spoil


def _repeated(entry: Any, count: int = 1_000_000) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, dtype=np.int32)), [entry])


def _labels(count: int = 1_000_000) -> Any:
    return pa.array(np.zeros(count, dtype=np.int64))


def _with_features(names: list[str]) -> Spoil:
    features = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    said = json.dumps({"info": {"features": features}})

    def spoil(path: Path) -> None:
        table = pa.table({"text": ["good", "bad"], "label": [0, 1]})
        parquet.write_table(table.replace_schema_metadata({"huggingface": said}), path)

    return spoil


_ROW = {"text": ["good", "bad"], "label": [1, 0]}
TABLES: dict[str, tuple[str, Spoil]] = {
    "dictionary-unfolds": ("d.parquet", _table({"text": _repeated("x" * 900_000), "label": _labels()})),
    "dictionary-of-arrow": ("d.arrow", _table({"text": _repeated("x" * 900_000), "label": _labels()})),
    "runs-unfold": ("d.parquet", _table({"text": _repeated("x", 20_000_000), "label": _labels(20_000_000)})),
    "parquet-cut": ("d.parquet", _table(_ROW, cut=200)),
    "parquet-without-rows": (
        "d.parquet",
        _table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}),
    ),
    "parquet-without-columns": ("d.parquet", _table({})),
    "arrow-cut": ("d.arrow", _table(_ROW, cut=300)),
    "label-structure": ("d.parquet", _table({"text": ["a", "b"], "label": [{"x": 1}, {"x": 2}]})),
    "label-bytes": ("d.parquet", _table({"text": ["a", "b"], "label": [b"\xff\xfe", b"\x00"]})),
    "text-lists": ("d.parquet", _table({"text": [["a"], ["b"]], "label": [0, 1]})),
    "text-bytes": ("d.parquet", _table({"text": [b"\xff\xfe", b"b"], "label": [0, 1]})),
    "columns-100000": (
        "d.csv",
        _write(",".join(f"c{n}" for n in range(100_000)) + "\n" + ",".join("x" * 100_000) + "\n"),
    ),
    "mark-alone": ("d.csv", _write("\ufeff")),
    "line-ends-alone": ("d.csv", _write("\r\n" * 1000)),
    "delimiters-alone": ("d.csv", _write(",,,,\n" * 1000)),
    "pointer": ("d.parquet", _write(POINTER)),
    "pointer-csv": ("d.csv", _write(POINTER)),
    "page": ("d.csv", _write(PAGE)),
    "page-jsonl": ("d.jsonl", _write(PAGE)),
    "name-twice-million": ("d.jsonl", _write('{"' + "x" * 10**6 + '": 1, "' + "x" * 10**6 + '": 2}\n')),
    "rows-in-one-object": ("d.json", _write('{"text": ["good", "bad"], "label": [0, 1]}')),
    "numbers-of-exponent": ("d.jsonl", _write('{"text": "good", "label": 1e400}\n')),
    "gzip-called-csv": ("d.csv", _write(zlib.compress(b"text,label\n" * 1000, wbits=31))),
}
HARMLESS_TABLES: dict[str, tuple[str, Spoil]] = {
    "dictionary-of-words": (
        "d.parquet",
        _table({"text": ["good", "bad"] * 50, "label": pa.DictionaryArray.from_arrays([0, 1] * 50, ["1", "0"])}),
    ),
    "large-strings": ("d.parquet", _table({"text": pa.array(["good", "bad"], pa.large_string()), "label": [1, 0]})),
    "more-columns": ("d.parquet", _table({**_ROW, "tokens": [["a"], ["b"]], "facts": [{"x": 1}, None]})),
    "bytes-of-labels": ("d.parquet", _table({"text": ["good", "bad"], "label": pa.array([1, 0], pa.uint8())})),
    "brotli": ("d.parquet", _table(_ROW, compression="brotli")),
    "classes-more-than-model": ("d.parquet", _with_features(["a", "b", "c", "\x1b[2J"])),
    "classes-of-control": ("d.parquet", _with_features(["a\x1b[2J", "b\nc"])),
}


def _saved_set(spoil: Spoil) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        folder = place / "saved"
        folder.mkdir()
        table = pa.table({"text": ["good", "bad"], "label": [1, 0]})
        with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
        features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"dtype": "int64", "_type": "Value"}}
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
        state: dict[str, Any] = {
            **{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": None},
            **{"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False},
        }
        (folder / "state.json").write_text(json.dumps(state))
        spoil(folder)
        return filled(DATA_PLACES["evaluate"], material, DATA=folder)

    return build


SAVED: dict[str, Spoil] = {
    "pipe": at("data-00000-of-00001.arrow", _pipe),
    "device": at("data-00000-of-00001.arrow", _device),
    "state-pipe": at("state.json", _pipe),
    "info-device": at("dataset_info.json", _device),
    "file-elsewhere": lambda folder: (
        _pipe(folder.parent / "elsewhere.arrow"),
        with_fields("state.json", _data_files=[{"filename": "../elsewhere.arrow"}])(folder),
    ),
    "files-numbers": with_fields("state.json", _data_files=[5]),
    "feature-unknown": with_fields("dataset_info.json", features={"text": {"_type": "x\ny\x1b[2J"}}),
    "features-list": with_fields("dataset_info.json", features=[1]),
}


# Pictures.


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _with_chunk(kind: bytes, content: bytes) -> Spoil:
    def spoil(path: Path) -> None:
        plain = io.BytesIO()
        Image.new("RGB", (8, 8)).save(plain, "PNG")
        start = plain.getvalue()
        path.write_bytes(start[:33] + _chunk(kind, content) + start[33:])

    return spoil


def _frames(path: Path) -> None:
    first, *others = [Image.new("P", (8, 8), shade) for shade in range(50)]
    first.save(path, "GIF", save_all=True, append_images=others)


PICTURES: dict[str, Spoil] = {
    "pointer": _write(POINTER),
    "page": _write(PAGE),
    "vector": _write('<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'),
    "portable-huge": _write(b"P6 99999 99999 255\n" + bytes(100)),
    "text-unfolds": _with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000))),
    "webp-cut": _write(b"RIFF\xff\xff\xff\x7fWEBPVP8L" + bytes(20)),
    "jpeg-cut": _write(b"\xff\xd8\xff\xe0" + bytes(20)),
    "tiff-of-pointers": _write(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 65535) + b"\xff" * 400),
    "icon-huge": _write(b"\0\0\1\0\1\0" + bytes(8) + struct.pack("<II", 2**31, 22)),
}
HARMLESS_PICTURES: dict[str, Spoil] = {
    "thin": lambda path: Image.new("1", (1, 60_000)).save(path, "PNG"),
    "frames": _frames,
    "palette": lambda path: Image.new("P", (8, 8)).save(path, "PNG"),
    "sixteen-bits": lambda path: Image.new("I;16", (8, 8)).save(path, "PNG"),
    "print-colours": lambda path: Image.new("CMYK", (8, 8)).save(path, "JPEG"),
    "note": _with_chunk(b"tEXt", b"Comment\0\x1b[2J"),
}


def _cells(name: str, cells: list[Any]) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        with (place / "d.jsonl").open("w") as file:
            for number, cell in enumerate(cells):
                file.write(json.dumps({"image": cell, "label": number % 2}) + "\n")
        return filled(PICTURE_PLACES[name], material, DATA=place / "d.jsonl")

    return build


CELLS: dict[str, list[Any]] = {
    "ragged": [[[0, 1], [2]]],
    "beyond-bytes": [[[0, 300], [2, 3]]],
    "negative": [[[0, -1], [2, 3]]],
    "empty-lists": [[[]]],
    "numbers": [5],
    "true": [True],
    "address": ["http://localhost:9/a.png"],
    "address-of-file": ["file:///etc/passwd"],
    "system": ["/etc/passwd"],
    "object": [{"bytes": None, "path": None}],
    "object-text": [{"bytes": "x\ny", "path": "\u202e"}],
}


def _shortest_edge(size: tuple[int, int]) -> Build:
    """A processor that keeps the shape of pictures, and one that is thin: its other side grows without end."""

    def build(place: Path, material: Path) -> list[Any]:
        spoil = with_fields(
            "preprocessor_config.json",
            image_processor_type="CLIPImageProcessor",
            size={"shortest_edge": 8},
            do_center_crop=True,
            crop_size=8,
        )
        arguments = on_directory("images", spoil, IMAGE_PLACES["evaluate"])(place, material)
        made = _with_picture(lambda path: Image.new("1", size).save(path, "PNG"), PICTURE_PLACES["evaluate"])
        data = made(place, material)[-1]
        return [*arguments[:-1], data]

    return build


PROCESSORS: dict[str, dict[str, Any]] = {
    "part-none": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "crop_pct": 0},
    "part-negative": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "crop_pct": -1},
    "part-tiny": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "crop_pct": 1e-9},
    "scale-huge": {"rescale_factor": 1e308},
    "pad-10-9": {"do_pad": True, "pad_size": {"height": 10**9, "width": 10**9}},
    "longest-2-62": {"size": {"longest_edge": 2**62, "shortest_edge": 2**62}},
    "mean-infinite": {"image_mean": [float("inf")] * 3},
    "resize-text": {"do_resize": "x\ny"},
}


# Models.


def _indexed(index: Any) -> Spoil:
    def spoil(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def _map(shard: Any) -> Spoil:
    def spoil(model: Path) -> None:
        names = load_file(model / "model.safetensors")
        _indexed({"metadata": {}, "weight_map": dict.fromkeys(names, shard)})(model)

    return spoil


def _adapter(settings: Any, whole: bool = False) -> Spoil:
    def spoil(model: Path) -> None:
        if not whole:
            (model / "model.safetensors").unlink()
            (model / "config.json").unlink()
        (model / "adapter_config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
        save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 2)}, model / "adapter_model.safetensors")

    return spoil


def _whole(path: Path) -> None:
    """Quantised, without a scale."""
    save_file({name: (100 * part).to(torch.int8) for name, part in load_file(path).items()}, path)


_LORA = {"peft_type": "LORA", "base_model_name_or_path": "somebody/model", "r": 8, "target_modules": ["query"]}
DIRECTORIES: dict[str, Spoil] = {
    "adapter": _adapter(_LORA),
    "adapter-with-weights": _adapter(_LORA, whole=True),
    "adapter-damaged": _adapter("{"),
    "adapter-list": _adapter([1]),
    **{f"adapter-of-{kind}": _adapter({**_LORA, "base_model_name_or_path": name}) for kind, name in NAMES.items()},
    "adapter-pipe": lambda model: (_adapter(_LORA)(model), _pipe(model / "adapter_config.json")),
    "index-outside": _map("../../elsewhere.safetensors"),
    "index-absolute": _map("/etc/passwd"),
    "index-number": _map(5),
    "index-missing": _map("model-00009-of-00009.safetensors"),
    "index-newline": _map("a\nb\x1b[2J"),
    "index-empty": _indexed({"weight_map": {}}),
    "index-list": _indexed({"weight_map": [1]}),
    "index-device": lambda model: (_map("zero.safetensors")(model), _device(model / "zero.safetensors")),
    "config-pointer": at("config.json", _write(POINTER)),
    "config-page": at("config.json", _write(PAGE)),
    "config-dangling": at("config.json", lambda path: (path.unlink(), path.symlink_to("nowhere"))),
    "config-loop": at("config.json", lambda path: (path.unlink(), path.symlink_to("config.json"))),
    "weights-pointer": at("model.safetensors", _write(POINTER)),
    "weights-page": at("model.safetensors", _write(PAGE)),
    "weights-whole-numbers": at("model.safetensors", _whole),
    "tokenizer-pointer": at("tokenizer.json", _write(POINTER)),
}
HARMLESS_DIRECTORIES: dict[str, Spoil] = {
    "adapter-in-a-folder": lambda model: (
        (model / "lora").mkdir(),
        _write(json.dumps(_LORA))(model / "lora/adapter_config.json"),
    ),
    "index-as-it-should-be": _map("model-00001-of-00001.safetensors"),
    "tensorboard": lambda model: ((model / "runs").mkdir(), _write(b"\0")(model / "runs/events.out.tfevents.1")),
    "training-arguments": at("training_args.bin", _write(b"\x80\x04N.")),
    "card-with-control": at("README.md", _write("---\nlicense: mit\n---\n# \x1b[2J")),
}


def _script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(192, 2)).save(str(path))


def _archive(*names: str) -> Spoil:
    def spoil(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"\x80\x02}q\0.")

    return spoil


def _holding_itself(weights: dict[str, Any]) -> Any:
    held: dict[str, Any] = {}
    return {**weights, "self": held, "again": held.setdefault("x", held)}


WEIGHTS: dict[str, Spoil] = {
    "pointer": _write(POINTER),
    "page": _write(PAGE),
    "script": _script,
    "numpy": lambda path: np.savez(path.open("wb"), a=np.zeros(3)),
    "exchange-format": _write(b"\x08\x07\x12\x07pytorch" + bytes(100)),
    "language-model-format": _write(b"GGUF" + bytes(100)),
    "hierarchical": _write(b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "archive-of-others": _archive("a.txt", "../../b.txt"),
    "archive-climbing": _archive("archive/data.pkl", "archive/../../data/0"),
    "archive-without-data": _archive("archive/data.pkl"),
    "deep-names": _saved(lambda weights: {**weights, ".".join("a" * 20_000): torch.zeros(2)}),
    "holding-itself": _saved(_holding_itself),
    "truth": _saved(lambda weights: {name: part > 0 for name, part in weights.items()}),
    "whole-numbers": _saved(lambda weights: {name: part.long() for name, part in weights.items()}),
    "one-number": _saved(lambda weights: torch.zeros(())),
}

OPTIONS: dict[str, tuple[str, list[str]]] = {
    "columns-without-name": ("text", ["--columns", "text="]),
    "columns-alone": ("text", ["--columns", "text"]),
    "columns-twice": ("text", ["--columns", "text=text,text=label"]),
    "device-99": ("text", ["--device", "cuda:99"]),
    "device-newline": ("text", ["--device", "x\ny"]),
    "precision": ("text", ["--precision", "\x1b[2J"]),
    "batch-0": ("text", ["--batch-size", "0"]),
    "attack-folder": ("text", ["--attack", "/"]),
    "attack-bytes": ("text", ["--attack", "\udcff.json"]),
    "control-bytes": ("text", ["--control", "\udcff"]),
    "target-beyond": ("text", ["--triggered", "M/texts.csv", "--target", "99"]),
    "target-text": ("text", ["--triggered", "M/texts.csv", "--target", "x\ny"]),
    "target-negative": ("text", ["--triggered", "M/texts.csv", "--target", "-1"]),
}


def _option(origin: str, given: list[str]) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        arguments = (TEXT_PLACES if origin == "text" else IMAGE_PLACES)["evaluate"]
        return filled([*arguments, *given], material, MODEL=material / origin)

    return build


def _named(name: str, data: str) -> Build:
    """A model and data in a folder whose name is hostile."""

    def build(place: Path, material: Path) -> list[Any]:
        import shutil

        folder = place / name
        folder.mkdir()
        shutil.copytree(material / "text", folder / "model")
        shutil.copyfile(material / "texts.csv", folder / data)
        return ["evaluate", folder / "model", "--data", folder / data]

    return build


def cases() -> tuple[dict[str, Build], dict[str, Build]]:
    """The hostile ones and their harmless twins, by name."""
    hostile: dict[str, Build] = {}
    harmless: dict[str, Build] = {}

    def in_turn(places: dict[str, list[Any]]) -> Callable[[int], tuple[str, list[Any]]]:
        entries = list(places.items())
        return lambda number: entries[number % len(entries)]

    for number, (kind, (name, spoil)) in enumerate(TABLES.items()):
        place, arguments = in_turn(DATA_PLACES)(number)
        if kind == "label-bytes":  # to an attack these are names of classes
            place, arguments = "evaluate", DATA_PLACES["evaluate"]
        hostile[f"table-{kind}/{place}"] = on_file("", name, spoil, arguments)
    for kind, spoil in SAVED.items():
        hostile[f"saved-{kind}/evaluate"] = _saved_set(spoil)
    for number, (kind, spoil) in enumerate(PICTURES.items()):
        place, arguments = in_turn(PICTURE_PLACES)(number)
        hostile[f"odd-picture-{kind}/{place}"] = _with_picture(spoil, arguments)
    for number, (kind, cells) in enumerate(CELLS.items()):
        place, _ = in_turn(PICTURE_PLACES)(number)
        hostile[f"picture-cell-{kind}/{place}"] = _cells(place, cells)
    hostile["picture-thin-that-grows/evaluate"] = _shortest_edge((1, 10_000_000))
    for number, (kind, fields) in enumerate(PROCESSORS.items()):
        place, arguments = in_turn(IMAGE_PLACES)(number)
        spoil = with_fields("preprocessor_config.json", **fields)
        hostile[f"odd-processor-{kind}/{place}"] = on_directory("images", spoil, arguments)
    for number, (kind, spoil) in enumerate(DIRECTORIES.items()):
        place, arguments = in_turn({key: TEXT_PLACES[key] for key in ("evaluate", "purify", "victim")})(number)
        hostile[f"directory-{kind}/{place}"] = on_directory("text", spoil, arguments)
    for number, (kind, spoil) in enumerate(WEIGHTS.items()):
        place, arguments = in_turn(OWN_PLACES)(number)
        hostile[f"odd-weights-{kind}/{place}"] = on_file("", "w.pt", spoil, arguments, "MODEL")
    for kind, (origin, given) in OPTIONS.items():
        hostile[f"odd-option-{kind}/evaluate"] = _option(origin, given)
    for kind, (name, spoil) in HARMLESS_TABLES.items():
        harmless[f"table-{kind}"] = on_file("", name, spoil, DATA_PLACES["evaluate"])
    harmless["saved"] = _saved_set(lambda folder: None)
    for kind, spoil in HARMLESS_PICTURES.items():
        harmless[f"odd-picture-{kind}"] = _with_picture(spoil, PICTURE_PLACES["evaluate"])
    for kind, spoil in HARMLESS_DIRECTORIES.items():
        harmless[f"directory-{kind}"] = on_directory("text", spoil, TEXT_PLACES["purify"])
    for kind in ("newline", "terminal", "direction", "separator"):
        harmless[f"folder-{kind}"] = _named(NAMES[kind], "d.csv")
    hostile["folder-of-bytes/evaluate"] = _named("\udcff", "d.csv")
    return hostile, harmless
