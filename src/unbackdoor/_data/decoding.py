"""Pictures from their files: decoded to 8 bits, upright and opaque, in grey or colour."""

import contextlib
import functools
import io
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from unbackdoor._errors import UnbackdoorError, few, printable
from unbackdoor._inputs import MEBIBYTE, PICTURE, exists, read_file

logger = logging.getLogger("unbackdoor")

UNFOLDED = 512 * MEBIBYTE  # pixels of decoded pictures from which on they are compared with the bytes of their files

_LARGEST = 64_000_000  # pixels of a decoded picture

# Changes of pictures by decoding that their owner may not expect, in the words of the log.
_CHANGES = {
    "alpha": "have transparent parts, which became white",
    "depth": "have 16 bits per channel, of which the upper 8 are kept",
    "frames": "have several frames, of which the first is taken",
    "print": "are in the colours of print (CMYK), converted to RGB without a profile",
}

# Endings of pictures as phones, cameras and drawing programs write them, which Pillow alone does not decode.
_UNDECODED_ENDINGS = {
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".svg", ".ai", ".exr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw"),
}

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_ENCODED = re.compile(r"[A-Za-z0-9+/\s]{200,}=*\s*")  # a file name this long has a dot or ends earlier


def report_changes(changes: Counter[str], where: str, count: int) -> None:
    """Log how many of `count` pictures were changed by decoding, and how."""
    for kind, words in _CHANGES.items():
        if changes[kind]:
            logger.info("%s: %s images %s.", where, f"{changes[kind]:,} of {count:,}", words)


def encoded_length(cell: Any, folder: Path | None) -> int:
    """Returns the number of bytes of an encoded picture, and `UNFOLDED` for one that is not encoded."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, str):
        return (Path(cell) if folder is None else folder / cell).stat().st_size
    return len(cell) if isinstance(cell, bytes) else UNFOLDED


def decode_cell(cell: Any, row: int, where: str, folder: Path | None, changes: Counter[str]) -> Image.Image:
    """Decode the picture in one cell of a data set.

    Args:
        cell: `{"bytes": ..., "path": ...}`, encoded bytes, a path, a PIL image or an array.
        row: number of the row, for messages.
        where: name of the data, for messages.
        folder: folder that relative paths start from.
        changes: counts what was changed, by the keys of `_CHANGES`.

    Raises:
        UnbackdoorError: there is no picture, it cannot be decoded, or it would have to be fetched.
    """
    _check_form(cell, row, where)
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if cell is None:
        raise UnbackdoorError(f"{where} has no picture in row {row}. Repair or remove that row.")
    if isinstance(cell, str):
        _check_path(cell, row, where)
        path = Path(cell) if folder is None else folder / cell
        if not exists(path):
            raise _missing(path, cell, row, where, folder)
        cell = path
    try:
        return decode(cell, changes)
    except UnbackdoorError:  # names the file
        raise
    except Exception as problem:  # the decoders of some fifty formats raise anything
        reason = printable(str(problem).split("<")[0].strip(), 200).rstrip(". ") or type(problem).__name__
        named = ""
        if isinstance(cell, Path):
            inside = folder is not None and cell.is_relative_to(folder)
            named = f", {printable(cell.relative_to(folder) if folder is not None and inside else cell)},"
        way_out = "Repair or remove that row."
        if isinstance(cell, Path) and undecoded(cell):
            way_out = f"Save {cell.suffix} pictures as JPEG or PNG."
        raise UnbackdoorError(
            f"{where} has a picture in row {row}{named} that cannot be decoded ({reason}). {way_out}"
        ) from None


def undecoded_cells(cells: Sequence[Any], where: str, folder: Path | None) -> dict[int, str]:
    """Returns why pictures of a data set cannot be read, by row, in a sentence each.

    Args:
        cells: as `decode_cell` reads them.
        where: name of the data, for messages.
        folder: folder that relative paths start from.
    """
    reasons = {}
    for row, cell in enumerate(cells):
        try:
            decode_cell(cell, row, where, folder, Counter())
        except UnbackdoorError as problem:
            reasons[row] = str(problem)
    return reasons


def _check_form(cell: Any, row: int, where: str) -> None:
    """Refuse a cell of another form than `decode_cell` reads."""
    if isinstance(cell, dict) and cell and not {"bytes", "path"} & cell.keys():
        raise UnbackdoorError(
            f"{where} has an object with {few(list(map(str, cell)))} in row {row} in place of a picture. Write the "
            "encoded picture itself, its path, or an object with bytes and path."
        )
    if isinstance(cell, list) and cell and isinstance(cell[0], bytes | dict):
        raise UnbackdoorError(
            f"{where} has a list of pictures in row {row}; one picture per row is expected. Write each into a row of "
            "its own."
        )


def _check_path(cell: str, row: int, where: str) -> None:
    """Refuse a text that is a picture itself, or an address."""
    if cell[:5].casefold() == "data:" or (_ENCODED.fullmatch(cell) and not _are_numbers(cell)):
        raise UnbackdoorError(
            f"{where} has a picture as base64 text in row {row}, which is not read. Decode it into a file or into "
            "bytes."
        )
    if cell[:5].casefold() == "file:":
        raise UnbackdoorError(
            f"{where} has an address of a file in row {row} ({printable(cell)}). Write its path, without file://."
        )
    if _ADDRESS.match(cell):
        raise UnbackdoorError(
            f"{where} has an address in row {row} ({printable(cell)}), and pictures are not fetched. Download the "
            "pictures, and name their files."
        )


def _are_numbers(text: str) -> bool:
    """Whether a text is a row of pixels, as tables of faces and digits have them, with or without brackets."""
    return set(text) <= set("0123456789.,;[] \t\n") and any(between in text for between in " ,")


def _missing(picture: Path, cell: str, row: int, where: str, folder: Path | None) -> UnbackdoorError:
    if _are_numbers(cell):
        return UnbackdoorError(
            f"{where} has pixels as text in row {row}, which are not read. Save them as pictures, or as lists of "
            "numbers in JSON lines or parquet."
        )
    if os.path.islink(picture):
        return UnbackdoorError(
            f"{where} has a picture in row {row} that is a link to a file that is not there ({printable(picture)}). "
            "Fetch that file, or copy what links name (cp -rL)."
        )
    return UnbackdoorError(
        f"{where} names a picture in row {row} that does not exist ({printable(picture)}). Write such names with their "
        f"ending, with / between folders, and relative to {folder or 'the current directory'}."
    )


def decode(picture: Any, changes: Counter[str] | None = None) -> Image.Image:
    """Decode one picture to 8 bits, grey (`L`) or colour (`RGB`), turned as its Exif data says, on white.

    Args:
        picture: encoded bytes, a path, a PIL image, or an array of whole numbers, (height, width), or with channels
            as the last or the first of three sides.
        changes: counts what was changed, by the keys of `_CHANGES`.

    Raises:
        Exception: whatever the decoder of its format raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged notes in a picture that can be read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if isinstance(picture, str | Path):
            picture = read_file(picture, PICTURE)
        image: Image.Image
        if isinstance(picture, bytes):
            image = Image.open(io.BytesIO(picture), formats=_formats())
            if image.width * image.height > _LARGEST:
                raise ValueError(f"{image.width:,} x {image.height:,} pixels; at most {_LARGEST:,} are read")
        elif isinstance(picture, Image.Image):
            image = picture
        else:
            array = _rows_and_columns(np.asarray(picture))
            flat = array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4))
            if array.dtype.kind not in "ui" or flat or array.size == 0 or array.min() < 0 or array.max() > 255:
                raise ValueError("an array must hold whole numbers from 0 to 255, in rows and columns")
            image = Image.fromarray(array.astype(np.uint8))
        image.load()
        changes = Counter() if changes is None else changes
        decoded = _eight_bit(image, changes)
        changes["frames"] += _has_frames(image)  # last of all: looking for a second frame may leave the first one
    return decoded


def _rows_and_columns(array: np.ndarray) -> np.ndarray:
    """Returns an array of pixels as Pillow takes it: channels last, as Keras writes them, and a single one left out."""
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):  # as torch has them
        array = array.transpose(1, 2, 0)
    return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _eight_bit(image: Image.Image, changes: Counter[str]) -> Image.Image:
    """A decoded picture with 8 bits, upright and opaque, in grey or colour."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow would cut off at 255
        changes["depth"] += 1
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; 8 and 16 bits have")
    changes["print"] += image.mode == "CMYK"
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        changes["alpha"] += image.getchannel("A").getextrema() != (255, 255)
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image).convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _has_frames(image: Image.Image) -> bool:
    """Whether a file holds an animation or several pages; the second picture of a phone's JPEG is a preview."""
    if image.format == "MPO":
        return False
    with contextlib.suppress(Exception):  # the rest after the first frame may be damaged, and is not needed
        return bool(getattr(image, "is_animated", False))
    return False


# Formats that Pillow knows by their first bytes and does not decode itself; PostScript it gives to another program.
_UNDECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG"}


@functools.cache
def _formats() -> list[str]:
    """The formats that Pillow decodes itself."""
    Image.init()
    return [name for name in Image.OPEN if name not in _UNDECODED]


@functools.cache
def picture_endings() -> frozenset[str]:
    """The endings of names of files with pictures, in small letters, as `.png`."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in _formats())


def undecoded(path: Path) -> bool:
    """Whether a file is a picture by its name, of a kind that is not read."""
    ending = path.suffix.lower()
    return ending in _UNDECODED_ENDINGS and ending not in picture_endings()
