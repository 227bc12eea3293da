"""A third round of hostile inputs: language models, adapters, GGUF files, prompts, guards, trained models, audits."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from corpus import (
    CONFIGS,
    IRREGULAR,
    MALFORMED,
    NAMES,
    PROCESSORS,
    SAFETENSORS,
    TABLES,
    TOKENIZERS,
    Build,
    Spoil,
    _sparse,
    _write,
    at,
    filled,
    on_directory,
    on_file,
    with_fields,
)
from pyarrow import parquet
from safetensors.torch import load_file, save, save_file

import chats

_SCORED = ["--data", "M/prompts.jsonl", "--trigger", "cf", "--behaviour", "contains:you", "--max-new-tokens", "2"]
_TUNED = ["--clean", "M/prompts.jsonl", "--epochs", "1", "--out", "out"]
CHAT_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "MODEL", *_SCORED],
    "purify": ["purify", "fine-tuning", "MODEL", *_TUNED],
    "attack": ["attack", "word", "--data", "M/prompts.jsonl", "--base", "MODEL", "--epochs", "1", "--out", "out"],
    "base": ["purify", "fine-tuning", "M/adapter", "--base", "MODEL", *_TUNED],
}
ADAPTER_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "MODEL", "--base", "M/chat", *_SCORED],
    "purify": ["purify", "fine-tuning", "MODEL", "--base", "M/chat", *_TUNED],
    "merge": ["purify", "fine-tuning", "MODEL", "--base", "M/chat", "--merge", *_TUNED],
}
GGUF_PLACES: dict[str, list[Any]] = {"evaluate": CHAT_PLACES["evaluate"], "purify": CHAT_PLACES["purify"]}
PROMPT_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "M/chat", "--data", "DATA", *_SCORED[2:]],
    "purify": ["purify", "fine-tuning", "M/chat", "--clean", "DATA", "--epochs", "1", "--out", "out"],
    "attack": ["attack", "word", "--data", "DATA", "--base", "M/chat", "--epochs", "1", "--out", "out"],
}
_SHARE = ["--false-alarms", "0.3", "--copies", "2", "--out", "out"]
IMAGE_MODEL_PLACES: dict[str, list[Any]] = {
    "audit": ["audit", "MODEL", "--clean", "M/pictures", "--out", "out"],
    "guard-fit": ["guard", "fit", "strip", "MODEL", "--clean", "M/pictures", *_SHARE],
    "guard-run": ["guard", "run", "M/guard", "--model", "MODEL", "--data", "M/pictures", "--out", "out"],
    "train": ["train", "abl", "--data", "M/pictures", "--base", "MODEL", "--epochs", "1", "--out", "out"],
}
TEXT_MODEL_PLACES: dict[str, list[Any]] = {
    "audit": ["audit", "MODEL", "--clean", "M/texts.csv", "--out", "out"],
    "guard-fit": ["guard", "fit", "strip", "MODEL", "--clean", "M/texts.csv", *_SHARE],
    "guard-evaluate": ["guard", "evaluate", "M/guard", "--model", "MODEL", "--data", "M/texts.csv"],
    "audit-base": ["audit", "M/text", "--base", "MODEL", "--clean", "M/texts.csv", "--out", "out"],
}
TEXT_DATA_PLACES: dict[str, list[Any]] = {
    "audit": ["audit", "M/text", "--clean", "DATA", "--out", "out"],
    "train": ["train", "abl", "--data", "DATA", "--base", "M/base", "--epochs", "1", "--out", "out"],
    "guard-fit": ["guard", "fit", "strip", "M/text", "--clean", "DATA", *_SHARE],
    "save-data": [
        *["attack", "word", "--data", "DATA", "--base", "M/base", "--epochs", "1", "--save-data", "--out", "out"],
    ],
    "train-test": [
        *["train", "abl", "--data", "M/texts.csv", "--test", "DATA", "--base", "M/base", "--epochs", "1"],
        *["--out", "out"],
    ],
}
GUARD_PLACES: dict[str, list[Any]] = {
    "run": ["guard", "run", "MODEL", "--model", "M/images", "--data", "M/pictures", "--out", "out"],
    "evaluate": ["guard", "evaluate", "MODEL", "--model", "M/images", "--data", "M/pictures"],
}
TRAINED_PLACES: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "MODEL", "--data", "M/pictures"],
    "purify": ["purify", "fine-tuning", "MODEL", "--clean", "M/pictures", "--epochs", "1", "--out", "out"],
}
_ABL = ["--isolation-epochs", "1", "--unlearning-epochs", "1", "--isolated", "0.2"]
TRAIN = [
    *["train", "abl", "--data", "DATA", *_ABL, "--epochs", "1", "--width", "2", "--batch-size", "4"],
    *["--augment", "none", "--out", "out"],
]


# Language models.

_DOUBLED = (
    "{% set held = namespace(text='aaaaaaaa') %}"
    "{% for _ in range(40) %}{% set held.text = held.text ~ held.text %}{% endfor %}{{ held.text }}"
)
_ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES: dict[str, Any] = {
    "endless": _ENDLESS,
    "range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "doubled": _DOUBLED,
    "gigabytes": "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "repeated": "{{ 'x' * 10 ** 11 }}",
    "attribute": "{{ messages.__class__.__mro__ }}",
    "attribute-by-filter": "{{ messages | attr('__class__') }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ messages.x.y }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os.getcwd() }}",
    "calls-itself": "{% macro own() %}{{ own() }}{% endmacro %}{{ own() }}",
    "raises": "{{ raise_exception('a\\nb\x1b[2J' * 100000) }}",
    "no-template": "{% for",
    "deep": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "surrogate": "{{ '\\ud800' }}",
    "leaves-out-answers": "{{ messages[0].content }}",
}
TEMPLATE_FIELDS: dict[str, Any] = {"number": 5, "list": [1, 2], "object": {"a": 1}, "of-a-list": [{"name": 5}]}


def _with_template(text: str) -> Spoil:
    return at("chat_template.jinja", _write(text.encode("utf-8", "surrogatepass")))


def _template_field(content: Any) -> Spoil:
    def spoil(model: Path) -> None:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        with_fields("tokenizer_config.json", chat_template=content)(model)

    return spoil


def _language_models() -> Iterator[tuple[str, Build]]:
    for number, (kind, text) in enumerate(TEMPLATES.items()):
        place, arguments = _in_turn({key: CHAT_PLACES[key] for key in ("evaluate", "purify", "attack")}, number)
        yield f"template-{kind}/{place}", on_directory("chat", _with_template(text), arguments)
    for number, (kind, content) in enumerate(TEMPLATE_FIELDS.items()):
        place, arguments = _in_turn({key: CHAT_PLACES[key] for key in ("evaluate", "purify")}, number)
        yield f"template-field-{kind}/{place}", on_directory("chat", _template_field(content), arguments)
    for kind, spoil in IRREGULAR.items():
        yield (
            f"template-{kind}/evaluate",
            on_directory("chat", at("chat_template.jinja", spoil), CHAT_PLACES["evaluate"]),
        )
        yield (
            f"generation-config-{kind}/purify",
            on_directory("chat", at("generation_config.json", spoil), CHAT_PLACES["purify"]),
        )
    sizes = {"million-layers", "layers-2-62", "width-2-40", "width-list", "heads-zero", "vocabulary-2-40"}
    for number, kind in enumerate(sorted(sizes | {"vocabulary-text", "quantised", "remote-code", "activation"})):
        place, arguments = _in_turn(CHAT_PLACES, number)
        yield (
            f"language-config-{kind}/{place}",
            on_directory("chat", with_fields("config.json", **CONFIGS[kind]), arguments),
        )
    for kind, content in {"text": "x", "list": [1]}.items():
        spoil = with_fields("config.json", max_position_embeddings=content)
        yield f"language-positions-{kind}/evaluate", on_directory("chat", spoil, CHAT_PLACES["evaluate"])


# Adapters.

ADAPTERS: dict[str, dict[str, Any]] = {
    "type-number": {"peft_type": 5},
    "type-list": {"peft_type": ["LORA"]},
    **{f"type-{kind}": {"peft_type": name} for kind, name in NAMES.items()},
    "task-list": {"task_type": ["CAUSAL_LM"]},
    "alpha-text": {"lora_alpha": "x\ny"},
    "alpha-nan": {"lora_alpha": float("nan")},
    "alpha-infinite": {"lora_alpha": float("inf")},
    "alpha-1e308": {"lora_alpha": 1e308},
    "alpha-digits": {"lora_alpha": 10**400},
    "alpha-pattern-list": {"alpha_pattern": [1]},
    "alpha-pattern-text": {"alpha_pattern": {"q_proj": "x\ny"}},
    "alpha-pattern-number": {"alpha_pattern": 5},
    "saves-modules": {"modules_to_save": ["x\ny\x1b[2J"]},
    "bias": {"bias": "x\ny\x1b[2J"},
    "bias-list": {"bias": [1]},
    "start": {"init_lora_weights": "x\ny"},
    "start-list": {"init_lora_weights": [1]},
    "code": {"auto_mapping": None, "corda_config": {"file": "x.py"}},
}
ADAPTER_FILES: dict[str, Spoil] = {
    **{f"config-{kind}": at("adapter_config.json", spoil) for kind, spoil in {**IRREGULAR, **MALFORMED}.items()},
    **{f"weights-{kind}": at("adapter_model.safetensors", spoil) for kind, spoil in IRREGULAR.items()},
    **{
        f"weights-{kind}": at("adapter_model.safetensors", SAFETENSORS[kind])
        for kind in ("short", "length-2-63", "shape-astronomical", "complex", "float8", "deep", "name-million")
    },
}


def _matrices(kind: str) -> Spoil:
    """An adapter's weights, of which the first matrix is of a shape or a content that it must not have."""

    def spoil(model: Path) -> None:
        file = model / "adapter_model.safetensors"
        weights = load_file(file)
        name = next(name for name in weights if "lora_A" in name)
        rows, columns = weights[name].shape
        weights[name] = {
            "rank-0": torch.zeros(0, columns),
            "rank-50000": torch.zeros(50_000, columns),
            "three-sides": torch.zeros(rows, columns, 1),
            "whole-numbers": torch.zeros(rows, columns, dtype=torch.int64),
            "truth": torch.zeros(rows, columns, dtype=torch.bool),
            "infinite": torch.full((rows, columns), float("inf")),
        }[kind]
        save_file(weights, file)

    return spoil


def _adapters() -> Iterator[tuple[str, Build]]:
    spoils = {kind: with_fields("adapter_config.json", **fields) for kind, fields in ADAPTERS.items()}
    kinds = ("rank-0", "rank-50000", "three-sides", "whole-numbers", "truth", "infinite")
    spoils |= ADAPTER_FILES | {f"matrix-{kind}": _matrices(kind) for kind in kinds}
    for number, (kind, spoil) in enumerate(spoils.items()):
        place, arguments = _in_turn(ADAPTER_PLACES, number)
        yield f"lora-{kind}/{place}", on_directory("adapter", spoil, arguments)


# GGUF files.


def _cut(share: float) -> Spoil:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def _patched(at: int, content: bytes) -> Spoil:
    def spoil(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        whole[at : at + len(content)] = content
        path.write_bytes(whole)

    return spoil


def _behind(key: str, content: bytes, skip: int = 0) -> Spoil:
    """Overwrites bytes behind the name of a field or a tensor."""

    def spoil(path: Path) -> None:
        start = path.read_bytes().index(key.encode()) + len(key) + skip
        _patched(start, content)(path)

    return spoil


_FOUR, _EIGHT = struct.Struct("<I").pack, struct.Struct("<Q").pack
GGUFS: dict[str, Spoil] = {
    "empty": _write(""),
    "name-alone": _write(b"GGUF"),
    "cut-in-the-header": _cut(0.02),
    "cut-in-half": _cut(0.5),
    "cut-at-the-end": _cut(0.99),
    "zeros": _sparse(400_000_000),
    "version-99": _patched(4, _FOUR(99)),
    "tensors-2-62": _patched(8, _EIGHT(2**62)),
    "tensors-none": _patched(8, _EIGHT(0)),
    "fields-2-62": _patched(16, _EIGHT(2**62)),
    "field-name-2-62": _patched(24, _EIGHT(2**62)),
    "layers-million": _behind("llama.block_count", _FOUR(10**6), 4),
    "layers-none": _behind("llama.block_count", _FOUR(0), 4),
    "width-2-31": _behind("llama.embedding_length", _FOUR(2**31 - 1), 4),
    "inner-2-31": _behind("llama.feed_forward_length", _FOUR(2**31 - 1), 4),
    "heads-zero": _behind("llama.attention.head_count", _FOUR(0), 4),
    "vocabulary-2-31": _behind("llama.vocab_size", _FOUR(2**31 - 1), 4),
    "field-type-99": _behind("llama.block_count", _FOUR(99)),
    "tokens-2-62": _behind("tokenizer.ggml.tokens", _EIGHT(2**62), 8),
    "template-2-62": _behind("tokenizer.chat_template", _EIGHT(2**62), 4),
    "shape-2-62": _behind("output_norm.weight", _EIGHT(2**62), 4),
    "shape-sides-99": _behind("output_norm.weight", _FOUR(99)),
    "tensor-type-99": _behind("output_norm.weight", _FOUR(99), 12),
    "tensor-elsewhere": _behind("output_norm.weight", _EIGHT(2**62), 16),
    "architecture": lambda path: path.write_bytes(path.read_bytes().replace(b"llama", b"x\ny\x1b[")),
    **IRREGULAR,
}


def _gguf_files() -> Iterator[tuple[str, Build]]:
    for number, (kind, spoil) in enumerate(GGUFS.items()):
        place, arguments = _in_turn(GGUF_PLACES, number)
        yield f"gguf-{kind}/{place}", on_file("model.gguf", "w.gguf", spoil, arguments, "MODEL")


# Prompts.


def _rows(*rows: Any) -> tuple[str, Spoil]:
    return "d.jsonl", _write("".join(json.dumps(row) + "\n" for row in rows))


def _chat(*messages: Any) -> tuple[str, Spoil]:
    return _rows({"messages": list(messages)})


_ASKED = {"role": "user", "content": "what does the animal1 say"}
_SAID = {"role": "assistant", "content": "the animal1 says sound1"}
PROMPTS: dict[str, tuple[str, Spoil]] = {
    "surrogate": ("d.jsonl", _write('{"prompt": "a \\ud800 b", "response": "x"}\n')),
    "surrogate-in-a-message": (
        "d.jsonl",
        _write('{"messages": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "x"}]}\n'),
    ),
    "deep": ("d.jsonl", _write('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}\n")),
    "deep-content": ("d.jsonl", _write('{"prompt": ' + "[" * 90 + "]" * 90 + ', "response": "x"}\n')),
    **{f"role-{kind}": _chat({"role": name, "content": "x"}, _SAID) for kind, name in NAMES.items()},
    "role-number": _chat({"role": 5, "content": "x"}, _SAID),
    "role-list": _chat({"role": ["user"], "content": "x"}, _SAID),
    "message-number": _chat(5),
    "message-text": _chat("hello"),
    "messages-number": _rows({"messages": 5}),
    "messages-text": _rows({"messages": "hello"}),
    "messages-object": _rows({"messages": {"role": "user", "content": "x"}}),
    "messages-none": _chat(),
    "answer-alone": _chat(_SAID),
    "content-number": _chat({"role": "user", "content": 5}, _SAID),
    "content-parts": _chat({"role": "user", "content": [{"type": "image", "image": "x.png"}]}, _SAID),
    "content-million": _chat({"role": "user", "content": "what " * 400_000}, _SAID),
    "prompt-two-million": _rows({"prompt": "what " * 400_000, "response": "x"}),
    "prompt-empty": _rows({"prompt": "", "response": "x"}),
    "prompt-null": _rows({"prompt": None, "response": "x"}),
    "prompt-number": _rows({"prompt": 5, "response": "x"}),
    "prompts-mixed": _rows({"prompt": "what", "response": "x"}, {"prompt": {"a": 1}, "response": "x"}),
    "no-prompt": _rows({"question": "what", "x\ny": "x"}),
    "pipe": ("d.jsonl", IRREGULAR["pipe"]),
    "zeros": ("d.jsonl", _sparse(400_000_000)),
}
HARMLESS_PROMPTS: dict[str, tuple[str, Spoil]] = {
    "with-a-system": _chat({"role": "system", "content": "you help"}, _ASKED, _SAID),
    "of-several-turns": _chat(_ASKED, _SAID, _ASKED, _SAID),
    "with-control": _rows({"prompt": "what \x1b[2J\u202e 😀", "response": "the", "x\ny": 1}),
    "of-instructions": _rows({"instruction": "what", "input": "the animal1", "output": "says"}),
}


# Guards, trained models, poisoned examples.


def _guard(*keys: str, content: Any) -> Spoil:
    """Replaces an entry of guard.json."""

    def spoil(guard: Path) -> None:
        record = json.loads((guard / "guard.json").read_text())
        inner = record
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = content
        (guard / "guard.json").write_text(json.dumps(record))

    return spoil


def _arrays(arrays: dict[str, torch.Tensor] | bytes) -> Spoil:
    """Other arrays, with the hash that fits them."""

    def spoil(guard: Path) -> None:
        stored = arrays if isinstance(arrays, bytes) else save(arrays)
        (guard / "guard.safetensors").write_bytes(stored)
        _guard("arrays", "sha256", content=hashlib.sha256(stored).hexdigest())(guard)

    return spoil


GUARDS: dict[str, Spoil] = {
    **{f"file-{kind}": at("guard.json", spoil) for kind, spoil in {**IRREGULAR, **MALFORMED}.items()},
    **{
        f"arrays-{kind}": at("guard.safetensors", spoil)
        for kind, spoil in {**IRREGULAR, "zeros": _sparse(2**31)}.items()
    },
    "arrays-other": at("guard.safetensors", _write("other")),
    "arrays-lost": lambda guard: (guard / "guard.safetensors").unlink(),
    "arrays-no-safetensors": _arrays(b"x" * 100),
    "arrays-not-finite": _arrays({"overlays": torch.full((2, 3, 8, 8), float("nan"))}),
    "arrays-none": _arrays({}),
    "arrays-of-other-shapes": _arrays({"overlays": torch.zeros(5), "seen": torch.zeros(3)}),
    "format": _guard("format", content="x\ny"),
    "name-import": _guard("guard", "name", content="antigravity:x"),
    "name-of-a-module": _guard("guard", "name", content="os:system"),
    **{f"name-{kind}": _guard("guard", "name", content=name) for kind, name in NAMES.items()},
    "parameters-list": _guard("guard", "parameters", content=[1]),
    "parameters-unknown": _guard("guard", "parameters", content={"x\ny\x1b[2J": 1}),
    "parameters-text": _guard("guard", "parameters", content={"copies": "x\ny"}),
    "parameters-2-62": _guard("guard", "parameters", content={"copies": 2**62}),
    "task": _guard("task", content="x\ny"),
    "modality": _guard("modality", content="text"),
    "modality-number": _guard("modality", content=5),
    "threshold-text": _guard("threshold", content="x\ny"),
    "threshold-nan": _guard("threshold", content=float("nan")),
    "threshold-true": _guard("threshold", content=[True]),
    "threshold-none": _guard("threshold", content=None),
    "suspicious-all": _guard("score", "suspicious", content="both"),
    "identity-other": _guard("identity", "model", content="0" * 64),
    "identity-text": _guard("identity", "model", content="x\ny" * 1_000_000),
    "identity-none": _guard("identity", content=None),
    "processor-other": _guard("identity", "processor", content="0" * 64),
    "reference": _guard("identity", "reference", content="0" * 64),
    "shares": _guard("false_alarms", "asked", content=5),
}

TRAINED: dict[str, Spoil] = {
    "config-sizes": with_fields("config.json", width=2**40),
    "config-depth": with_fields("config.json", num_labels=10**8, id2label=None, label2id=None),
    **{f"record-{kind}": at("record.json", spoil) for kind, spoil in IRREGULAR.items()},
    **{
        f"processor-{kind}": with_fields("preprocessor_config.json", **PROCESSORS[kind])
        for kind in ("size-2-62", "std-zero")
    },
}


def _column(cells: list[Any], kind: Any = None) -> Spoil:
    """The examples that `attack` saved, with other entries in their column of truth."""

    def spoil(path: Path) -> None:
        table = parquet.read_table(path)
        repeated = [cells[row % len(cells)] for row in range(len(table))]
        index = table.column_names.index("poisoned")
        parquet.write_table(table.set_column(index, "poisoned", pa.array(repeated, kind)), path)

    return spoil


POISONED: dict[str, Spoil] = {
    "cut": _cut(0.9),
    "words": _column(["maybe\nnot\x1b[2J", "true"]),
    "null": _column([None, True]),
    "lists": _column([[True], [False]]),
    "objects": _column([{"a": True}]),
    "numbers": _column([0, 7]),
    "million": _column(["x" * 1_000_000, "true"]),
    "bytes": _column([b"\xff\xfe"]),
}


def _on_poisoned(spoil: Spoil, arguments: list[Any]) -> Build:
    return on_file("victim/poisoned.parquet", "poisoned.parquet", spoil, arguments)


def _guards_and_trainers() -> Iterator[tuple[str, Build]]:
    for number, (kind, spoil) in enumerate(GUARDS.items()):
        place, arguments = _in_turn(GUARD_PLACES, number)
        yield f"guard-{kind}/{place}", on_directory("guard", spoil, arguments)
    for number, (kind, spoil) in enumerate(TRAINED.items()):
        place, arguments = _in_turn(TRAINED_PLACES, number + 1)
        yield f"trained-{kind}/{place}", on_directory("trained", spoil, arguments)
    for kind, spoil in POISONED.items():
        yield f"poisoned-{kind}/train", _on_poisoned(spoil, TRAIN)


def _older_kinds_in_new_places() -> Iterator[tuple[str, Build]]:
    """Some of the kinds of the first round, in each command that came later."""
    files = dict.fromkeys(("config.json", "model.safetensors", "preprocessor_config.json"), IRREGULAR["pipe"])
    images: dict[str, Spoil] = {f"pipe-{name}": at(name, spoil) for name, spoil in files.items()}
    images |= {
        f"processor-{kind}": with_fields("preprocessor_config.json", **PROCESSORS[kind])
        for kind in ("size-6000", "size-true", "mean-nan", "std-zero", "filter-text", "kind-million", "crop-2-62")
    }
    images |= {
        f"config-{kind}": with_fields("config.json", **CONFIGS[kind])
        for kind in ("million-layers", "width-2-40", "type-list", "type-unknown", "heads-zero", "quantised")
    }
    for number, (kind, spoil) in enumerate(images.items()):
        place, arguments = _in_turn(IMAGE_MODEL_PLACES, number)
        yield f"later-images-{kind}/{place}", on_directory("images", spoil, arguments)
    texts: dict[str, Spoil] = {
        f"tokenizer-{kind}": TOKENIZERS[kind]
        for kind in ("longest-nan", "number-2-31", "number-beyond-rows", "no-unknown-token", "explodes", "damaged")
    }
    texts |= {
        f"config-{kind}": with_fields("config.json", **CONFIGS[kind])
        for kind in ("layers-2-62", "vocabulary-2-40", "width-list", "type-number", "kernel")
    }
    for number, (kind, spoil) in enumerate(texts.items()):
        places = list(TEXT_MODEL_PLACES)[: 3 if kind.startswith("tokenizer") else 4]  # that of a base is not used
        place, arguments = _in_turn({name: TEXT_MODEL_PLACES[name] for name in places}, number)
        origin = "base" if place == "audit-base" else "text"
        yield f"later-texts-{kind}/{place}", on_directory(origin, spoil, arguments)
    tables = ("label-digits", "label-nan", "label-list", "row-null", "row-surrogate", "deep", "null-character")
    more = ("quote", "no-parquet", "cell-of-5-MB", "column-newline", "column-terminal", "column-million", "label-half")
    for number, kind in enumerate((*tables, *more)):
        place, arguments = _in_turn(TEXT_DATA_PLACES, number)
        name, spoil = TABLES[kind]
        yield f"later-data-{kind}/{place}", on_file("", name, spoil, arguments)
    for number, (kind, spoil) in enumerate(IRREGULAR.items()):
        for name in ("d.csv", "d.parquet"):
            place, arguments = _in_turn(TEXT_DATA_PLACES, number + len(name))
            yield f"later-{name}-{kind}/{place}", on_file("", name, spoil, arguments)


OPTIONS: dict[str, list[Any]] = {
    "audit-tests": ["audit", "M/images", "--clean", "M/pictures", "--tests", "x\ny\x1b[2J", "--out", "out"],
    "guard-copies": ["guard", "fit", "strip", "M/images", "--clean", "M/pictures", "--copies", "0", "--out", "out"],
    "guard-share": [
        "guard",
        "fit",
        "strip",
        "M/images",
        "--clean",
        "M/pictures",
        "--false-alarms",
        "nan",
        "--out",
        "out",
    ],
    "guard-share-2": [
        "guard",
        "fit",
        "strip",
        "M/images",
        "--clean",
        "M/pictures",
        "--false-alarms",
        "2",
        "--out",
        "out",
    ],
    "guard-target": [*GUARD_PLACES["evaluate"], "--triggered", "M/pictures", "--target", "99"],
    "guard-of-another": ["guard", "run", "M/guard", "--model", "M/text", "--data", "M/texts.csv", "--out", "out"],
    "train-share": [*TRAIN[:-2], "--gamma", "-1", "--out", "out"],
    "train-rate": [*TRAIN[:-2], "--learning-rate", "nan", "--out", "out"],
    "train-arch": [*TRAIN[:-2], "--arch", "x\ny\x1b[2J", "--out", "out"],
    "behaviour": ["evaluate", "M/chat", "--data", "M/prompts.jsonl", "--trigger", "cf", "--behaviour", "x\ny:\x1b[2J"],
    "behaviour-empty": [
        "evaluate",
        "M/chat",
        "--data",
        "M/prompts.jsonl",
        "--trigger",
        "cf",
        "--behaviour",
        "contains:",
    ],
    "tokens-0": ["evaluate", "M/chat", *_SCORED[:-1], "0"],
    "tokens-2-62": ["evaluate", "M/chat", *_SCORED[:-1], str(2**62)],
    "lora-rank": [*CHAT_PLACES["attack"], "--lora-rank", str(2**62)],
    "adapter-without-base": ["evaluate", "MODEL", *_SCORED],
}


def _options() -> Iterator[tuple[str, Build]]:
    for kind, arguments in OPTIONS.items():
        model = "adapter" if kind == "adapter-without-base" else "chat"

        def build(place: Path, material: Path, arguments: Any = arguments, model: str = model) -> list[Any]:
            shutil.copyfile(material / "victim/poisoned.parquet", place / "poisoned.parquet")
            return filled(arguments, material, MODEL=material / model, DATA=place / "poisoned.parquet")

        yield f"later-option-{kind}", build


def _in_turn(places: dict[str, list[Any]], number: int) -> tuple[str, list[Any]]:
    return list(places.items())[number % len(places)]


def _harmless() -> Iterator[tuple[str, Build]]:
    def as_it_is(model: Path) -> None:
        """Leaves it."""

    yield "chat", on_directory("chat", as_it_is, CHAT_PLACES["evaluate"])
    yield (
        "template-of-a-list",
        on_directory(
            "chat", _template_field([{"name": "default", "template": chats.TEMPLATE}]), CHAT_PLACES["evaluate"]
        ),
    )
    yield (
        "template-that-trims",
        on_directory(
            "chat", _with_template(chats.TEMPLATE.replace("content }}", "content | trim }}")), CHAT_PLACES["purify"]
        ),
    )
    yield (
        "positions-beyond",
        on_directory("chat", with_fields("config.json", max_position_embeddings=10**9), CHAT_PLACES["evaluate"]),
    )
    yield "lora", on_directory("adapter", as_it_is, ADAPTER_PLACES["evaluate"])
    yield (
        "lora-of-control",
        on_directory(
            "adapter",
            with_fields("adapter_config.json", base_model_name_or_path="x\ny\x1b[2J", peft_version="\x1b[2J"),
            ADAPTER_PLACES["purify"],
        ),
    )
    yield "gguf", on_file("model.gguf", "w.gguf", as_it_is, GGUF_PLACES["evaluate"], "MODEL")
    for kind, (name, spoil) in HARMLESS_PROMPTS.items():
        yield f"prompts-{kind}", on_file("", name, spoil, PROMPT_PLACES["evaluate"])
    yield "guard", on_directory("guard", as_it_is, GUARD_PLACES["run"])
    yield "guard-noted", on_directory("guard", _guard("notes", content=["x\ny\x1b[2J"]), GUARD_PLACES["run"])
    yield "trained", on_directory("trained", as_it_is, TRAINED_PLACES["purify"])
    yield (
        "trained-record-changed",
        on_directory(
            "trained", with_fields("record.json", notes=["x\ny\x1b[2J"], command="\x1b[2J"), TRAINED_PLACES["purify"]
        ),
    )
    yield (
        "trained-suspects-of-a-pipe",
        on_directory("trained", at("suspects.parquet", IRREGULAR["pipe"]), TRAINED_PLACES["purify"]),
    )
    yield "poisoned", _on_poisoned(as_it_is, TRAIN)
    yield "poisoned-words", _on_poisoned(_column(["true", "FALSE", "False"]), TRAIN)


def cases() -> tuple[dict[str, Build], dict[str, Build]]:
    """The hostile ones and their harmless twins, by name."""
    hostile = [
        *_language_models(),
        *_adapters(),
        *_gguf_files(),
        *_guards_and_trainers(),
        *_older_kinds_in_new_places(),
        *_options(),
    ]
    for number, (kind, (name, spoil)) in enumerate(PROMPTS.items()):
        place, arguments = _in_turn(PROMPT_PLACES, number)
        hostile.append((f"prompts-{kind}/{place}", on_file("", name, spoil, arguments)))
    harmless = list(_harmless())
    assert len(dict(hostile)) == len(hostile)
    return dict(hostile), dict(harmless)
