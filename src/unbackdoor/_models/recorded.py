"""What the record.json in a model directory says about the inputs of its model."""

from pathlib import Path
from typing import Any

from unbackdoor._data.image_processors import sides
from unbackdoor._data.images import ImageEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import read_json


def recorded_encode(folder: Path) -> Any:
    """The entry `encode` of the record, which is anything that JSON has; None without a record or an entry."""
    record = folder / "record.json"
    return read_json(record).get("encode") if record.exists() else None


def recorded_image_encoder(folder: Path) -> ImageEncoder:
    """The encoder that `purify` wrote down; without one, pixels as they are.

    Raises:
        UnbackdoorError: something else wrote the entry.
    """
    entries = recorded_encode(folder)
    if entries is None:
        return ImageEncoder()
    try:
        return ImageEncoder(
            mean=tuple(entries["mean"]),
            std=tuple(entries["std"]),
            size=None if entries["size"] is None else sides(entries["size"]),
            channels=entries["channels"],
        )
    except (TypeError, KeyError, ValueError, OverflowError, UnbackdoorError):
        raise UnbackdoorError(
            f"{folder / 'record.json'} has an encode entry that unbackdoor did not write. Remove it, and give `mean`, "
            "`std` and `image_size`."
        ) from None
