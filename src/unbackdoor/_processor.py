"""Hugging Face image processors: from their settings to an encoder that takes the same steps, and back."""

from typing import Any

from unbackdoor._errors import UnbackdoorError
from unbackdoor._images import ImageEncoder, Resample

# Pillow's numbers for filters, as they stand in preprocessor_config.json. Lanczos (1) has no counterpart in torch.
_FILTERS: dict[int, Resample] = {0: "nearest", 2: "bilinear", 3: "bicubic"}

_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": 224,
    "resample": 3,
}

# Image processors whose steps are resize, centre crop, rescale, normalise, in that order, with what a
# preprocessor_config.json of theirs means where it leaves a field out.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "Beit": {**_HALVES, "size": 224, "crop_size": 224, "resample": 3},
    "Bit": _CLIP,
    "CLIP": _CLIP,
    "ConvNext": {**_HALVES, "size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 224 / 256},
    "DeiT": {**_HALVES, "size": 256, "do_center_crop": True, "crop_size": 224, "resample": 3},
    "ViT": {**_HALVES, "size": 224, "resample": 2},
}

# For these a size of one number is the shorter edge; for the others it is the side of a square.
_BY_EDGE = {"Bit", "CLIP", "ConvNext"}


def encoder_of(preprocessor: dict[str, Any], channels: int | None, where: str) -> ImageEncoder:
    """The encoder that does what a Hugging Face `preprocessor_config.json` asks for.

    Args:
        preprocessor: its content; a field that is absent or null means the processor's own default.
        channels: of the model.
        where: named in messages.

    Raises:
        UnbackdoorError: the processor takes steps that are not known here, or its fields make no sense.
    """
    kind = str(preprocessor.get("image_processor_type", preprocessor.get("feature_extractor_type", "")))
    family = kind
    for suffix in ("FeatureExtractor", "ImageProcessorFast", "ImageProcessorPil", "ImageProcessor"):
        family = family.removesuffix(suffix)
    fields = {**_PROCESSORS.get(family, {}), **{key: given for key, given in preprocessor.items() if given is not None}}
    way_out = "Give --mean, --std and --image-size instead."
    if family not in _PROCESSORS:
        raise UnbackdoorError(
            f"{where} asks for the processor {kind or 'without a name'}, which is not known here; known are "
            f"{', '.join(_PROCESSORS)}. {way_out}"
        )
    if fields.get("do_pad") or fields["resample"] not in list(_FILTERS):
        step = "padding" if fields.get("do_pad") else f"the filter {fields['resample']}"
        raise UnbackdoorError(f"{where} asks for {step}, which is not known here. {way_out}")
    try:
        return _encoder(family, fields, channels)
    except (AttributeError, OverflowError, TypeError, ValueError, ZeroDivisionError, UnbackdoorError) as problem:
        raise UnbackdoorError(f"{where} has a field that no {kind} can have ({problem}). {way_out}") from None


def _encoder(family: str, fields: dict[str, Any], channels: int | None) -> ImageEncoder:
    exact: tuple[int, int] | None = None
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    if fields.get("do_resize", True):
        size = fields["size"]
        if family in _BY_EDGE and isinstance(size, int):
            size = {"shortest_edge": size}
        if isinstance(size, dict) and list(size) == ["shortest_edge"]:
            (shortest,) = _whole(size["shortest_edge"])
            if family == "ConvNext":
                exact, shortest, crop = _convnext(shortest, float(fields["crop_pct"]))
        else:
            exact = sides(size)
    if fields.get("do_center_crop"):
        crop = sides(fields["crop_size"])
    mean, std = fields["image_mean"], fields["image_std"]
    normalise = fields.get("do_normalize", True)
    return ImageEncoder(
        mean=tuple(map(float, mean if isinstance(mean, list) else [mean])) if normalise else (0.0,),
        std=tuple(map(float, std if isinstance(std, list) else [std])) if normalise else (1.0,),
        size=exact,
        shortest_edge=shortest,
        crop=crop,
        resample=_FILTERS[int(fields["resample"])],
        scale=float(fields.get("rescale_factor", 1 / 255)) if fields.get("do_rescale", True) else 1.0,
        channels=channels,
    )


def sides(size: Any) -> tuple[int, int]:
    """(height, width) of a size as processors write it: one number, two, or two by name."""
    if isinstance(size, dict):
        if set(size) != {"height", "width"}:
            raise ValueError(f"a size of {size}")
        size = [size["height"], size["width"]]
    height, width = _whole(*(size if isinstance(size, list) else [size, size]))
    return height, width


def _whole(*sides: Any) -> tuple[int, ...]:
    if not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"a size of {sides[0]}")
    return sides


def _convnext(edge: int, crop_share: float) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """ConvNeXt resizes a little larger and crops below 384 pixels, and warps to the exact size from there on."""
    if edge >= 384:
        return (edge, edge), None, None
    return None, int(edge / crop_share), (edge, edge)


def preprocessor_of(encode: ImageEncoder) -> dict[str, Any]:
    """The `preprocessor_config.json` that stands for an encoder; `encoder_of` reads it back."""

    def each(entry: tuple[float, ...]) -> list[float]:
        """One number per channel, which transformers insists on."""
        return list(entry) * (encode.channels or 1) if len(entry) == 1 else list(entry)

    size: dict[str, int] | None = None
    if encode.size is not None:
        size = {"height": encode.size[0], "width": encode.size[1]}
    elif encode.shortest_edge is not None:
        size = {"shortest_edge": encode.shortest_edge}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": size is not None,
        "size": size,
        "resample": {"nearest": 0, "bilinear": 2, "bicubic": 3}[encode.resample],
        "do_center_crop": encode.crop is not None,
        "crop_size": {"height": encode.crop[0], "width": encode.crop[1]} if encode.crop else None,
        "do_rescale": True,
        "rescale_factor": encode.scale,
        "do_normalize": True,
        "image_mean": each(encode.mean),
        "image_std": each(encode.std),
    }
