"""The encoder of images that the processor in a model directory describes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unbackdoor._data.image_processors import encoder_of, is_plain
from unbackdoor._data.images import LARGEST_SIDE, ImageEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import CONFIG, read_json


def image_encoder(path: Path, config: Any, changes: Mapping[str, Any], trust_remote_code: bool) -> ImageEncoder:
    """Returns the encoder of an image model's directory.

    Args:
        path: path of the directory.
        config: config of the model.
        changes: fields of the encoder that replace what the processor says; without a processor, mean, std and size are
            needed.
        trust_remote_code: whether Python files that come with the model are run; those of a processor never are.

    Raises:
        UnbackdoorError: there is no processor, or it is not one that this program knows, cannot take the changes, or
            does not fit the model.
    """
    channels = getattr(config, "num_channels", None)
    try:
        encode = processor_encoder(path, channels, getattr(config, "model_type", None), trust_remote_code)
    except UnbackdoorError:
        if not {"mean", "std", "size"} <= changes.keys():
            raise
        encode = ImageEncoder(channels=channels)
    if "size" in changes:
        encode = replace(encode, shortest_edge=None, crop=None, geometry=None, padded=None)
    encode = replace(encode, **changes)
    if changes and not is_plain(encode):
        raise UnbackdoorError(
            f"{path} has a processor with special steps, which cannot be combined with another `mean`, `std` or "
            "`image_size`. Leave these out."
        )
    _check_pixels(encode, getattr(config, "image_size", None), path)
    return encode


def processor_encoder(
    path: Path, channels: int | None, model_type: str | None, trust_remote_code: bool = False
) -> ImageEncoder:
    """Returns the encoder of the processor that AutoImageProcessor of transformers would find in a directory.

    Args:
        path: path of the directory.
        channels: channels that the model takes; None for those of the data.
        model_type: type in its config, by which transformers chooses a processor without a name.
        trust_remote_code: see `image_encoder`.

    Raises:
        UnbackdoorError: there is no processor, or it is not one that this program knows.
    """
    where, content = path / "processor_config.json", None
    if where.exists():
        content = read_json(where, CONFIG).get("image_processor")
    if content is None:
        where = path / "preprocessor_config.json"
        if not where.exists():
            raise UnbackdoorError(
                f"{path} has no preprocessor_config.json. Put that of the model that it came from there, or give "
                "`mean`, `std` and `image_size`."
            )
        content = read_json(where, CONFIG)
    if not isinstance(content, dict):
        raise UnbackdoorError(
            f"{where} has an image_processor without fields. Put that of the model that it came from there, or give "
            "`mean`, `std` and `image_size`."
        )
    own = content.get("auto_map")
    if trust_remote_code and isinstance(own, dict) and "AutoImageProcessor" in own:  # else transformers leaves it out
        raise UnbackdoorError(
            f"{where} asks for a processor with Python code of its own, which is not run for images. Save one of "
            "transformers there that does the same, or give `mean`, `std` and `image_size` instead."
        )
    return encoder_of(content, channels, str(where), model_type=model_type)


def _check_pixels(encode: ImageEncoder, image_size: Any, path: Path) -> None:
    """Refuse a processor that makes images many times larger than those of its model.

    Args:
        encode: encoder of the processor.
        image_size: entry of the model's config, which may be anything.
        path: path of their directory.
    """
    sides = image_size if isinstance(image_size, list | tuple) else [image_size]
    known = [side for side in sides if isinstance(side, int) and side > 0]
    # Convolutions take any size, so a config may name a smaller one than its processor, but not a fourth of it.
    most = min(LARGEST_SIDE, max(4 * max(known), 512)) if known else LARGEST_SIDE
    targets = [step.target((256, 256)) for step in encode.steps]
    largest = max((side for size in (*targets, encode.padded or (0, 0)) for side in size), default=0)
    if largest > most:
        raise UnbackdoorError(
            f"{path} makes images of {largest:,} pixels a side, but its model takes {max(known, default=most):,}. "
            "Take the processor that it was trained with, or give `mean`, `std` and `image_size`."
        )
