"""Hostile and malformed inputs: each kind in each place where it can stand, and harmless twins of them."""

import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file

Build = Callable[[Path, Path], list[Any]]
Spoil = Callable[[Path], Any]  # of a file or a directory, in place


class Case(NamedTuple):
    """One input.

    Args:
        name: kind and place.
        build: makes it in an empty folder from the material, and returns the arguments of the command line.
        harmless: it must be accepted.
        console: the encoding of what the command prints to; the names that it prints need not fit it.
    """

    name: str
    build: Build
    harmless: bool = False
    console: str = "utf-8"


NAMES = {
    "newline": "x\ny",
    "terminal": "\x1b[2Jx",
    "direction": "\u202egnp.x",
    "million": "x" * 1_000_000,
    "marks": "x" + "\u0301" * 300,
    "null": "x\0y",
    "separator": "x\u2028y\u0085z",
}

# The places of a directory of a text model, one of an image model, data and the like.
TEXT_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "MODEL", "--data", "M/texts.csv"],
    "purify": ["purify", "fine-tuning", "MODEL", "--clean", "M/texts.csv", "--epochs", "1", "--out", "out"],
    "base": ["purify", "fine-mixing", "M/text", "--base", "MODEL", "--clean", "M/texts.csv", "--out", "out"],
    "attack": ["attack", "word", "--data", "M/texts.csv", "--base", "MODEL", "--epochs", "1", "--out", "out"],
    "stream": [
        *["purify", "fine-mixing", "MODEL", "--base", "M/base", "--rho", "0.5", "--no-tune", "--stream"],
        *["--out", "out"],
    ],
    "control": [
        *["evaluate", "M/text", "--data", "M/texts.csv", "--attack", "M/word/attack.json", "--control", "MODEL"],
    ],
    "victim": [
        *["stress", "M/text", "--victim", "MODEL", "--clean", "M/texts.csv", "--attack", "M/word/attack.json"],
        *["--out", "out"],
    ],
}
IMAGE_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "MODEL", "--data", "M/pictures"],
    "purify": ["purify", "fine-tuning", "MODEL", "--clean", "M/pictures", "--epochs", "1", "--out", "out"],
    "attack": ["attack", "badnets", "--data", "M/pictures", "--base", "MODEL", "--epochs", "1", "--out", "out"],
}
OWN_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "MODEL", "--factory", "FACTORY", "--data", "M/pictures"],
    "purify": [
        *["purify", "fine-tuning", "MODEL", "--factory", "FACTORY", "--clean", "M/pictures", "--epochs", "1"],
        *["--out", "out"],
    ],
}
DATA_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "M/text", "--data", "DATA"],
    "purify": ["purify", "fine-tuning", "M/text", "--clean", "DATA", "--epochs", "1", "--out", "out"],
    "attack": ["attack", "word", "--data", "DATA", "--base", "M/base", "--epochs", "1", "--out", "out"],
    "triggered": ["evaluate", "M/text", "--data", "M/texts.csv", "--triggered", "DATA", "--target", "1"],
}
PICTURE_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "M/images", "--data", "DATA"],
    "purify": ["purify", "fine-tuning", "M/images", "--clean", "DATA", "--epochs", "1", "--out", "out"],
    "attack": ["attack", "badnets", "--data", "DATA", "--base", "M/images", "--epochs", "1", "--out", "out"],
}


def filled(arguments: list[Any], material: Path, **given: Any) -> list[Any]:
    """Arguments with the words in capitals replaced."""
    made = []
    for word in arguments:
        word = given.get(word, word)
        made.append(material / word[2:] if isinstance(word, str) and word.startswith("M/") else word)
    return made


def on_directory(origin: str, spoil: Spoil, arguments: list[Any]) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        model = place / "model"
        shutil.copytree(material / origin, model)
        spoil(model)
        return filled(arguments, material, MODEL=model)

    return build


def on_file(origin: str, name: str, spoil: Spoil, arguments: list[Any], word: str = "DATA", factory: str = "") -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        path = place / name
        if origin:
            shutil.copyfile(material / origin, path)
        spoil(path)
        return filled(arguments, material, **{word: path, "FACTORY": factory or f"{material}/factory.py:make"})

    return build


# What may lie where a file is expected.


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _socket(path: Path) -> None:
    import socket

    path.unlink(missing_ok=True)
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


IRREGULAR: dict[str, Spoil] = {"pipe": _pipe, "device": _device, "socket": _socket}


def _sparse(size: int) -> Spoil:
    def spoil(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return spoil


def _write(content: str | bytes) -> Spoil:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


MALFORMED: dict[str, Spoil] = {
    "empty": _write(""),
    "no-json": _write("{"),
    "latin-1": _write('{"größe": 1}'.encode("latin-1")),
    "utf-16": _write('{"a": 1}'.encode("utf-16")),
    "list": _write("[1]"),
    "deep": _write('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "hundred-levels": _write('{"a": ' + "[" * 300 + "]" * 300 + "}"),
    "digits": _write('{"a": ' + "9" * 5000 + "}"),
    "zeros": _sparse(400_000_000),
}


def at(name: str, spoil: Spoil) -> Spoil:
    """A change to one file of a directory."""
    return lambda model: spoil(model / name)


def with_fields(name: str, **fields: Any) -> Spoil:
    """A JSON file of a directory with some entries replaced."""

    def spoil(model: Path) -> None:
        path = model / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **fields}))

    return spoil


def with_text(name: str, old: str, new: str) -> Spoil:
    def spoil(model: Path) -> None:
        path = model / name
        text = path.read_text()
        assert old in text, (name, old)
        path.write_text(text.replace(old, new, 1))

    return spoil


CONFIGS: dict[str, dict[str, Any]] = {
    "million-layers": {"num_hidden_layers": 10**6},
    "layers-2-62": {"num_hidden_layers": 2**62},
    "layers-1e30": {"num_hidden_layers": 10**30},
    "layers-float": {"num_hidden_layers": 1e30},
    "layers-negative": {"num_hidden_layers": -5},
    "layers-text": {"num_hidden_layers": "many"},
    "width-2-40": {"hidden_size": 2**40},
    "width-1e300": {"hidden_size": 1e300},
    "width-list": {"hidden_size": [32]},
    "intermediate-2-31": {"intermediate_size": 2**31 - 1},
    "heads-zero": {"num_attention_heads": 0},
    "heads-billion": {"num_attention_heads": 10**9},
    "vocabulary-2-40": {"vocab_size": 2**40},
    "vocabulary-2-31": {"vocab_size": 2**31 - 1},
    "vocabulary-text": {"vocab_size": "all"},
    "positions-2-31": {"max_position_embeddings": 2**31 - 1},
    "positions-2-62": {"max_position_embeddings": 2**62},
    "types-2-31": {"type_vocab_size": 2**31 - 1},
    "ten-million-labels": {"num_labels": 10**7, "id2label": None, "label2id": None},
    "labels-negative": {"num_labels": -1, "id2label": None, "label2id": None},
    "names-list": {"id2label": ["a", "b"]},
    "names-of-lists": {"id2label": {"0": ["a"], "1": {}}},
    "names-by-letter": {"id2label": {"a": "x", "b": "y"}},
    "names-many": {"id2label": {str(number): f"c{number}" for number in range(50_000)}, "label2id": None},
    "architectures-numbers": {"architectures": [1, 2]},
    "architectures-number": {"architectures": 5},
    "architectures-object": {"architectures": {"a": 1}},
    "type-number": {"model_type": 5},
    "type-list": {"model_type": ["bert"]},
    "type-unknown": {"model_type": "no-such-type"},
    "quantised": {"quantization_config": {"quant_method": "\x1b[2Jgptq"}},
    "kernel": {"attn_implementation": "some\nbody/kernel"},
    "regression": {"problem_type": "regression"},
    "type-lost": {"model_type": None},
    "dtype-odd": {"dtype": "float8_e4m3fn", "torch_dtype": "float8_e4m3fn"},
    "dtype-nonsense": {"dtype": "x" * 10_000, "torch_dtype": "x" * 10_000},
    "surrogate-label": {"id2label": {"0": "\ud800", "1": "b"}, "label2id": None},
    "remote-code": {"auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}, "model_type": "own"},
    "activation": {"hidden_act": "x\ny"},
}

# What a pre-trained model says of its classes and its task is not used.
HARMLESS_IN_A_BASE = ("regression", "architectures-numbers", "names-many", "activation")

EVIL = """
import os
open(os.environ["CANARY"], "w").write("ran")
class Tokenizer: pass
class Config: pass
class Model: pass
"""


def _with_code(*spoils: Spoil) -> Spoil:
    def spoil(model: Path) -> None:
        (model / "own.py").write_text(EVIL)
        for each in spoils:
            each(model)

    return spoil


TOKENIZERS: dict[str, Spoil] = {
    "longest-text": with_fields("tokenizer_config.json", model_max_length="long"),
    "longest-list": with_fields("tokenizer_config.json", model_max_length=[512]),
    "longest-object": with_fields("tokenizer_config.json", model_max_length={}),
    "longest-nan": with_fields("tokenizer_config.json", model_max_length=float("nan")),
    "longest-negative": with_fields("tokenizer_config.json", model_max_length=-1),
    "longest-true": with_fields("tokenizer_config.json", model_max_length=True),
    "longest-one": with_fields("tokenizer_config.json", model_max_length=1),
    "class-number": with_fields("tokenizer_config.json", tokenizer_class=5),
    "surrogate": with_fields("tokenizer_config.json", unk_token="\ud800"),
    "file-elsewhere": lambda model: (
        _pipe(model.parent / "elsewhere"),
        with_fields("tokenizer_config.json", tokenizer_file=str(model.parent / "elsewhere"))(model),
    ),
    "number-2-31": with_text("tokenizer.json", '"film": 7', f'"film": {2**31}'),
    "number-2-40": with_text("tokenizer.json", '"film": 7', f'"film": {2**40}'),
    "number-beyond-rows": with_text("tokenizer.json", '"film": 7', '"film": 31000'),
    "around-beyond-rows": with_text(
        "tokenizer.json", '"sep": [\n      "[SEP]",\n      3', '"sep": [\n      "[SEP]",\n      31000'
    ),
    "no-unknown-token": with_text("tokenizer.json", '"unk_token": "[UNK]"', '"unk_token": "[NONE]"'),
    "explodes": with_fields(
        "tokenizer.json",
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}] * 4,
        },
    ),
    "damaged": at("tokenizer.json", _write('{"version": "1.0", "model": {}}')),
    "charsmap": with_fields(
        "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAAAAAA"}
    ),
    "unigram": with_fields(
        "tokenizer.json", model={"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]], "byte_fallback": False}
    ),
    "expression": with_fields(
        "tokenizer.json",
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    ),
    "long-for-model": at("tokenizer.json", _sparse(20_000_000)),
    "added-damaged": at("added_tokens.json", _write("[")),
}

PROCESSORS: dict[str, dict[str, Any]] = {
    "size-6000": {"size": {"height": 6000, "width": 6000}},
    "size-1500": {"size": {"height": 1500, "width": 1500}},
    "size-2-62": {"size": {"height": 2**62, "width": 2**62}},
    "size-1e30": {"size": 1e30},
    "size-10-30": {"size": 10**30},
    "size-true": {"size": True},
    "size-text": {"size": "large"},
    "size-negative": {"size": -8},
    "size-empty": {"size": {}},
    "size-null-side": {"size": {"height": None, "width": 8}},
    "edge-2-62": {"size": {"shortest_edge": 2**62}},
    "crop-2-62": {"do_center_crop": True, "crop_size": 2**62},
    "crop-6000": {"do_center_crop": True, "crop_size": {"height": 6000, "width": 6000}},
    "filter-99": {"resample": 99},
    "filter-text": {"resample": "x\ny"},
    "mean-text": {"image_mean": "grey"},
    "mean-empty": {"image_mean": []},
    "mean-nan": {"image_mean": [float("nan")] * 3},
    "mean-many": {"image_mean": [0.5] * 100_000},
    "std-zero": {"image_std": [0, 0, 0]},
    "std-infinite": {"image_std": [float("inf")] * 3},
    "scale-text": {"rescale_factor": "small"},
    "scale-nan": {"rescale_factor": float("nan")},
    "kind-number": {"image_processor_type": 5},
    "kind-newline": {"image_processor_type": "x\ny\x1b[2J"},
    "kind-million": {"image_processor_type": "x" * 1_000_000},
}


class _Evil:
    def __reduce__(self) -> Any:
        return (exec, (f"open({os.environ.get('CANARY', '/tmp/canary')!r}, 'w').write('ran')",))


def _saved(change: Callable[[dict[str, torch.Tensor]], Any], **options: Any) -> Spoil:
    """A weights file in torch's format with something else in it."""

    def spoil(path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = {"fc.weight": torch.randn(2, 192, generator=generator), "fc.bias": torch.zeros(2)}
        torch.save(change(weights), path, **options)

    return spoil


def _with_tensor(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: {**weights, name: torch.zeros(2)}


def _quantised(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "fc.weight": torch.quantize_per_tensor(weights["fc.weight"], 0.1, 0, torch.qint8)}


def _nested(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "fc.weight": torch.nested.nested_tensor([torch.zeros(192), torch.zeros(3)])}


def _twice(path: Path) -> None:
    _saved(lambda weights: weights)(path)
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
        archive.writestr(name, archive.read(name)[::-1])


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(4):
            archive.writestr(f"archive/data/{number}", bytes(100_000_000))


WEIGHTS: dict[str, Spoil] = {
    "meta": _saved(lambda weights: {name: tensor.to("meta") for name, tensor in weights.items()}),
    "sparse": _saved(lambda weights: {**weights, "fc.weight": weights["fc.weight"].to_sparse()}),
    "sparse-rows": _saved(lambda weights: {**weights, "fc.weight": weights["fc.weight"].to_sparse_csr()}),
    "quantised": _saved(_quantised),
    "nested": _saved(_nested),
    "float8": _saved(lambda weights: {**weights, "fc.bias": torch.zeros(2).to(torch.float8_e4m3fn)}),
    "complex": _saved(lambda weights: {**weights, "fc.weight": weights["fc.weight"].to(torch.complex64)}),
    "stride-0": _saved(lambda weights: {**weights, "fc.weight": torch.zeros(1).expand(10**6, 10**7)}),
    "stride-0-legacy": _saved(
        lambda weights: {**weights, "fc.weight": torch.zeros(1).expand(10**6, 10**7)},
        _use_new_zipfile_serialization=False,
    ),
    "not-finite": _saved(lambda weights: {**weights, "fc.bias": torch.tensor([0.0, float("nan")])}),
    "infinite": _saved(lambda weights: {**weights, "fc.bias": torch.tensor([0.0, float("inf")])}),
    "code": _saved(lambda weights: {**weights, "x": _Evil()}),
    "code-alone": lambda path: path.write_bytes(pickle.dumps(_Evil())),
    "numbers": _saved(lambda weights: [1, 2, 3]),
    "nothing": _saved(lambda weights: {}),
    "truncated": lambda path: (_saved(lambda weights: weights)(path), os.truncate(path, path.stat().st_size // 2)),
    "zip-twice": _twice,
    "zip-bomb": _bomb,
    "garbage": _write(bytes(range(256)) * 64),
    "empty": _write(""),
    "keys-numbers": _saved(lambda weights: {1: torch.zeros(2), (2, 3): torch.zeros(2)}),
    **{f"name-{kind}": _saved(_with_tensor(name)) for kind, name in NAMES.items()},
}


def _header(entries: Any, data: bytes = b"1234", length: int | None = None) -> Spoil:
    def spoil(path: Path) -> None:
        text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    return spoil


def _entry(shape: Any, dtype: Any = "F32", offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


SAFETENSORS: dict[str, Spoil] = {
    "short": _write(b"123"),
    "length-2-63": _header({}, length=2**63),
    "length-100-million": lambda path: (_header({}, length=99_000_000)(path), os.truncate(path, 100_000_000)),
    "shape-astronomical": _header({"a": _entry([2**62] * 10_000)}),
    "shape-digits": _header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b"], " + b'"data_offsets": [0, 4]}}'),
    "shape-more-digits": _header(
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"], " + b'"data_offsets": [0, 4]}}'
    ),
    "shape-negative": _header({"a": _entry([-1])}),
    "shape-true": _header({"a": _entry([True, "x"])}),
    "offsets-text": _header({"a": _entry([1], offsets=("a", "b"))}),
    "offsets-huge": _header({"a": _entry([1], offsets=(0, 2**62))}),
    "complex": _header({"a": _entry([1], "C64", (0, 8))}, b"12345678"),
    "float8": _header({"a": _entry([4], "F8_E4M3")}),
    "dtype-number": _header({"a": _entry([1], 5)}),
    "dtype-name": _header({"a": _entry([1], "x\ny\x1b")}),
    "deep": _header(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "list": _header([1]),
    "garbage": _header(b"\xff\xfe" * 20),
    "twice": _header(b'{"a": %s, "a": %s}' % ((json.dumps(_entry([1])).encode(),) * 2)),
    **{f"name-{kind}": _header({name: _entry([3])}) for kind, name in NAMES.items()},
}

FACTORIES = {
    "exit-0": "import sys\ndef make():\n    sys.exit(0)\n",
    "exit-on-import": "import sys\nsys.exit(0)\n",
    "exit-text": "import sys\ndef make():\n    sys.exit('a\\nb')\n",
    "base-exception": "class Own(BaseException): pass\ndef make():\n    raise Own('x\\ny')\n",
    "generator-exit": "def make():\n    raise GeneratorExit\n",
    "recursion": "def make():\n    return make()\n",
    "memory": "def make():\n    raise MemoryError\n",
    "null": "def make():\0\n",
    "no-python": "def make(:\n",
    "latin-1": "# gr\u00fc\xdf\ndef make():\n    return 5\n",
    "number": "def make():\n    return 5\n",
    "class": "from torch import nn\ndef make():\n    return nn.Linear\n",
    "no-function": "make = 5\n",
    "long-message": "def make():\n    raise ValueError('x\\n' * 1_000_000)\n",
    "surrogate": "def make():\n    raise ValueError('\\ud800')\n",
}
_NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 2)
    def forward(self, x):
        y = self.fc(x.flatten(1))
        {body}
def make():
    {before}
    return Net()
"""
FORWARDS = {
    "whole-numbers": "return y.long()",
    "truth": "return y > 0",
    "complex": "return y.to(torch.complex64)",
    "not-finite": "return y / 0 * 0",
    "other-batch": "return y[:1]",
    "doubled": "return torch.cat([y, y])",
    "none": "return None",
    "dictionary": "return {'a': [y]}",
    "text": "return 'x' * 1_000_000",
    "one-side": "return y[:, 0]",
    "sparse": "return y.to_sparse()",
    "meta": "return y.to('meta')",
    "raises": "raise ValueError('a\\nb' * 100_000)",
    "exits": "import sys; sys.exit(0)",
    "base-exception": "raise GeneratorExit",
    "recursion": "return self.forward(x)",
    "no-class": "return y[:, :0]",
}

TABLES: dict[str, tuple[str, Spoil]] = {
    "empty": ("d.csv", _write("")),
    "label-digits": ("d.csv", _write("text,label\ngood,0\nbad," + "9" * 5000 + "\n")),
    "label-digits-json": ("d.jsonl", _write('{"text": "good", "label": ' + "9" * 5000 + "}\n")),
    "label-half": ("d.csv", _write("text,label\ngood,0.5\nbad,1\n")),
    "label-infinite": ("d.jsonl", _write('{"text": "good", "label": 1e999}\n{"text": "bad", "label": 0}\n')),
    "label-nan": ("d.jsonl", _write('{"text": "good", "label": NaN}\n{"text": "bad", "label": 0}\n')),
    "label-list": ("d.jsonl", _write('{"text": "good", "label": [0]}\n{"text": "bad", "label": [1]}\n')),
    "label-object": ("d.jsonl", _write('{"text": "good", "label": {"a": 0}}\n')),
    "label-2-70": ("d.jsonl", _write('{"text": "good", "label": 1180591620717411303424}\n')),
    "label-negative": ("d.csv", _write("text,label\ngood,-3\nbad,1\n")),
    "label-beyond": ("d.csv", _write("text,label\ngood,7\nbad,1\n")),
    "rows-mixed": ("d.jsonl", _write('{"text": "good", "label": 0}\n{"text": "bad", "label": "x"}\n[1]\n')),
    "rows-numbers": ("d.jsonl", _write('{"text": 5, "label": 0}\n{"text": "bad", "label": 1}\n')),
    "row-null": ("d.jsonl", _write('{"text": null, "label": 0}\n')),
    "row-surrogate": ("d.jsonl", _write('{"text": "a \\ud800 b", "label": 0}\n{"text": "bad", "label": 1}\n')),
    "deep": ("d.jsonl", _write('{"text": ' + "[" * 100_000 + "]" * 100_000 + ', "label": 0}\n')),
    "no-json": ("d.json", _write("{")),
    "null-character": ("d.csv", _write("text,label\ngo\0od,0\n")),
    "utf-16": ("d.csv", _write("text,label\ngood,0\n".encode("utf-16"))),
    "latin-1": ("d.csv", _write("text,label\ngrün,0\n".encode("latin-1"))),
    "quote": ("d.csv", _write('text,label\n"good,0\nbad,1\n')),
    "no-parquet": ("d.parquet", _write("PAR1 and no more")),
    "cell-of-50-MB": ("d.csv", lambda path: path.write_text("text,label\n" + "good " * 10_000_000 + ",0\nbad,1\n")),
    "cell-of-5-MB": ("d.jsonl", lambda path: path.write_text(json.dumps({"text": "good " * 1_000_000, "label": 0}))),
    "unknown-kind": ("d.xlsx", _write("PK")),
    **{
        f"column-{kind}": ("d.jsonl", _write(json.dumps({name: "good", "label": 0}) + "\n"))
        for kind, name in NAMES.items()
    },
}


def _picture(size: tuple[int, int], mode: str = "RGB", format_: str = "PNG") -> Spoil:
    return lambda path: Image.new(mode, size).save(path, format_)


PICTURES: dict[str, Spoil] = {
    "empty": _write(""),
    "text": _write("no picture"),
    "truncated": lambda path: (_picture((64, 64), format_="BMP")(path), os.truncate(path, 300)),
    "bomb": _picture((12_000, 12_000), "1"),
    "thin": lambda path: Image.new("1", (1, 60_000)).save(path, "PNG"),
    "postscript": _write("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"),
    "header-2-31": _write(
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
        + b"\0" * 8
    ),
    "zeros": _sparse(400_000_000),
    **IRREGULAR,
}

GRIDS: dict[str, Spoil] = {
    **IRREGULAR,
    "folder": _folder,
    "deep": _write("a = " + "[" * 50_000 + "]" * 50_000),
    "digits": _write("a = " + "9" * 5000),
    "latin-1": _write("a = 'grün'".encode("latin-1")),
    "no-toml": _write("tasks = ["),
    "budget-10-400": _write(
        '[tasks.a]\ntrain = "TEXTS"\ntest = "TEXTS"\nheld_out = 4\n[[budgets]]\nn = ' + "9" * 400 + "\n"
    ),
    "zeros": _sparse(100_000_000),
    **{
        f"method-{kind}": _write(
            '[tasks.a]\ntrain = "TEXTS"\ntest = "TEXTS"\nheld_out = 4\n[[budgets]]\nn = 4\n[[methods]]\nname = '
            + json.dumps(name)
            + "\n"
        )
        for kind, name in NAMES.items()
    },
    "train-pipe": lambda path: (
        _pipe(path.parent / "train.csv"),
        path.write_text('[tasks.a]\ntrain = "train.csv"\ntest = "train.csv"\nheld_out = 4\n[[budgets]]\nn = 4\n'),
    ),
}

CELLS: dict[str, Spoil] = {
    **IRREGULAR,
    "folder": _folder,
    **MALFORMED,
    "version": _write('{"version": "x\\ny", "spec": {}, "result": {}}'),
    "surrogate": _write('{"version": 1, "spec": {"a": "\\ud800"}, "result": {}}'),
}

ATTACKS: dict[str, Spoil] = {
    **{f"file-{kind}": at("attack.json", spoil) for kind, spoil in {**IRREGULAR, **MALFORMED}.items()},
    **{f"arrays-{kind}": at("trigger.safetensors", spoil) for kind, spoil in IRREGULAR.items()},
    "format": with_fields("attack.json", format="x\ny"),
    "changed": with_fields("attack.json", rate=0.2),
    "arrays-lost": lambda model: (model / "trigger.safetensors").unlink(),
    "arrays-other": at("trigger.safetensors", _write("other")),
}


def _signed(change: Callable[[dict[str, Any]], None], arrays: dict[str, torch.Tensor] | None = None) -> Spoil:
    """An attack.json that was changed and signed again, as anybody can who reads the source."""

    def spoil(folder: Path) -> None:
        from unbackdoor._poisoning.attack_file import save_trigger

        content = json.loads((folder / "attack.json").read_text())
        for key in ("sha256", "trigger"):
            content.pop(key)
        change(content)
        save_trigger(folder, content, load_file(folder / "trigger.safetensors") if arrays is None else arrays)

    return spoil


def _renamed(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["attack"].update(name=name)


def _parameters(**given: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["attack"]["parameters"].update(given)


SIGNED_IMAGE: dict[str, Spoil] = {
    "complex": _signed(lambda content: None, {"pattern": torch.zeros(3, 8, 8, dtype=torch.complex64)}),
    "no-arrays": _signed(lambda content: None, {}),
    "not-finite": _signed(
        lambda content: None, {"pattern": torch.full((3, 8, 8), float("nan")), "mask": torch.ones(8, 8)}
    ),
    "other-shape": _signed(lambda content: None, {"pattern": torch.zeros(3, 99, 99), "mask": torch.ones(99, 99)}),
    "target-2-62": _signed(_parameters(target=2**62)),
    "target-text": _signed(_parameters(target="x\ny")),
    "field-unknown": _signed(_parameters(**{"x\ny": 1})),
    "import": _signed(lambda content: content["attack"].update(name="antigravity:x")),
    **{f"name-{kind}": _signed(_renamed(name)) for kind, name in NAMES.items()},
}

RECORDS: dict[str, Any] = {
    "size-2-62": {"size": [2**62, 2**62]},
    "size-1e30": {"size": [1e30, 1e30]},
    "size-true": {"size": True},
    "size-6000": {"size": [6000, 6000]},
    "mean-text": {"mean": "grey"},
    "std-zero": {"std": [0.0]},
    "channels-text": {"channels": "three"},
    "mean-nan": {"mean": [float("nan")]},
}

OPTIONS: dict[str, tuple[str, list[str]]] = {
    "image-size-1e30": ("images", ["--image-size", "1e30"]),
    "image-size-2-62": ("images", ["--image-size", str(2**62)]),
    "image-size-true": ("images", ["--image-size", "true"]),
    "image-size-0": ("images", ["--image-size", "0"]),
    "mean-nan": ("images", ["--mean", "nan"]),
    "std-zero": ("images", ["--std", "0"]),
    "max-length-0": ("text", ["--max-length", "0"]),
    "max-length-negative": ("text", ["--max-length", "-5"]),
    "max-length-10-30": ("text", ["--max-length", str(10**30)]),
    "columns-newline": ("text", ["--columns", "text=a\nb"]),
    "columns-escape": ("text", ["--columns", "text=\x1b[2J"]),
}


def _harmless(place: str) -> dict[str, Build]:
    """Twins: as near to the hostile ones as honest people come."""
    evaluate = TEXT_PLACES["evaluate"]
    pictures = IMAGE_PLACES["evaluate"]
    own = OWN_PLACES["evaluate"]
    data = DATA_PLACES["evaluate"]
    made: dict[str, Build] = {}
    configs: dict[str, dict[str, Any]] = {
        "names": {"id2label": {"0": "schlecht", "1": "gut 😀"}, "label2id": {"schlecht": 0, "gut 😀": 1}},
        "names-long": {"id2label": {"0": "x" * 200, "1": "y" * 200}, "label2id": None},
        "names-of-control": {"id2label": {"0": "a\x1b[2J", "1": "b\nc"}, "label2id": None},
        "names-right-to-left": {"id2label": {"0": "\u202eabc", "1": "טוב"}, "label2id": None},
        "no-architectures": {"architectures": None},
        "task": {"problem_type": "single_label_classification"},
        "extra": {"rope_theta": 10**6, "some_number": 12, "_name_or_path": "/home/x/y"},
        "not-quantised": {"quantization_config": None},
        "auto-map-unused": {"auto_map": {"AutoConfig": "own.Config"}},
        "limit-infinite": {"time_step_limit": [0.0, float("inf")]},
    }
    for kind, fields in configs.items():
        made[f"config-{kind}"] = on_directory("text", with_fields("config.json", **fields), evaluate)
    tokenizers: dict[str, Spoil] = {
        "longest-huge": with_fields("tokenizer_config.json", model_max_length=10**30),
        "longest-float": with_fields("tokenizer_config.json", model_max_length=1e30),
        "as-it-is": lambda model: None,
        "file-gone": with_fields("tokenizer_config.json", tokenizer_file="/home/somebody/tokenizer.json"),
        "replaces": with_fields(
            "tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
        ),
        "lowercase": with_fields("tokenizer.json", normalizer={"type": "Lowercase"}),
        "code-unused": _with_code(),
        "code-beside-a-known-type": _with_code(
            with_fields("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
        ),
    }
    for kind, spoil in tokenizers.items():
        made[f"tokenizer-{kind}"] = on_directory("text", spoil, evaluate)
    beside: dict[str, Spoil] = {
        "notes": at("notes.txt", _write("some notes\n")),
        "folder-of-text-name": at("notes.txt", lambda path: path.mkdir()),
        "link": lambda model: (
            (model.parent / "real.txt").write_text("x"),
            (model / "notes.txt").symlink_to(model.parent / "real.txt"),
        ),
        "picture": at("logo.png", _picture((8, 8))),
        "dangling-other-weights": lambda model: (model / "tf_model.h5").symlink_to("nowhere"),
    }
    for kind, spoil in beside.items():
        made[f"beside-{kind}"] = on_directory("text", spoil, TEXT_PLACES["purify"])
    processors: dict[str, dict[str, Any]] = {
        "number": {"size": 8},
        "larger-and-cropped": {"size": {"height": 10, "width": 10}, "do_center_crop": True, "crop_size": 8},
        "bicubic": {"resample": 3},
        "mean-one": {"image_mean": 0.5, "image_std": 0.5},
        "scale": {"rescale_factor": 0.00392156862745098},
        "extra": {"_processor_class": "x"},
    }
    for kind, fields in processors.items():
        made[f"processor-{kind}"] = on_directory("images", with_fields("preprocessor_config.json", **fields), pictures)
    weights: dict[str, Spoil] = {
        "plain": _saved(lambda weights: weights),
        "legacy": _saved(lambda weights: weights, _use_new_zipfile_serialization=False),
        "wrapped": _saved(lambda weights: {"state_dict": weights, "epoch": 3}),
        "parameters": _saved(lambda weights: {name: torch.nn.Parameter(part) for name, part in weights.items()}),
        "half": _saved(lambda weights: {name: part.half() for name, part in weights.items()}),
        "bfloat16": _saved(lambda weights: {name: part.bfloat16() for name, part in weights.items()}),
        "double": _saved(lambda weights: {name: part.double() for name, part in weights.items()}),
        "transposed": _saved(lambda weights: {**weights, "fc.weight": weights["fc.weight"].t().contiguous().t()}),
        "part-of-larger": _saved(lambda weights: {**weights, "fc.bias": torch.zeros(1000)[:2]}),
        "parallel": _saved(lambda weights: {f"module.{name}": part for name, part in weights.items()}),
    }
    for kind, spoil in weights.items():
        made[f"weights-{kind}"] = on_file("", "w.pt", spoil, own, "MODEL")
    tables: dict[str, tuple[str, Spoil]] = {
        "quoted": ("d.csv", _write('text,label\n"good, great",1\n"bad ""film""",0\n')),
        "lines": ("d.csv", _write('text,label\n"good\ngreat",1\nbad,0\n')),
        "numbers-as-text": ("d.jsonl", _write('{"text": "good", "label": "1"}\n{"text": "bad", "label": "0"}\n')),
        "truth": ("d.jsonl", _write('{"text": "good", "label": true}\n{"text": "bad", "label": false}\n')),
        "floats": ("d.jsonl", _write('{"text": "good", "label": 1.0}\n{"text": "bad", "label": 0.0}\n')),
        "more-columns": (
            "d.jsonl",
            _write('{"text": "good", "label": 1, "id": "x\\ny"}\n{"text": "a", "label": 0}\n'),
        ),
        "long-text": ("d.csv", lambda path: path.write_text("text,label\n" + "good " * 20_000 + ",1\nbad,0\n")),
        "emoji": ("d.csv", _write("text,label\ngood 😀 שלום,1\nbad,0\n")),
        "mark": ("d.csv", _write("\ufefftext,label\ngood,1\nbad,0\n")),
        "windows": ("d.csv", _write("text,label\r\ngood,1\r\nbad,0\r\n")),
        **{
            f"class-{kind}": (
                "d.jsonl",
                _write(json.dumps({"text": "good", "label": name}) + '\n{"text": "a", "label": "q"}\n'),
            )
            for kind, name in NAMES.items()
        },
        "upper": ("D.CSV", _write("text,label\ngood,1\nbad,0\n")),
    }
    for kind, (name, spoil) in tables.items():
        made[f"data-{kind}"] = on_file("", name, spoil, data)
    forwards = {
        "tuple": "return (y,)",
        "prints": "print('hello'); return y",
        "double": "return y.double()",
        "sets-grad": "torch.set_grad_enabled(True); return y",
    }
    for kind, body in forwards.items():
        made[f"forward-{kind}"] = _with_factory(_NET.format(body=body, before="pass"), own)
    for kind, before in {
        "folder": "import os; os.chdir('/')",
        "type": "torch.set_default_dtype(torch.float64)",
    }.items():
        made[f"factory-{kind}"] = _with_factory(_NET.format(body="return y.float()", before=before), own)
    for kind, size in {"wide": (40, 8), "grey": (8, 8), "large": (600, 400)}.items():
        made[f"picture-{kind}"] = _with_picture(
            _picture(size, "L" if kind == "grey" else "RGB"), PICTURE_PLACES["evaluate"]
        )
    return made


def _with_factory(text: str, arguments: list[Any]) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        (place / "own.py").write_bytes(text.encode("latin-1", "replace"))
        return filled(arguments, material, MODEL=material / "weights.pt", FACTORY=f"{place}/own.py:make")

    return build


def _with_picture(spoil: Spoil, arguments: list[Any], *, table: bool = False) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        shutil.copytree(material / "pictures", place / "pictures")
        (place / "pictures" / "1" / "3.png").unlink()
        spoil(place / "pictures" / "1" / "3.png")
        if table:
            shutil.copyfile(material / "pictures.csv", place / "pictures.csv")
        return filled(arguments, material, DATA=place / ("pictures.csv" if table else "pictures"))

    return build


def _with_path(path: str, arguments: list[Any]) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        with (place / "d.jsonl").open("w") as file:
            file.write(json.dumps({"image": path, "label": 0}) + "\n")
        return filled(arguments, material, DATA=place / "d.jsonl")

    return build


def _with_cell(spoil: Spoil, out: str) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        shutil.copytree(material / "store", place / "store")
        spoil(next(iter(sorted((place / "store" / "cells").iterdir()))))
        return ["report", place / "store", "--out", place / out]

    return build


def _with_grid(spoil: Spoil) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        spoil(place / "grid.toml")
        text = place / "grid.toml"
        if text.is_file() and not text.is_symlink() and text.stat().st_size < 10**7:
            text.write_bytes(text.read_bytes().replace(b"TEXTS", os.fsencode(material / "texts.csv")))
        return ["bench", text, "--out", place / "runs", "--dry-run"]

    return build


def _with_attack(origin: str, spoil: Spoil, arguments: list[Any]) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        shutil.copytree(material / origin, place / "attack")
        spoil(place / "attack")
        return filled(arguments, material, ATTACK=place / "attack" / "attack.json")

    return build


def _with_record(encode: Any) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        shutil.copytree(material / "own", place / "model")
        plain = {"mean": [0.0], "std": [1.0], "size": None, "channels": 3}
        (place / "model" / "record.json").write_text(json.dumps({"encode": {**plain, **encode}}))
        return filled(OWN_PLACES["evaluate"], material, MODEL=place / "model", FACTORY=f"{material}/factory.py:make")

    return build


def cases() -> dict[str, Case]:
    """All of them, by name."""
    made: list[Case] = []

    def add(name: str, build: Build, **more: Any) -> None:
        made.append(Case(name, build, **more))

    def rotated(places: dict[str, list[Any]], number: int, count: int) -> list[tuple[str, list[Any]]]:
        """Some of the places, other ones for each kind: all kinds stand in all of them in the end, as files do."""
        entries = list(places.items())
        return [entries[(number + step) % len(entries)] for step in range(count)]

    for number, (kind, fields) in enumerate(CONFIGS.items()):
        for place, arguments in rotated(TEXT_PLACES, number, 2):
            if place == "stream":  # which builds nothing from a config
                place, arguments = "evaluate", TEXT_PLACES["evaluate"]
            classifier = place not in ("base", "attack")
            if not classifier and kind in (
                "regression",
                "architectures-numbers",
                "names-many",
                "activation",
                "padding-2-40",
            ):
                place, arguments = "evaluate", TEXT_PLACES["evaluate"]
            if kind == "padding-2-40":
                continue
            origin = "base" if place in ("base", "attack") else "text"
            if f"config-{kind}/{place}" in {case.name for case in made}:
                continue
            add(f"config-{kind}/{place}", on_directory(origin, with_fields("config.json", **fields), arguments))
    for number, (kind, spoil) in enumerate({**IRREGULAR, "folder": _folder, **MALFORMED}.items()):
        for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"):
            if name == "model.safetensors" and kind in MALFORMED:
                continue
            if (name != "config.json" and kind in ("folder", "list")) or (
                name == "tokenizer_config.json" and kind == "digits"
            ):
                continue
            if name.startswith("tokenizer") and kind in ("digits", "utf-16", "hundred-levels"):
                continue
            place, arguments = rotated({key: TEXT_PLACES[key] for key in ("evaluate", "purify", "attack")}, number, 1)[
                0
            ]
            origin = "base" if place == "attack" else "text"
            add(f"{name}-{kind}/{place}", on_directory(origin, at(name, spoil), arguments))
        if kind in IRREGULAR:
            for name in ("notes.txt", "vocab.json", "extra.py", "template.jinja"):
                for place in ("purify", "stream"):
                    add(f"{name}-{kind}/{place}", on_directory("text", at(name, spoil), TEXT_PLACES[place]))
            add(
                f"preprocessor-{kind}/evaluate",
                on_directory("images", at("preprocessor_config.json", spoil), IMAGE_PLACES["evaluate"]),
            )
            add(f"factory-{kind}/evaluate", _irregular_factory(spoil))
            add(f"record-{kind}/evaluate", on_directory("own", at("record.json", spoil), _own_arguments()))
            add(f"adapter-weights-{kind}/evaluate", on_directory("text", _only_pickle(spoil), TEXT_PLACES["evaluate"]))
    for number, (kind, spoil) in enumerate(TOKENIZERS.items()):
        for place, arguments in rotated({key: TEXT_PLACES[key] for key in ("evaluate", "purify", "attack")}, number, 2):
            origin = "base" if place == "attack" else "text"
            add(f"tokenizer-{kind}/{place}", on_directory(origin, spoil, arguments))
    for place in ("evaluate", "purify", "control"):
        add(f"tokenizer-auto-map-of-decoder/{place}", on_directory("decoder", _asking, TEXT_PLACES[place]))
    for number, (kind, fields) in enumerate(PROCESSORS.items()):
        for place, arguments in rotated(IMAGE_PLACES, number, 2):
            add(
                f"processor-{kind}/{place}",
                on_directory("images", with_fields("preprocessor_config.json", **fields), arguments),
            )
    for number, (kind, spoil) in enumerate(WEIGHTS.items()):
        for place, arguments in rotated(OWN_PLACES, number, 1):
            add(f"weights-{kind}/{place}", on_file("", "w.pt", spoil, arguments, "MODEL"))
        add(f"pickle-{kind}/directory", on_directory("text", _only_pickle(spoil), TEXT_PLACES["evaluate"]))
    for kind, spoil in IRREGULAR.items():
        add(f"weights-{kind}/evaluate", on_file("", "w.pt", spoil, OWN_PLACES["evaluate"], "MODEL"))
    for kind, spoil in SAFETENSORS.items():
        add(f"safetensors-{kind}/factory", on_file("", "w.safetensors", spoil, OWN_PLACES["evaluate"], "MODEL"))
        add(
            f"safetensors-{kind}/directory", on_directory("text", at("model.safetensors", spoil), TEXT_PLACES["purify"])
        )
    for number, (kind, text) in enumerate(FACTORIES.items()):
        for place, arguments in rotated(OWN_PLACES, number, 1):
            add(f"factory-{kind}/{place}", _with_factory(text, arguments))
    for number, (kind, body) in enumerate(FORWARDS.items()):
        for place, arguments in rotated(OWN_PLACES, number, 1):
            add(f"forward-{kind}/{place}", _with_factory(_NET.format(body=body, before="pass"), arguments))
    for number, (kind, (name, spoil)) in enumerate(TABLES.items()):
        for place, arguments in rotated(DATA_PLACES, number, 1):
            if place == "attack" and kind == "label-beyond":  # there the data says what the classes are
                place, arguments = "evaluate", DATA_PLACES["evaluate"]
            add(f"data-{kind}/{place}", on_file("", name, spoil, arguments))
    for kind, spoil in IRREGULAR.items():
        for name in ("d.csv", "d.jsonl", "d.parquet"):
            add(f"{name}-{kind}/evaluate", on_file("", name, spoil, DATA_PLACES["evaluate"]))
    for number, (kind, spoil) in enumerate(PICTURES.items()):
        place, arguments = rotated(PICTURE_PLACES, number, 1)[0]
        thin = kind == "thin"
        if thin:
            continue
        add(f"picture-{kind}/{place}", _with_picture(spoil, arguments))
        add(f"picture-of-table-{kind}/{place}", _with_picture(spoil, arguments, table=True))
    paths = {"outside": "../../nowhere.png", "device": "/dev/zero", "folder": "/", **NAMES}
    for number, (kind, path) in enumerate(paths.items()):
        place, arguments = rotated(PICTURE_PLACES, number, 1)[0]
        add(f"path-{kind}/{place}", _with_path(path, arguments))
    for kind, spoil in GRIDS.items():
        add(f"grid-{kind}/bench", _with_grid(spoil))
    for number, (kind, spoil) in enumerate(CELLS.items()):
        add(f"cell-{kind}/report", _with_cell(spoil, ("page.html", "t.md", "t.csv", "t.tex", "t.json")[number % 5]))
    scored = ["evaluate", "M/text", "--data", "M/texts.csv", "--attack", "ATTACK"]
    stressed = [
        "stress",
        "M/text",
        "--victim",
        "M/text",
        "--clean",
        "M/texts.csv",
        "--attack",
        "ATTACK",
        "--out",
        "out",
    ]
    for number, (kind, spoil) in enumerate(ATTACKS.items()):
        add(
            f"attack-{kind}/{('evaluate', 'stress')[number % 2]}",
            _with_attack("word", spoil, (scored, stressed)[number % 2]),
        )
    for kind, spoil in SIGNED_IMAGE.items():
        arguments = ["evaluate", "M/images", "--data", "M/pictures", "--attack", "ATTACK"]
        add(f"signed-{kind}/evaluate", _with_attack("badnets", spoil, arguments))
    for kind, encode in RECORDS.items():
        add(f"record-{kind}/evaluate", _with_record(encode))
    for kind, (origin, given) in OPTIONS.items():
        arguments = (TEXT_PLACES if origin == "text" else IMAGE_PLACES)["evaluate"]
        add(f"option-{kind}/evaluate", on_directory(origin, lambda model: None, [*arguments, *given]))
    for kind, build in _harmless("").items():
        add(f"harmless-{kind}", build, harmless=True)
    made += _on_consoles()
    import second_round
    import third_round

    for later in (second_round, third_round):
        hostile, harmless = later.cases()
        made += [Case(name, build) for name, build in hostile.items()]
        made += [Case(f"harmless-{name}", build, harmless=True) for name, build in harmless.items()]
    found = {case.name: case for case in made}
    assert len(found) == len(made)
    return found


CONSOLES = ("ascii", "cp1252", "cp932", "utf-16")
FOREIGN = "größer – 猫 😀"


def _on_consoles() -> list[Case]:
    """Names that a console cannot show: in a sentence of each kind of place, in scores, in what purify prints."""
    column = _write(json.dumps({FOREIGN: "good", "label": 0}) + "\n")
    named = with_fields("config.json", id2label={"0": "bad", "1": FOREIGN}, label2id=None)
    rows = f"text,label\ngood,{FOREIGN.upper()}\nbad,bad\n"
    made = []
    for number, console in enumerate(CONSOLES):
        hostile = {
            "column": on_file("", f"{FOREIGN}.jsonl", column, list(DATA_PLACES.values())[number]),
            "model": lambda place, material: ["evaluate", place / FOREIGN, "--data", material / "texts.csv"],
            "label": _with_rows(named, f"text,label\ngood,{FOREIGN}!\n", TEXT_PLACES["evaluate"]),
            "option": lambda place, material: ["evaluate", material / "text", "--data", FOREIGN, f"--{FOREIGN}", "1"],
        }
        harmless = {
            "evaluate": _with_rows(named, rows, TEXT_PLACES["evaluate"]),
            "json": _with_rows(named, rows, [*TEXT_PLACES["evaluate"], "--json"]),
            "purify": _with_rows(named, rows, [*TEXT_PLACES["purify"], "--data", "M/texts.csv"]),
        }
        made += [Case(f"console-{console}-{kind}", build, console=console) for kind, build in hostile.items()]
        made += [
            Case(f"harmless-console-{console}-{kind}", build, harmless=True, console=console)
            for kind, build in harmless.items()
        ]
    return made


def _with_rows(spoil: Spoil, rows: str, arguments: list[Any]) -> Build:
    """A model and a table of its own in the place of the texts of the material."""

    def build(place: Path, material: Path) -> list[Any]:
        (place / f"{FOREIGN}.csv").write_text(rows, encoding="utf-8")
        path = place / f"{FOREIGN}.csv"
        given = list(arguments)
        given[given.index("M/texts.csv")] = path
        return on_directory("text", spoil, given)(place, material)

    return build


def _own_arguments() -> list[Any]:
    return ["evaluate", "MODEL", "--factory", "M/factory.py:make", "--data", "M/pictures"]


def _irregular_factory(spoil: Spoil) -> Build:
    def build(place: Path, material: Path) -> list[Any]:
        spoil(place / "own.py")
        return filled(OWN_PLACES["evaluate"], material, MODEL=material / "weights.pt", FACTORY=f"{place}/own.py:make")

    return build


def _only_pickle(spoil: Spoil) -> Spoil:
    def spoiled(model: Path) -> None:
        (model / "model.safetensors").unlink()
        spoil(model / "pytorch_model.bin")

    return spoiled


def _asking(model: Path) -> None:
    """A type without a tokenizer of its own, and one that the directory brings along: transformers would ask."""
    (model / "own.py").write_text(EVIL)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Tokenizer"})
    )


if __name__ == "__main__":
    print(len(cases()), sum(case.harmless for case in cases().values()))
    sys.exit(0)
