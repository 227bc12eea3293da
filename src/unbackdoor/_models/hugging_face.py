"""Hugging Face directories: their files checked before transformers sees them, and the encoder that belongs to them."""

import inspect
import logging
import math
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor, nn

from unbackdoor._data.texts import TextEncoder
from unbackdoor._errors import UnbackdoorError, few, printable
from unbackdoor._inputs import COMPANION, CONFIG, MEBIBYTE, check_file, exists, read_json, reading, silent_rust
from unbackdoor._models.building import Extent, bounded, check_config
from unbackdoor._models.calling import embeddings
from unbackdoor._models.matching import matched
from unbackdoor._models.untrusted_weights import (
    check_finite,
    check_fit,
    check_safetensors,
    foreign,
    lacking,
    read_weights,
    renamed,
)

logger = logging.getLogger("unbackdoor")

# What the Hub gives out that is of no use here: weights for other programs, logs, pictures, and code that is not run.
_UNWANTED = (
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.gguf", "*.tflite", "*.pb", "*.pt", "*.pth", "*.ckpt"),
    *("*.pkl", "*.npz", "*.zip", "*.tar*", "*.png", "*.jpg", "*.gif", "*.csv", "*.parquet", "*tfevents*", "*/*"),
)

# How the files of a training begin that are no weights, though they end as these do.
_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")

# Buffers that older versions of transformers wrote, and that a model makes for itself.
_BUFFERS = {
    *("position_ids", "token_type_ids", "masked_bias", "attn_mask", "relative_position_index", "relative_coords_table"),
    *("inv_freq", "num_batches_tracked"),
}


def directory_of(source: str | Path, option: str) -> Path:
    """A Hugging Face directory, or the local copy of a Hub model.

    Args:
        source: path or Hub name.
        option: that named it.

    Raises:
        UnbackdoorError: it is empty or a file, or see `hub_directory`.
    """
    if not str(source):  # which Path would take for the current directory
        raise UnbackdoorError(f"{option} must be a Hugging Face directory or Hub name, got an empty name.")
    path = Path(source)
    if path.is_file():
        raise UnbackdoorError(f"{option} must be a Hugging Face directory or Hub name, got the file {path}.")
    return path if path.is_dir() else hub_directory(str(source))


def hub_directory(name: str, trust_remote_code: bool = False) -> Path:
    """The local copy of a Hub model, fetched where it is not there yet.

    Raises:
        UnbackdoorError: there is no such model, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UnbackdoorError(f"{name} does not exist, and is no name that the Hub could know. Check it.") from None
    try:
        return Path(snapshot_download(name, ignore_patterns=[*_UNWANTED, *["*.py"] * (not trust_remote_code)]))
    except (OSError, RuntimeError, ValueError) as problem:
        reason = str(problem).strip().split("\n")[0][:150].rstrip(".")
        answered = isinstance(problem, HfHubHTTPError) and problem.response is not None
        way_out = (
            "Check the name; a private model needs a login (hf auth login)."
            if answered
            else "Check the name; without a network, fetch the model elsewhere and give its directory."
        )
        raise UnbackdoorError(
            f"{name} is neither a directory here nor a model that the Hub gives out ({reason}). {way_out}"
        ) from None


def classifier(path: Path, trust_remote_code: bool = False) -> Any:
    """The image or text classifier of a directory, in eval mode.

    Raises:
        UnbackdoorError: anything about its files that does not fit.
    """
    config, files = checked_files(path)
    _check_task(path, config)
    kind = "ImageClassification" if modality_of(config) == "images" else "SequenceClassification"
    model, report = _loaded(path, f"AutoModelFor{kind}", files, trust_remote_code)
    shapes = sorted((entry[0], entry[1], entry[2]) for entry in report["mismatched_keys"])
    absent = set(report["missing_keys"]) - {entry[0] for entry in shapes}
    absent -= {name for name in absent if name.endswith("num_batches_tracked")}  # which older files lack
    extra = set(report["unexpected_keys"])
    if absent and extra and (again := _renamed(model, path, files)) is not None:
        model, extra = again
        absent = set()
    if absent and not shapes and not any(str(each).endswith(kind) for each in config.get("architectures") or ["?"]):
        raise UnbackdoorError(
            f"{path} holds a pre-trained model without a classifier ({few(sorted(absent))} missing). It serves as "
            "--base; MODEL must be fine-tuned for a task."
        )
    unused = set() if absent or shapes else _unused(model, extra)
    check_fit(str(path), type(model).__name__, sorted(absent), sorted(extra - unused), shapes)
    unused = {name for name in unused if name.split(".")[-1] not in _BUFFERS}
    if unused:
        logger.info(
            "%s: %s tensor(s) that the classifier does not use are left out (%s).",
            path,
            len(unused),
            few(sorted(unused)),
        )
    _name_classes(path, model, config)
    check_finite(model.state_dict(), str(path))
    return model.eval()


def _name_classes(path: Path, model: Any, config: dict[str, Any]) -> None:
    """Give a model the class names that its config has in label2id alone, and say where the two tables differ."""
    try:
        told = {int(number): str(name) for name, number in config["label2id"].items()}
    except (KeyError, AttributeError, TypeError, ValueError):  # there is none, or it is no table
        return
    used = {int(number): str(name) for number, name in model.config.id2label.items()}
    if sorted(told) != list(range(model.config.num_labels)) or told == used or _nameless(told):
        return
    if _nameless(used):
        model.config.id2label, model.config.label2id = told, {name: number for number, name in told.items()}
        return
    number = min(number for number in told if told[number] != used.get(number))
    logger.warning(
        "%s/config.json calls class %d %s in id2label and %s in label2id; id2label is followed.",
        path,
        number,
        printable(used.get(number)),
        printable(told[number]),
    )


def _nameless(names: dict[int, str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in names.items())


def _check_task(path: Path, config: dict[str, Any]) -> None:
    """Refuse a model of another task, whose head would fit a classifier by its names and shapes."""
    import transformers

    known = set(transformers.__all__)  # which imports none of them, and takes no time as dir() does
    for name in map(str, _architectures(config)):
        _, found, task = name.rpartition("For")
        if found and name in known and not task.startswith(("ImageClassif", "SequenceClassif")):
            words = re.sub("(?<=[a-z])(?=[A-Z])", " ", task).lower()
            raise UnbackdoorError(
                f"{path} is a model for {words} ({name}); a classifier of whole images or texts is expected. Its body "
                "may serve as --base."
            )


def _architectures(config: dict[str, Any]) -> list[Any]:
    named = config.get("architectures")
    return named if isinstance(named, list) else []


def _unused(model: Any, extra: Collection[str]) -> set[str]:
    """Stored tensors that a complete classifier has no use for, as transformers has not either when it loads it.

    Buffers of older versions; poolers and mask tokens, which belong to pre-training; and heads of other tasks, which
    stand beside the body under a name that no part of the classifier has.
    """
    own = {name.partition(".")[0] for name in model.state_dict()}
    has_body = model.base_model_prefix in own
    return {
        name
        for name in extra
        if (parts := name.split("."))[-1] in _BUFFERS | {"mask_token"}
        or "pooler" in parts
        or (has_body and parts[0] not in own)
    }


def _renamed(model: Any, path: Path, files: list[Path]) -> tuple[Any, set[str]] | None:
    """The model with the weights of a directory whose names a wrapper changed, and the names that are left over.

    None where that is not what is wrong with the names.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # By the names that files have: those of the modules are others in newer versions, as of ViT.
    own = revert_weight_conversion(model, model.state_dict())
    weights = renamed(own, _stored(path, files), str(path))
    if lacking(own, weights) or any(own[name].shape != weights[name].shape for name in own.keys() & weights.keys()):
        return None
    with quiet_transformers():
        again = type(model).from_pretrained(None, config=model.config, state_dict=weights)
    return again, weights.keys() - own.keys()


def _stored(path: Path, files: list[Path]) -> dict[str, Tensor]:
    """All tensors of a checked directory."""
    parts = [load_file(file) for file in files] or [read_weights(file) for file in pickles(path)]
    return {name: tensor for part in parts for name, tensor in part.items()}


def body(path: Path, trust_remote_code: bool = False) -> Any:
    """The pre-trained model of a directory without any head, in eval mode: what a suspect may have come from.

    Weights that its files lack come from transformers' random state, not from any training: their names are the
    model's `absent_weights`. Those that the files only have under another prefix are not among them.

    Raises:
        UnbackdoorError: anything about its files that does not fit.
    """
    _, files = checked_files(path)
    model, report = _loaded(path, "AutoModel", files, trust_remote_code)
    check_fit(str(path), type(model).__name__, [], [], sorted(tuple(entry) for entry in report["mismatched_keys"]))
    absent = set(report["missing_keys"])
    if absent:
        absent -= _found_elsewhere(model, absent, path, files)
    model.absent_weights = frozenset(absent)
    check_finite(model.state_dict(), str(path))
    return model.eval()


def _found_elsewhere(model: Any, absent: set[str], path: Path, files: list[Path]) -> set[str]:
    """Fill weights that transformers did not find from the same files, by another prefix; which ones were filled."""
    stored = _stored(path, files)
    wanted = model.state_dict()
    shapes = ({name: tensor.shape for name, tensor in each.items()} for each in (wanted, stored))
    try:
        pairs = matched(*shapes, least=0).pairs
    except UnbackdoorError:  # no exchange of prefixes is the one
        return set()
    found = {name: stored[pairs[name]].to(wanted[name].dtype) for name in absent & pairs.keys()}
    model.load_state_dict(found, strict=False)
    return set(found)


def fresh_classifier(path: Path, classes: list[str]) -> Any:
    """A pre-trained model with a new head for some classes; its weights come from torch's random state."""
    config, files = checked_files(path)
    kind = "ImageClassification" if modality_of(config) == "images" else "SequenceClassification"
    names = dict(enumerate(classes))
    changes = {"num_labels": len(classes), "id2label": names, "label2id": {name: at for at, name in names.items()}}
    model, _ = _loaded(path, f"AutoModelFor{kind}", files, False, **changes)
    return model.eval()


def modality_of(config: dict[str, Any]) -> Literal["images", "text"]:
    """What a model of this config takes, by its class or, for a headless one, by its sizes."""
    named = " ".join(map(str, _architectures(config)))
    if "SequenceClassification" in named:  # those that read pages, too, and so have an image_size
        return "text"
    if "ImageClassification" in named or "image_size" in config or "num_channels" in config:
        return "images"
    return "text" if "vocab_size" in config else "images"


def text_encoder(path: Path, model: Any, max_length: int | None = None, trust_remote_code: bool = False) -> TextEncoder:
    """The encoder of a text model's directory.

    Args:
        path: the directory.
        model: loaded from it; where the tokenizer has no padding token, its config is told which one is used.
        max_length: tokens that the model is to read; None takes the most that it can.
        trust_remote_code: run Python files that come with the tokenizer.

    Raises:
        UnbackdoorError: there is no tokenizer, or it does not fit the model.
    """
    rows = embeddings(model).num_embeddings
    tokenizer = tokenizer_of(path, trust_remote_code, rows)
    check_rows(path, len(tokenizer), rows)
    _check_ids(path, tokenizer, rows)
    padding = getattr(model.config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)  # decoders find the last token of a text by it
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UnbackdoorError(f"{path} has a tokenizer without a padding token. Set one, and save it again.")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.model_type != "xlnet":  # which answers at the last place, and counts positions from there
        tokenizer.padding_side = "right"  # else a short text begins at another position among longer ones than alone
    model.config.pad_token_id = tokenizer.pad_token_id
    taken = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    most = int(min(_longest(path, tokenizer), *_positions(model), 2**20))
    recorded = path / "record.json"
    entries = (read_json(recorded).get("encode") or {}) if recorded.exists() else {}
    columns = entries.get("columns") if isinstance(entries, dict) else None
    if max_length is not None and max_length > most:
        raise UnbackdoorError(f"--max-length must be at most {most:,}, which the model can read, got {max_length:,}.")
    before = entries.get("max_length") if isinstance(entries, dict) else None
    if max_length is not None and max_length < 4:
        raise UnbackdoorError(f"--max-length must be at least 4, got {max_length}.")
    chosen = max_length or (before if isinstance(before, int) and 4 <= before <= most else most)
    known = tuple(columns) if columns in (["text"], ["text_a", "text_b"]) else None
    return TextEncoder(tokenizer=tokenizer, max_length=chosen, columns=known)


def _longest(path: Path, tokenizer: Any) -> float:
    """The tokens that a tokenizer allows; where nothing is written, transformers has a number beyond all models."""
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise UnbackdoorError(
            f"{path}/tokenizer_config.json must have model_max_length as a number of at least 1, got "
            f"{printable(repr(longest))}. Correct it, or take it out."
        )
    return longest


def check_rows(path: Path, tokens: int, rows: int) -> None:
    """Refuse a tokenizer with more tokens than the model's embeddings have rows."""
    if tokens > rows:
        raise UnbackdoorError(
            f"{path} has a tokenizer of {tokens:,} tokens, but its model has embeddings for {rows:,}. Take the "
            "tokenizer that it was trained with."
        )


def _check_ids(path: Path, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer whose tokens have numbers beyond the embeddings; their count alone does not tell."""
    with reading(f"the tokenizer of {path}"), silent_rust():
        token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", 0))
        # The numbers of the tokens around a text need not stand in the vocabulary.
        around = max(tokenizer("a", "a")["input_ids"], default=0)
        tokenizer("\u4e9c \U0001f9ff zqxj")  # which fails where there is no token for unknown words
    if max(largest, around) >= rows:
        token = token if largest >= around else "one that it puts around a text"
        raise UnbackdoorError(
            f"{path} has a tokenizer whose token {printable(token)} is number {max(largest, around):,}, but its model "
            f"has embeddings for {rows:,}. Take the tokenizer that it was trained with."
        )


def tokenizer_of(path: Path, trust_remote_code: bool = False, rows: int | None = None) -> Any:
    """The tokenizer of a directory.

    Args:
        path: the directory.
        trust_remote_code: run Python files that come with it.
        rows: of the model's embeddings, which its files are held against; None where that is not known.

    Raises:
        UnbackdoorError: there is none that transformers can load, or it has no vocabulary.
    """
    import transformers

    _check_beside(path)
    _check_tokenizer_files(path, rows)
    with quiet_transformers(), silent_rust(), reading(f"the tokenizer of {path}"):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as problem:  # a config decides what runs, so it may be wrong in any way
            if "trust_remote_code" in str(problem):
                raise _own_code(path) from None
            reason = printable(str(problem).strip().split("\n")[0], 200).rstrip(".") or type(problem).__name__
            raise UnbackdoorError(
                f"{path} has no tokenizer that transformers can load ({reason}). Fetch tokenizer.json and "
                "tokenizer_config.json, too."
            ) from None
    vocabularies = set(getattr(tokenizer, "vocab_files_names", {}).values()) | {"tokenizer.json"}
    if not any((path / name).exists() for name in vocabularies):  # transformers makes an empty one then
        raise UnbackdoorError(
            f"{path} has a tokenizer without a vocabulary (none of {', '.join(sorted(vocabularies))}). Fetch "
            "tokenizer.json and tokenizer_config.json, too."
        )
    return tokenizer


def _positions(model: Any) -> Iterator[int]:
    """What bounds the length of a text: the positions that the model knows."""
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(model.config, name, None)
        if isinstance(limit, int) and limit > 0:
            yield limit
    for name, layer in model.named_modules():
        if "position" in name and isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            yield layer.num_embeddings - layer.padding_idx - 1  # RoBERTa counts from after the padding token's


def checked_files(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The config of a directory and its safetensors files (none where it has a pickle), looked at but not loaded.

    Raises:
        UnbackdoorError: a file is missing, broken, or asks to run code.
    """
    _check_directory(path)
    _check_beside(path)
    config = read_json(path / "config.json", CONFIG)
    if not config.get("model_type"):
        if "architecture" in config and ("pretrained_cfg" in config or "num_features" in config):
            made = f"timm.create_model({printable(config['architecture'])!r}, num_classes=...)"
            raise UnbackdoorError(
                f"{path} is a model of timm. Give its weights file as MODEL, and --factory FILE.py:FUNCTION whose "
                f"function returns {made}."
            )
        raise UnbackdoorError(
            f"{path}/config.json does not say which kind of model it is (model_type). Fetch it again."
        )
    kernel = next(_kernels(config), None)
    if kernel is not None:
        raise UnbackdoorError(
            f"{path} asks to run the code {printable(kernel)}; it was not loaded. Remove it from config.json."
        )
    quantised = next(_quantised(config), None)
    if quantised is not None:
        raise UnbackdoorError(
            f"{path} is quantised ({printable(quantised)}), and such weights cannot be tuned or mixed. Give the model "
            "as it was before, in float32, float16 or bfloat16."
        )
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        kind = str(config["problem_type"]).replace("_", " ").replace("multi label", "multi-label")
        raise UnbackdoorError(f"{path} is a model for {kind}; only single-label classifiers are supported.")
    index = path / "model.safetensors.index.json"
    listed: Any = {}
    if (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    elif index.exists():
        files = _shards(path, index)
        listed = read_json(index)["weight_map"]
    elif stored := pickles(path):
        for file in stored:
            read_weights(file)
        files = []
    else:
        others = sorted(file.name for file in path.iterdir() if foreign(file)) or ["?"]
        program = foreign(Path(others[0]))
        if program is not None:
            raise UnbackdoorError(
                f"{path} has its weights for {program} only ({printable(others[0])}); model.safetensors is expected. "
                "Convert it, or ask its owner for PyTorch weights."
            )
        endings = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # the likeliest first
        named = [file.name for file in sorted(path.iterdir(), key=lambda file: file.suffix != endings[0])]
        named = [name for name in named if name.endswith(endings) and not name.startswith(_TRAINING)]
        if named:
            right = "model.safetensors" if named[0].endswith(endings[0]) else "pytorch_model.bin"
            raise UnbackdoorError(
                f"{path} has no model.safetensors, but {printable(named[0])}. If it holds the model's weights, rename "
                f"it to {right}."
            )
        raise UnbackdoorError(f"{path} has no model.safetensors (nor pytorch_model.bin). Fetch it again.")
    held = {file.name: check_safetensors(file) for file in files}
    check_config(path, config, _extent(path, files))
    for name, part in listed.items():
        if name not in held[part]:
            raise UnbackdoorError(
                f"{path} lists {printable(name)} in the shard {printable(part)}, which lacks it. Fetch it again."
            )
    return config, files


def _check_directory(path: Path) -> None:
    """Refuse what is no model directory itself, and name the one that is meant.

    Raises:
        UnbackdoorError: an adapter, or no config.json.
    """
    if (path / "adapter_config.json").exists():  # which names another model, elsewhere, for transformers to load
        raise UnbackdoorError(
            f"{path} holds an adapter (adapter_config.json), not a whole model. Merge it into its base model "
            "(merge_and_unload of peft) and give the result."
        )
    if (path / "config.json").exists():
        return
    trained = [folder for folder in path.glob("checkpoint-*") if (folder / "config.json").exists()]
    if trained:  # what a Trainer leaves
        last = max(trained, key=lambda folder: (len(folder.name), folder.name))
        raise UnbackdoorError(f"{path} has no config.json, but its checkpoints have. Give one of them, as {last}.")
    cached = sorted(
        (folder for folder in path.glob("snapshots/*") if (folder / "config.json").exists()),
        key=lambda folder: folder.stat().st_mtime,
    )
    if cached:  # the folder that the Hub's cache has for a model
        raise UnbackdoorError(
            f"{path} is a folder of the Hub's cache, which keeps models under snapshots. Give one of them, as "
            f"{cached[-1]}."
        )
    inside = sorted(folder for folder in path.glob("*") if (folder / "config.json").is_file())
    if inside:  # what unpacking an archive leaves
        raise UnbackdoorError(f"{path} has no config.json, but {inside[0]} has. Give that.")
    raise UnbackdoorError(
        f"{path} has no config.json. It must be a Hugging Face directory; for other models give --factory."
    )


def pickles(path: Path) -> list[Path]:
    """The pickled weights files of a directory, one or several with an index; empty where it has none.

    Raises:
        UnbackdoorError: the index names files that are not there.
    """
    whole, index = path / "pytorch_model.bin", path / "pytorch_model.bin.index.json"
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else []
    return _shards(path, index)


def _shards(path: Path, index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        UnbackdoorError: it does not say which, or one is not there.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(part, str) for part in listed.values()):
        raise UnbackdoorError(f"{index} does not say which file holds which tensor. Fetch it again.")
    files = [path / part for part in sorted(set(listed.values()))]
    for file in files:
        if file.parent != path or not exists(file):
            raise UnbackdoorError(f"{path} lists the shard {printable(file.name)}, which is missing. Fetch it again.")
    return files


def _loaded(path: Path, auto: str, files: list[Path], trust_remote_code: bool, **changes: Any) -> tuple[Any, Any]:
    """A model and transformers' report of what did not fit, by the name of the Auto class."""
    import transformers

    from unbackdoor import archs

    archs.register()
    with quiet_transformers(), reading(path), bounded(path, _extent(path, files)):
        try:
            return getattr(transformers, auto).from_pretrained(  # type: ignore[no-any-return]
                str(path),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=bool(files),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                **changes,
            )
        except UnbackdoorError:
            raise
        except Exception as problem:  # a config decides what runs, so it may be wrong in any way
            if "trust_remote_code" in str(problem):
                raise _own_code(path) from None
            reason = printable(str(problem).strip().split("\n")[0], 200).rstrip(".") or type(problem).__name__
            kinds = {"AutoModelForImageClassification": "an image classifier", "AutoModel": "a model"}
            raise UnbackdoorError(
                f"{path} is not {kinds.get(auto, 'a text classifier')} that transformers can load ({reason}). Check "
                "its config.json."
            ) from None


# Files of tokenizers whose length grows with the number of tokens.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def _check_tokenizer_files(path: Path, rows: int | None) -> None:
    """Refuse tokenizer files that are many times too long for the model, point elsewhere, or make texts explode."""
    most = COMPANION if rows is None else min(COMPANION, 8 * MEBIBYTE + 2000 * rows)  # 200 bytes a token are many
    for name in (*_VOCABULARIES, *(file.name for file in path.glob("*.model"))):
        if exists(path / name) and not (path / name).is_dir():
            check_file(path / name, most)
    settings = path / "tokenizer_config.json"
    if exists(settings):
        for key, given in read_json(settings, most).items():
            if key.endswith("_file") and isinstance(given, str) and exists(given) and Path(given).parent != path:
                raise UnbackdoorError(
                    f"{settings} names {printable(given)} as its {printable(key)}, a file outside of {path}. Take that "
                    "entry out."
                )
    if exists(path / "tokenizer.json"):
        growth = math.prod(_growths(read_json(path / "tokenizer.json", most).get("normalizer")))
        if growth > 1000:
            raise UnbackdoorError(
                f"{path}/tokenizer.json makes a text up to {growth:,} times as long before it cuts it into tokens. "
                "Take the tokenizer that the model was trained with."
            )


def _growths(normalizer: Any) -> Iterator[int]:
    """By how much each step of a tokenizer's normalizer may lengthen a text."""
    if isinstance(normalizer, list):
        for step in normalizer:
            yield from _growths(step)
    elif isinstance(normalizer, dict):
        for key, entry in normalizer.items():
            if key in ("content", "prepend") and isinstance(entry, str):
                yield max(1, len(entry))
            else:
                yield from _growths(entry)


def _own_code(path: Path) -> UnbackdoorError:
    return UnbackdoorError(
        f"{path} needs Python code of its own, which is not run. Pass --trust-remote-code if you trust it."
    )


def _extent(path: Path, files: list[Path]) -> Extent:
    """How much the weights of a directory hold; of pickles, only their length is known."""
    if not files:
        return Extent(sum(check_file(file).stat().st_size for file in pickles(path)), 10_000, None)
    shapes = [shape for file in files for shape in check_safetensors(file).values()]
    widest = max((side for shape in shapes for side in shape), default=0)
    return Extent(sum(file.stat().st_size for file in files), len(shapes), widest)


def _check_beside(path: Path) -> None:
    """Refuse a directory in which a file that is read or copied with the model is no regular file, or is endless."""
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".txt", ".model", ".py", ".jinja", ".bin", ".safetensors") and not file.is_dir():
            weights = file.suffix in (".bin", ".safetensors")
            check_file(file, None if weights else COMPANION)


def _kernels(config: Any) -> Iterator[str]:
    """Code on the Hub that a config names as an implementation, at any depth: these names have a slash."""
    for key, entry in config.items() if isinstance(config, dict) else ():
        implementations = entry.values() if isinstance(entry, dict) else [entry]
        if "implementation" in key:
            yield from (str(each) for each in implementations if "/" in str(each))
        yield from _kernels(entry)


def _quantised(config: Any) -> Iterator[str]:
    """How a config says that its weights are quantised, at any depth; transformers imports other packages for these."""
    for key, entry in config.items() if isinstance(config, dict) else ():
        if key in ("quantization_config", "compression_config") and entry is not None:
            method = entry.get("quant_method") if isinstance(entry, dict) else None
            yield str(method or key)
        yield from _quantised(entry)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bar and report off stderr, and put its settings back."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a model is told once, in a sentence
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
