"""The entry `encode` of record.json, written and read: how the inputs of a model are made."""

from pathlib import Path
from typing import Any

from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.image_processors import sides
from unbackdoor._data.images import ImageEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import read_json


def encode_entry(encode: Encoder, data: Dataset | None) -> dict[str, Any]:
    """Returns the entry, by which `evaluate` makes inputs in the same way.

    Args:
        encode: encoder that makes the inputs.
        data: some examples, for the names of text columns; None if there are none.
    """
    return encode.recorded(None if data is None else data.items)


def recorded_encode(folder: Path) -> Any:
    """Returns the entry `encode` of the record, which may be any JSON; None without a record or an entry."""
    record = folder / "record.json"
    return read_json(record).get("encode") if record.exists() else None


def recorded_image_encoder(folder: Path) -> ImageEncoder:
    """Returns the encoder that `purify` recorded; without one, an encoder that does not change pixels.

    Raises:
        UnbackdoorError: the entry was not written by unbackdoor.
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
