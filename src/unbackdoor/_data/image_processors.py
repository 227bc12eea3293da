"""Hugging Face image processors: from their settings to an encoder with the same steps, and back."""

from dataclasses import replace
from typing import Any

from unbackdoor._data.geometry import Crop, CropShare, Resample, Resize, ResizeEdge, ResizeWithin, Size, Step
from unbackdoor._data.images import LARGEST_SIDE, ImageEncoder
from unbackdoor._errors import UnbackdoorError, printable

# By Pillow's numbers of filters, as they stand in preprocessor_config.json.
_FILTERS: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")

_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": 224,
    "resample": 3,
}

# The defaults of each processor for fields that its preprocessor_config.json leaves out. A size that is one number is
# the shorter side for those with `by_edge`, and the side of a square for the others. `pads` is whether a processor
# heeds do_pad, `crops` whether it heeds do_center_crop. All are those of transformers' Pillow processors.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "Beit": {**_HALVES, "size": 224, "crop_size": 224, "resample": 3, "pads": False},
    "Bit": {**_CLIP, "by_edge": True},
    "Blip": {**_CLIP, "size": 384, "do_center_crop": False, "crop_size": None},
    "ChineseCLIP": {**_CLIP, "by_edge": True},
    "CLIP": {**_CLIP, "by_edge": True},
    "ConvNext": {
        **_HALVES, "size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 224 / 256, "by_edge": True, "pads": False,
    },
    "DeiT": {**_HALVES, "size": 256, "do_center_crop": True, "crop_size": 224, "resample": 3},
    "EfficientNet": {**_HALVES, "size": 346, "crop_size": 289, "resample": 3, "include_top": True, "pads": False},
    "Levit": {
        **_IMAGENET, "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": 3,
        "by_edge": True,
    },
    "MobileNetV1": {
        **_HALVES, "size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224, "resample": 2,
        "by_edge": True,
    },
    "MobileNetV2": {
        **_HALVES, "size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224, "resample": 2,
        "by_edge": True, "pads": False,
    },
    "MobileViT": {
        "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 256, "resample": 3,
        "do_flip_channel_order": True, "by_edge": True, "pads": False,
    },
    "Perceiver": {
        **_IMAGENET, "size": 224, "do_center_crop": True, "crop_size": 256, "resample": 3, "pads": False,
    },
    "PoolFormer": {
        **_IMAGENET, "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": 3,
        "crop_pct": 0.9, "by_edge": True,
    },
    "Pvt": {**_IMAGENET, "size": 224, "resample": 3},
    "RTDetr": {
        **_IMAGENET, "size": {"height": 640, "width": 640}, "resample": 2, "do_normalize": False, "by_edge": True,
        "crops": False,
    },
    "Segformer": {**_IMAGENET, "size": 512, "resample": 2, "crops": False, "pads": False},
    "Siglip": {**_HALVES, "size": {"height": 224, "width": 224}, "resample": 3, "by_edge": True},
    "TextNet": {
        **_IMAGENET, "size": {"shortest_edge": 640}, "crop_size": 224, "resample": 2, "size_divisor": 32,
        "by_edge": True, "pads": False,
    },
    "ViT": {**_HALVES, "size": 224, "resample": 2},
}  # fmt: skip

_SWITCHES = (
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_flip_channel_order"),
    *("include_top", "rescale_offset", "default_to_square"),
)

# The processor of a kind of model whose preprocessor_config.json does not name one.
_OF_MODELS = {
    "Beit": "beit data2vec-vision",
    "Bit": "bit dinov2 focalnet hiera",
    "CLIP": "clip metaclip_2",
    "ConvNext": "convnext convnextv2 cvt regnet resnet",
    "DeiT": "deit",
    "EfficientNet": "efficientnet",
    "Levit": "levit",
    "MobileNetV1": "mobilenet_v1",
    "MobileNetV2": "mobilenet_v2",
    "MobileViT": "mobilevit mobilevitv2",
    "Perceiver": "perceiver",
    "PoolFormer": "poolformer",
    "Pvt": "pvt pvt_v2",
    "Segformer": "segformer",
    "Siglip": "siglip",
    "TextNet": "textnet",
    "ViT": "dinat ijepa swiftformer swin swinv2 vit vit_msn",
}


def encoder_of(
    preprocessor: dict[str, Any], channels: int | None, where: str, *, model_type: str | None = None
) -> ImageEncoder:
    """Returns the encoder for a Hugging Face `preprocessor_config.json`.

    The reference is transformers' processor as it runs without torchvision, on Pillow.

    Args:
        preprocessor: content of the file; an absent field means the processor's own default.
        channels: channels of the model.
        where: name of the data, for messages.
        model_type: type in the model's config, which decides if the content does not name a processor.

    Raises:
        UnbackdoorError: the processor has unknown steps, or its fields make no sense.
    """
    kind = preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type") or ""
    family = str(kind)
    for suffix in ("FeatureExtractor", "ImageProcessorFast", "ImageProcessorPil", "ImageProcessor"):
        family = family.removesuffix(suffix)
    if not kind:
        family = next((name for name, models in _OF_MODELS.items() if model_type in models.split()), "")
    way_out = "Save one there that is known and does the same, or give `mean`, `std` and `image_size` instead."
    if family not in _PROCESSORS:
        raise UnbackdoorError(
            f"{where} asks for the processor {printable(kind) or 'without a name'}, which is not known here; known are "
            f"{', '.join(_PROCESSORS)}. {way_out}"
        )
    # In transformers a switch that is null is off, and any other field that is null is not set.
    settings = {key: entry for key, entry in preprocessor.items() if entry is not None or key in _SWITCHES}
    fields = {**_PROCESSORS[family], **settings}
    resample = fields["resample"]
    if isinstance(resample, bool) or not isinstance(resample, int) or not 0 <= resample < len(_FILTERS):
        raise UnbackdoorError(f"{where} asks for the filter {printable(resample)}, which is not known here. {way_out}")
    switch = next((name for name in _SWITCHES if not isinstance(fields.get(name), bool | int | None)), None)
    if switch is not None:
        entry = printable(repr(fields[switch]))
        raise UnbackdoorError(f"{where} must have {switch} as true or false, got {entry}. {way_out}")
    try:
        return _encoder(family, fields, channels)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, UnbackdoorError) as problem:
        owner = kind or f"{family}ImageProcessor"
        raise UnbackdoorError(
            f"{where} has a field that no {printable(owner)} can have ({printable(problem, 200)}). {way_out}"
        ) from None


def _encoder(family: str, fields: dict[str, Any], channels: int | None) -> ImageEncoder:
    mean, std = _per_channel(fields.get("image_mean", 0.0)), _per_channel(fields.get("image_std", 1.0))
    deviation = std
    if not fields.get("do_normalize", True) or family == "MobileViT":  # MobileViT has no such step
        mean, std = (0.0,), (1.0,)
    rescale = fields.get("do_rescale", True)
    if family == "EfficientNet":
        if rescale and fields.get("rescale_offset"):
            mean = tuple(part + 1 for part in mean)
        if fields["include_top"]:  # divided by the deviation once more
            std = tuple(first * second for first, second in zip(std * len(deviation), deviation, strict=False))
    padded = fields.get("pad_size") if fields.get("do_pad") and fields.get("pads", True) else None
    encode = ImageEncoder(
        mean=mean,
        std=std,
        resample=_FILTERS[fields["resample"]],
        scale=float(fields.get("rescale_factor", 1 / 255)) if rescale else 1.0,
        channels=channels,
        reverse_channels=family == "MobileViT" and bool(fields["do_flip_channel_order"]),
        padded=None if padded is None else sides(padded),
    )
    return _shaped(encode, _steps(family, fields))


def _shaped(encode: ImageEncoder, steps: tuple[Step, ...]) -> ImageEncoder:
    """Returns the encoder with some steps, in its plain fields if these can express them."""
    edges = [step.shortest for step in steps if isinstance(step, ResizeEdge)]
    exact = [step.size for step in steps if isinstance(step, Resize)]
    crops = [step.size for step in steps if isinstance(step, Crop)]
    plain = replace(
        encode,
        size=exact[0] if exact else None,
        shortest_edge=edges[0] if edges else None,
        crop=crops[0] if crops else None,
    )
    return plain if plain.steps == steps else replace(encode, geometry=steps)


def _steps(family: str, fields: dict[str, Any]) -> tuple[Step, ...]:
    resizing = _resizing(family, fields) if fields.get("do_resize", True) else ()
    if not fields.get("do_center_crop") or not fields.get("crops", True):
        return resizing
    crop = sides(fields["crop_size"])
    if family == "Perceiver":  # the other way round, by shares of the shorter side
        height, width = sides(fields["size"])
        return CropShare((height / crop[0], width / crop[1])), *resizing
    return *resizing, Crop(crop)


def _resizing(family: str, fields: dict[str, Any]) -> tuple[Step, ...]:
    """Returns the steps of do_resize; each family that is named here has its own."""
    square = fields.get("default_to_square")  # as the processors that end in Fast write it
    size = _named(fields["size"], by_edge=fields.get("by_edge", False) if square is None else not square)
    if family == "CLIP" and fields.get("use_square_size"):
        size = {"height": 224, "width": 224}
    shortest = size.get("shortest_edge")
    longest = size.get("longest_edge")
    match family:
        case "ConvNext" if shortest is not None and shortest >= 384:
            return (Resize((shortest, shortest)),)
        case "ConvNext" if shortest is not None:
            return _edge(shortest / float(fields["crop_pct"])), Crop((shortest, shortest))
        case "Levit" if shortest is not None:
            return (_edge(256 / 224 * shortest),)
        case "PoolFormer" if shortest is not None or size.get("height") == size.get("width"):
            return (_edge((shortest or size["height"]) / float(fields["crop_pct"])),)
        case "PoolFormer" if "height" in size:
            larger = [int(size[name] / float(fields["crop_pct"])) for name in ("height", "width")]
            return (Resize(sides(larger)),)
        case "TextNet" if shortest is not None:
            (multiple,) = _whole(fields["size_divisor"])
            return (ResizeEdge(shortest, multiple=multiple),)
        case "ConvNext" | "TextNet":
            pass
        case _ if shortest is not None and (family != "RTDetr" or longest is not None):
            return (ResizeEdge(shortest, longest),)
        case _ if "max_height" in size and family != "Levit":
            return (ResizeWithin((size["max_height"], size["max_width"])),)
        case _ if "height" in size:
            return (Resize((size["height"], size["width"])),)
    raise ValueError(f"a size of {fields['size']}")


def _edge(shortest: float) -> ResizeEdge:
    (whole,) = _whole(int(shortest))
    return ResizeEdge(whole)


def _named(size: Any, *, by_edge: bool) -> dict[str, int]:
    """Returns a size as processors write it, with its parts by their names."""
    if isinstance(size, dict):
        kinds = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})
        if set(size) not in kinds:
            raise ValueError(f"a size of {printable(size)}")
        named = size
    elif isinstance(size, list):
        named = {"height": size[0], "width": size[1]}
    else:
        named = {"shortest_edge": size} if by_edge else {"height": size, "width": size}
    return dict(zip(named, _whole(*named.values()), strict=True))


def sides(size: Any) -> Size:
    """Returns (height, width) of a size as processors write it: one number, two, or two by name."""
    named = _named(size, by_edge=False)
    if "height" not in named:
        raise ValueError(f"a size of {printable(size)}")
    return named["height"], named["width"]


def _whole(*sides: Any) -> tuple[int, ...]:
    wrong = [
        side for side in sides if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= LARGEST_SIDE
    ]
    if wrong:
        raise ValueError(f"a size of {printable(wrong[0])}")
    return sides


def _per_channel(entry: Any) -> tuple[float, ...]:
    return tuple(map(float, entry if isinstance(entry, list) else [entry]))


def is_plain(encode: ImageEncoder) -> bool:
    """Whether `preprocessor_of` can express an encoder."""
    return encode.geometry is None and not encode.reverse_channels and encode.padded is None


def preprocessor_of(encode: ImageEncoder) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of an encoder; `encoder_of` reads it back.

    Raises:
        UnbackdoorError: the encoder has special steps (see `is_plain`).
    """
    if not is_plain(encode):
        raise UnbackdoorError(
            "The model's processor has steps of its own, which cannot be written again. Give save the directory that "
            "it came with (`source`), and leave `mean`, `std` and `image_size` out."
        )

    def each(entry: tuple[float, ...]) -> list[float]:
        """Returns one number per channel, as transformers requires."""
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
        "resample": _FILTERS.index(encode.resample),
        "do_center_crop": encode.crop is not None,
        "crop_size": {"height": encode.crop[0], "width": encode.crop[1]} if encode.crop else None,
        "do_rescale": True,
        "rescale_factor": encode.scale,
        "do_normalize": True,
        "image_mean": each(encode.mean),
        "image_std": each(encode.std),
    }
