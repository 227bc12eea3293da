"""Models of images and texts from a checked directory, and their features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.class_prompts import ClassPrompts
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.pair_encoder import PairEncoder
from unbackdoor._data.texts import Texts, Tokens
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.arithmetic import Arithmetic, choose
from unbackdoor._models.calling import device_of, evaluating, logits
from unbackdoor._models.hugging_face import pretrained
from unbackdoor._models.image_encoder import image_encoder
from unbackdoor._models.recorded import recorded_encode
from unbackdoor._models.tokenizer import text_encoder
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._models.weight_files import WeightFiles
from unbackdoor._models.weight_names import BUFFERS, check_fit

HEAD = "visual_projection"
"""The name of the layer that brings images into the space that they share with texts."""

_PARTS = ("vision_model", "text_model", HEAD, "text_projection", "logit_scale")


def image_text_model(
    path: Path, config: Mapping[str, Any], weights: WeightFiles, trust_remote_code: bool = False
) -> Any:
    """Loads the model of images and texts of a checked directory, in eval mode.

    Args:
        path: path of the directory.
        config: the content of its config.json.
        weights: its weights.
        trust_remote_code: run Python files that come with the model.

    Raises:
        UnbackdoorError: one of the two towers asks for code or cannot be one, or the weights do not fit the model or
            are not all finite.
    """
    for tower in ("vision_config", "text_config"):
        part = config.get(tower)
        if not isinstance(part, dict):
            raise UnbackdoorError(f"{path}/config.json must have {tower} with the fields of that part. Fetch it again.")
        if "auto_map" in part:  # transformers would ask on the terminal whether to run it
            raise UnbackdoorError(
                f"{path}/config.json asks for Python code of its own in {tower}, which is not run. Take a model of "
                "transformers' own kinds."
            )
    model, report = pretrained("AutoModel", path, weights, trust_remote_code)
    shapes = sorted((entry[0], entry[1], entry[2]) for entry in report["mismatched_keys"])
    absent = set(report["missing_keys"]) - {entry[0] for entry in shapes}
    extra = {name for name in report["unexpected_keys"] if name.split(".")[-1] not in BUFFERS}
    check_fit(str(path), type(model).__name__, sorted(absent), sorted(extra), shapes)
    lacking = next((part for part in _PARTS if not hasattr(model, part)), None)
    if lacking is not None:
        raise UnbackdoorError(
            f"{path} is a {type(model).__name__} without {lacking}; CLIPModel and VisionTextDualEncoderModel of "
            "transformers are supported. Take one of them."
        )
    check_finite(model.state_dict(), str(path))
    return model.eval()


def pair_encoder(
    path: Path,
    model: Any,
    *,
    changes: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    prompts: "str | Path | ClassPrompts | None" = None,
    trust_remote_code: bool = False,
) -> PairEncoder:
    """Returns the encoder of the directory of a model of images and texts.

    Args:
        path: the directory.
        model: loaded from it.
        changes: fields of the image encoder that replace those of the processor.
        max_length: tokens that are read of a text; None takes the number in its record, else the model's most.
        prompts: see `ClassPrompts.of`; None takes those of its record, else "a photo of a {}.".
        trust_remote_code: run Python files that come with the tokenizer.

    Raises:
        UnbackdoorError: the tokenizer or processor is missing, or does not fit the model; or there are no such prompts.
    """
    images = image_encoder(path, model.config.vision_config, changes or {}, trust_remote_code)
    texts = text_encoder(path, model.text_model, max_length, trust_remote_code)
    recorded = recorded_encode(path)
    before = recorded.get("prompts") if isinstance(recorded, dict) else None
    chosen = ClassPrompts.recorded(before) if prompts is None else ClassPrompts.of(prompts)
    return PairEncoder(images=images, texts=texts, prompts=chosen)


def name_classes_(model: Any, classes: list[str]) -> None:
    """Write the names of the classes into a model's config, by which later data is numbered."""
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: label for label, name in enumerate(classes)}


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Returns the features of images in the space that they share with texts, of length 1, (batch, width)."""
    return _normalised(model.get_image_features(pixel_values=pixels))


def text_features(model: Any, tokens: Tokens) -> Tensor:
    """Returns the features of texts in the space that they share with images, of length 1, (batch, width)."""
    return _normalised(model.get_text_features(**tokens))


def _normalised(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    normalised: Tensor = features / features.norm(dim=1, keepdim=True)
    return normalised


@torch.no_grad()
def all_image_features(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Returns the features of all images of a data set in eval mode, (n, width), on the CPU, float32 or better."""
    rows = []
    size = arithmetic.evaluation_batch
    with evaluating(model), arithmetic.placed(model) as placed:
        for start in range(0, len(data), size):
            pixels = data.pair_encoder.images(data.pairs.images[start : start + size].on(arithmetic.device))
            with arithmetic.autocast():
                laid = arithmetic.lay(pixels)
                assert isinstance(laid, Tensor)
                rows.append(_wide(image_features(placed, laid)).cpu())
    return torch.cat(rows)


@torch.no_grad()
def all_text_features(model: nn.Module, encode: PairEncoder, texts: Texts, arithmetic: Arithmetic) -> Tensor:
    """Returns the features of texts in eval mode, (n, width), on the CPU, float32 or better."""
    rows = []
    size = arithmetic.evaluation_batch
    with evaluating(model), arithmetic.placed(model) as placed:
        for start in range(0, len(texts), size):
            tokens = encode.texts(texts[start : start + size]).to(arithmetic.device)
            with arithmetic.autocast():
                rows.append(_wide(text_features(placed, tokens)).cpu())
    return torch.cat(rows)


def _wide(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


@torch.no_grad()
def check_image_text(model: nn.Module, data: Dataset) -> None:
    """Refuse a model that cannot score the pairs of a data set, or answers with values that are not finite.

    Raises:
        UnbackdoorError: says why.
    """
    owner = type(model).__name__
    lacking = next((part for part in _PARTS if not hasattr(model, part)), None)
    if lacking is not None:
        raise UnbackdoorError(
            f"{owner} has no {lacking}; a model of images and texts of transformers is expected (CLIPModel or "
            "VisionTextDualEncoderModel). Take one, or data for a classifier."
        )
    arithmetic = choose(model, device_of(model))
    try:
        with evaluating(model), arithmetic.placed(model) as placed:
            scores = logits(placed, arithmetic.lay(data.inputs(slice(2)).to(arithmetic.device)))
    except UnbackdoorError:
        raise
    except Exception as problem:  # towers that do not fit the data fail in any way
        reason = printable(" ".join(str(problem)[:1000].split()), 200) or type(problem).__name__
        raise UnbackdoorError(
            f"{owner} cannot take the pairs of {data.name} ({reason}). Take the processor and the tokenizer that it "
            "was trained with."
        ) from None
    if not torch.isfinite(scores).all():
        raise UnbackdoorError(
            f"{owner} answers with values that are not finite, although its weights are. Check its config.json."
        )
