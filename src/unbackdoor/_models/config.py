"""The config.json of a model: whether the model is supported, and whether its weights can have the sizes given."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.building import Extent

# Each of these is the length of a loop over layers that have their own weights or share them.
_LOOPS = re.compile(
    r"(layers?|blocks?|depths?|stages?|repeats?|hops?|iterations?|steps)$|((?<!samples)_per_|_layers?_|attends)"
)
_PIECES = re.compile(r"window|chunk|bucket|block|head|group|expert|stride|kernel|dilation|patch|conv")
_FREE = re.compile(r"theta|length|scal|factor|base|token|seed|max_position")  # numbers that no size follows from


# Models of an image tower and a text tower, by model_type.
IMAGE_TEXT = {"clip": "CLIPModel", "vision-text-dual-encoder": "VisionTextDualEncoderModel"}


def check_supported(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that runs its own code, that cannot be tuned, or that is not a single-label classifier.

    Raises:
        UnbackdoorError: says which of these it is, and what to do.
    """
    kind = config.get("model_type")
    if not kind or kind == "timm_wrapper":  # which transformers gives to a model of timm that it wraps
        if "architecture" in config and (kind or "pretrained_cfg" in config or "num_features" in config):
            call = f"timm.create_model({printable(config['architecture'])!r}, num_classes=...)"
            raise UnbackdoorError(
                f"{path} is a model of timm. Give its weights file as `source`, and `factory=FILE.py:FUNCTION` whose "
                f"function returns {call}."
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
            "as it was before quantisation, in float32, float16 or bfloat16."
        )
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        kind = str(config["problem_type"]).replace("_", " ").replace("multi label", "multi-label")
        raise UnbackdoorError(f"{path} is a model for {kind}; only single-label classifiers are supported.")


def check_config(path: Path, config: Mapping[str, Any], extent: Extent) -> None:
    """Refuse a config whose fields are of the wrong kind, or whose sizes the weights cannot have.

    Raises:
        UnbackdoorError: names the field.
    """
    where = path / "config.json"
    _check_kinds(where, config)
    classes = max(1000, 2**20 if extent.widest is None else extent.widest)
    for key, number in _whole_numbers(config):
        most = 2**31
        if key in ("num_labels", "_num_labels"):
            most = classes
        elif _LOOPS.search(key):
            most = max(1024, extent.tensors)
        elif _PIECES.search(key):
            most = 2**16
        elif _FREE.search(key):
            most = 2**63
        if abs(number) > most or (number < 1 and key == "num_labels"):
            raise UnbackdoorError(
                f"{where} asks for {printable(key)} = {printable(f'{number:,}')}, but the weights next to it have "
                f"{extent.tensors:,} tensors in {extent.bytes:,} bytes; at most {most:,} is possible. Fetch both again."
            )
    names = config.get("id2label")
    if isinstance(names, dict) and len(names) > classes:
        raise UnbackdoorError(
            f"{where} names {len(names):,} classes, but no tensor next to it has more than {classes:,} rows. Fetch "
            "both again."
        )


def _check_kinds(where: Path, config: Mapping[str, Any]) -> None:
    """Refuse fields of a kind that this program or transformers cannot read."""

    def refuse(field: str, allowed: str) -> None:
        content = printable(repr(config[field]))
        raise UnbackdoorError(f"{where} must have {field} as {allowed}, got {content}. Fetch it again.")

    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        refuse("architectures", "a list of names")
    names = config.get("id2label")
    if names is not None and (
        not isinstance(names, dict) or any(isinstance(name, dict | list) for name in names.values())
    ):
        refuse("id2label", "names by number")


def _whole_numbers(config: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yields the whole numbers of a config at any depth, with the names of their fields."""
    if isinstance(config, dict):
        for name, entry in config.items():
            if name not in ("id2label", "label2id", "task_specific_params"):
                yield from _whole_numbers(entry, name)
    elif isinstance(config, list):
        for entry in config:
            yield from _whole_numbers(entry, key)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield key, config


def architectures_of(config: Mapping[str, Any]) -> list[Any]:
    """Returns the names of the model classes in a config."""
    classes = config.get("architectures")
    return classes if isinstance(classes, list) else []


# The parts of a whole language model, the first words of its weights' names; those of a body alone have other names.
_PARTS = {"model", "transformer", "gpt_neox", "backbone", "lm_head", "embed_out"}


def with_class(config: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """Returns a config with the class of a causal language model if it names no class and the weights are of one.

    Args:
        config: the content of config.json.
        names: names of the weights; empty if they are not known.
    """
    from transformers.models.auto import modeling_auto

    kind = config.get("model_type")
    cls = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if cls is None or kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or architectures_of(config) or not names:
        return config
    whole = {name.partition(".")[0] for name in names} <= _PARTS
    return {**config, "architectures": [cls]} if whole else config


def modality_of(config: Mapping[str, Any]) -> Literal["images", "text", "conversations", "image-text"]:
    """Returns the modality of a model with this config, by its class or, without a head, by its sizes."""
    classes = " ".join(map(str, architectures_of(config)))
    if "ForCausalLM" in classes or "LMHeadModel" in classes:
        return "conversations"
    if classes in ("", *IMAGE_TEXT.values()) and config.get("model_type") in IMAGE_TEXT:
        return "image-text"
    if "SequenceClassification" in classes:  # also those that read pages, which have an image_size
        return "text"
    if "ImageClassification" in classes or "image_size" in config or "num_channels" in config:
        return "images"
    return "text" if "vocab_size" in config else "images"


def _kernels(config: Any) -> Iterator[str]:
    """Returns code on the Hub that a config names as an implementation, at any depth: such names have a slash."""
    for key, entry in config.items() if isinstance(config, dict) else ():
        implementations = entry.values() if isinstance(entry, dict) else [entry]
        if "implementation" in key:
            yield from (str(each) for each in implementations if "/" in str(each))
        yield from _kernels(entry)


def _quantised(config: Any) -> Iterator[str]:
    """Returns the quantisation of the weights in a config, at any depth; transformers imports other packages for it."""
    for key, entry in config.items() if isinstance(config, dict) else ():
        if key in ("quantization_config", "compression_config") and entry is not None:
            method = entry.get("quant_method") if isinstance(entry, dict) else None
            yield str(method or key)
        yield from _quantised(entry)
