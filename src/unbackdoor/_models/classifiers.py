"""The models of a checked directory: a classifier, its body alone, or its body with a new head."""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from unbackdoor._errors import UnbackdoorError, few, printable
from unbackdoor._models.config import IMAGE_TEXT, architectures_of, modality_of
from unbackdoor._models.hugging_face import pretrained, quiet_transformers
from unbackdoor._models.matching import matched
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._models.weight_files import WeightFiles
from unbackdoor._models.weight_names import BUFFERS, check_fit, lacking, renamed

logger = logging.getLogger("unbackdoor")


def classifier(path: Path, config: Mapping[str, Any], weights: WeightFiles, trust_remote_code: bool) -> Any:
    """Loads the image or text classifier of a checked directory, in eval mode.

    Args:
        path: path of the directory.
        config: the content of its config.json.
        weights: its weights.
        trust_remote_code: run Python files that come with the model.

    Raises:
        UnbackdoorError: it is a model for another task, or the weights do not fit it or are not all finite.
    """
    _check_task(path, config)
    kind = _kind(config)
    model, report = pretrained(f"AutoModelFor{kind}", path, weights, trust_remote_code)
    shapes = sorted((entry[0], entry[1], entry[2]) for entry in report["mismatched_keys"])
    absent = set(report["missing_keys"]) - {entry[0] for entry in shapes}
    absent -= {name for name in absent if name.endswith("num_batches_tracked")}  # older files lack them
    extra = set(report["unexpected_keys"])
    if absent and extra and (renaming := _renamed(model, path, weights)) is not None:
        model, extra = renaming
        absent = set()
    if absent and not shapes and not any(str(each).endswith(kind) for each in config.get("architectures") or ["?"]):
        raise UnbackdoorError(
            f"{path} holds a pre-trained model without a classifier ({few(sorted(absent))} missing). Use it as "
            "`base`; `source` must be fine-tuned for a task."
        )
    _check_class_count(path, model, shapes)
    unused = set() if absent or shapes else _unused(model, extra)
    check_fit(str(path), type(model).__name__, sorted(absent), sorted(extra - unused), shapes)
    unused = {name for name in unused if name.split(".")[-1] not in BUFFERS}
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


def _check_class_count(path: Path, model: Any, shapes: Sequence[tuple[str, Any, Any]]) -> None:
    """Refuse one class, and a config of another number than the stored classifier has, if nothing else differs.

    Args:
        path: path of the directory.
        model: model that the config describes.
        shapes: names, stored shapes and shapes of the model of all tensors that differ.
    """
    classes = model.config.num_labels
    if classes == 1 and not shapes:
        raise UnbackdoorError(
            f"{path} has one output (a regression, or the score of a reranker or of a reward model); a classifier with "
            "at least 2 classes is expected. Take a model with a score for each class."
        )
    names = {name for name, _, _ in shapes}
    layers = {name.rpartition(".")[0] for name in names}
    whole = names == {name for name in model.state_dict() if name.rpartition(".")[0] in layers}
    of_heads = [own[:1] == (classes,) and own[1:] == stored[1:] for _, stored, own in shapes]
    stored_classes = {stored[0] for _, stored, _ in shapes} if whole and all(of_heads) else set()
    if len(stored_classes) == 1:
        raise UnbackdoorError(
            f"{path} has a classifier of {stored_classes.pop()} classes, but its config.json has {classes} (id2label, "
            "or num_labels). Correct config.json, or fetch both again."
        )


def body(path: Path, weights: WeightFiles, trust_remote_code: bool) -> Any:
    """Loads the pre-trained model of a checked directory without a head, in eval mode.

    Weights that its files lack come from the random state of transformers, not from any training: their names are the
    model's `absent_weights`. Those that the files only have under another prefix are not among them.

    Args:
        path: path of the directory.
        weights: its weights.
        trust_remote_code: run Python files that come with the model.

    Raises:
        UnbackdoorError: the weights do not fit it, or are not all finite.
    """
    model, report = pretrained("AutoModel", path, weights, trust_remote_code)
    check_fit(str(path), type(model).__name__, [], [], sorted(tuple(entry) for entry in report["mismatched_keys"]))
    absent = set(report["missing_keys"])
    if absent:
        absent -= _found_elsewhere(model, absent, weights)
    model.absent_weights = frozenset(absent)
    check_finite(model.state_dict(), str(path))
    return model.eval()


def fresh_classifier(path: Path, config: Mapping[str, Any], weights: WeightFiles, classes: list[str]) -> Any:
    """Loads a pre-trained model with a new head in eval mode; the head's weights come from torch's random state.

    Args:
        path: path of the directory.
        config: the content of its config.json.
        weights: its weights.
        classes: names of the classes.
    """
    names = dict(enumerate(classes))
    changes: dict[str, Any] = {"num_labels": len(classes), "id2label": names}
    changes["label2id"] = {name: at for at, name in names.items()}
    model, _ = pretrained(f"AutoModelFor{_kind(config)}", path, weights, False, **changes)
    return model.eval()


def _kind(config: Mapping[str, Any]) -> str:
    return "ImageClassification" if modality_of(config) == "images" else "SequenceClassification"


def _check_task(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model of another task, whose head would fit a classifier by its names and shapes."""
    import transformers

    towers = all(isinstance(config.get(part), dict) for part in ("vision_config", "text_config"))
    reading = next((str(name) for name in architectures_of(config) if "ConditionalGeneration" in str(name)), None)
    if towers and reading is not None:
        raise UnbackdoorError(
            f"{path} is a language model that reads images as well ({printable(reading)}); only those of text alone "
            "are supported. Save its language model by itself with transformers, as the causal language model of its "
            "text_config, and give that."
        )
    if towers and not any("Classification" in str(name) for name in architectures_of(config)):
        raise UnbackdoorError(
            f"{path} has a tower of images and one of texts ({printable(config['model_type'])}); of such models, "
            f"{' and '.join(IMAGE_TEXT.values())} of transformers are supported. Take one of them."
        )
    kind = str(config.get("model_type"))
    if kind.endswith(("_vision_model", "_text_model")) and kind in transformers.CONFIG_MAPPING:
        raise UnbackdoorError(
            f"{path} is one tower of a model of images and texts ({kind}), which answers with no classes. Give the "
            "whole model, or a classifier made from it."
        )
    known = set(transformers.__all__)  # imports none of them, and is faster than dir()
    for name in map(str, architectures_of(config)):
        _, separator, task = name.rpartition("For")
        if separator and name in known and not task.startswith(("ImageClassif", "SequenceClassif")):
            words = re.sub("(?<=[a-z])(?=[A-Z])", " ", task).lower()
            raise UnbackdoorError(
                f"{path} is a model for {words} ({name}); a classifier of whole images or texts is expected, or a "
                "causal language model. Its body can be used as `base`."
            )


def _renamed(model: Any, path: Path, weights: WeightFiles) -> tuple[Any, set[str]] | None:
    """Returns the model with weights whose names a wrapper changed, and the names that are left over.

    Returns None if the names differ for another reason.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # By the names in files: newer versions of transformers rename modules, those of ViT for example.
    own = revert_weight_conversion(model, model.state_dict())
    stored = renamed(own, weights.read(), str(path))
    if lacking(own, stored) or any(own[name].shape != stored[name].shape for name in own.keys() & stored.keys()):
        return None
    with quiet_transformers():
        again = type(model).from_pretrained(None, config=model.config, state_dict=stored)
    return again, stored.keys() - own.keys()


def _unused(model: Any, extra: Collection[str]) -> set[str]:
    """Returns stored tensors that a complete classifier does not use; transformers also leaves them out.

    Buffers of older versions; poolers and mask tokens, which belong to pre-training; and heads of other tasks, which
    lie next to the body under a name that no part of the classifier has.
    """
    own = {name.partition(".")[0] for name in model.state_dict()}
    has_body = model.base_model_prefix in own
    return {
        name
        for name in extra
        if (parts := name.split("."))[-1] in BUFFERS | {"mask_token"}
        or "pooler" in parts
        or (has_body and parts[0] not in own)
    }


def _name_classes(path: Path, model: Any, config: Mapping[str, Any]) -> None:
    """Give a model class names that are only in its config's label2id, and warn if the two tables differ."""
    names = model.config.id2label or {}  # PVT has none unless it is told
    by_id2label = {int(number): str(name) for number, name in names.items()}
    if sorted(by_id2label) != list(range(len(by_id2label))):
        logger.warning(
            "%s/config.json numbers its classes %s in id2label, but class scores count from 0, so its names are not "
            "used. Correct it there, or give labels as numbers from 0.",
            path,
            few(sorted(by_id2label)),
        )
        return
    try:
        by_label2id = {int(number): str(name) for name, number in config["label2id"].items()}
    except (KeyError, AttributeError, TypeError, ValueError):  # there is no label2id, or it is not a table
        return
    complete = sorted(by_label2id) == list(range(model.config.num_labels))
    if not complete or by_label2id == by_id2label or _nameless(by_label2id):
        return
    if _nameless(by_id2label):
        model.config.id2label = by_label2id
        model.config.label2id = {name: number for number, name in by_label2id.items()}
        return
    number = min(number for number in by_label2id if by_label2id[number] != by_id2label.get(number))
    logger.warning(
        "%s/config.json calls class %d %s in id2label and %s in label2id; id2label is followed.",
        path,
        number,
        printable(by_id2label.get(number)),
        printable(by_label2id[number]),
    )


def _nameless(names: dict[int, str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in names.items())


def _found_elsewhere(model: Any, absent: set[str], weights: WeightFiles) -> set[str]:
    """Fill weights that transformers did not find from the same files, by another prefix; returns their names."""
    stored = weights.read()
    own = model.state_dict()
    shapes = ({name: tensor.shape for name, tensor in each.items()} for each in (own, stored))
    try:
        pairs = matched(*shapes, least=0).pairs
    except UnbackdoorError:  # no exchange of prefixes fits
        return set()
    tensors = {name: stored[pairs[name]].to(own[name].dtype) for name in absent & pairs.keys()}
    model.load_state_dict(tensors, strict=False)
    return set(tensors)
