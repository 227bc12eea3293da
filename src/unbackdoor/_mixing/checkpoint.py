"""Checkpoints on disk: the safetensors files of a directory, read and written a piece at a time."""

import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.hugging_face import checked_files

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# The bits of infinity, and the types that they are read as. With a sign or without, no finite number has more of them,
# so the largest number of each reading tells, and nothing has to be written down.
_INFINITY = {
    torch.float64: (0x7FF << 52, np.int64, np.uint64),
    torch.float32: (0xFF << 23, np.int32, np.uint32),
    torch.float16: (0x1F << 10, np.int16, np.uint16),
    torch.bfloat16: (0xFF << 7, np.int16, np.uint16),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Args:
        file: that holds it.
        dtype: None where it has no floating-point values.
        shape: of it.
        begin: its first byte in the file.
        end: the byte after its last.
    """

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory with one safetensors file, or several and their index.

    Args:
        path: the directory.
        config: its config.json.
        index: the file that says which shard holds what; None where there are no shards.
        files: with weights.
        tensors: by name.
        opened: descriptors by file; see `opening`.
    """

    path: Path
    config: dict[str, Any]
    index: Path | None
    files: list[Path]
    tensors: dict[str, Stored]
    opened: dict[Path, int] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path) -> "Checkpoint":
        """Look at the files of a directory; of the weights, only the headers are read.

        Raises:
            UnbackdoorError: a file is missing or damaged, or the weights are of a kind that cannot be mixed.
        """
        whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
        if not whole.exists() and not index.exists() and (path / "pytorch_model.bin").exists():
            raise UnbackdoorError(
                f"{path} has its weights in a pickle, but --stream needs safetensors. Leave --stream out, or save the "
                "model as safetensors first."
            )
        config, files = checked_files(path)
        tensors: dict[str, Stored] = {}
        for file in files:
            for name, stored in _header(file).items():
                if name in tensors:
                    others = f"{tensors[name].file.name} and {file.name}"
                    raise UnbackdoorError(f"{path} has {name} twice, in {others}. Fetch it again.")
                tensors[name] = stored
        return cls(path, config, None if whole.exists() else index, files, tensors)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Keep the files open for reading while the block runs."""
        with ExitStack() as stack:
            for file in self.files:
                self.opened[file] = stack.enter_context(file.open("rb", buffering=0)).fileno()
            try:
                yield
            finally:
                self.opened.clear()

    def read(self, name: str, start: int, count: int, into: Tensor | None = None) -> Tensor:
        """Some numbers of a floating-point tensor, in row-major order; or bytes, of any other.

        Args:
            name: of the tensor.
            start: the first one.
            count: how many.
            into: memory to use, uint8, of at least so many bytes.

        Raises:
            UnbackdoorError: the file has become shorter, or a value is not finite.
        """
        stored = self.tensors[name]
        size = stored.dtype.itemsize if stored.dtype is not None else 1
        memory = torch.empty(count * size, dtype=torch.uint8) if into is None else into[: count * size]
        got = os.preadv(self.opened[stored.file], [memory.numpy().data], stored.begin + start * size) if count else 0
        if got != count * size:
            raise UnbackdoorError(f"{stored.file} ends early: it has changed while it was read. Fetch it again.")
        if stored.dtype is None:
            return memory
        numbers = memory.view(stored.dtype)
        if not finite(numbers):
            raise UnbackdoorError(
                f"{stored.file} has values that are not finite in {name}; finite weights are expected. Fetch it again, "
                "or ask its owner for a working model."
            )
        return numbers


def finite(numbers: Tensor) -> bool:
    """Whether no number of a flat tensor is infinite or NaN."""
    infinity, signed, unsigned = _INFINITY[numbers.dtype]
    bits = numbers.view(torch.uint8).numpy().view(signed)
    minus_infinity = infinity + (1 << (8 * bits.itemsize - 1))
    return bool(bits.max(initial=0) < infinity and bits.view(unsigned).max(initial=0) < minus_infinity)


def write(descriptor: int, numbers: Tensor, offset: int) -> None:
    """Write all bytes of a flat tensor at some place of a file."""
    left = numbers.view(torch.uint8).numpy().data
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def header_bytes(file: Path) -> bytes:
    """What comes before the first tensor of a checked safetensors file."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", start := opened.read(8))
        return start + opened.read(length)


def _header(file: Path) -> dict[str, Stored]:
    before = header_bytes(file)
    found = {}
    for name, entry in json.loads(before[8:]).items():
        if name == "__metadata__":
            continue
        code = entry["dtype"]
        if code.startswith("F") and code not in _FLOATS:
            raise UnbackdoorError(
                f"{file} holds {name} as {code}; weights of type {', '.join(_FLOATS)} can be mixed. Fetch those."
            )
        begin, end = (len(before) + offset for offset in entry["data_offsets"])
        found[name] = Stored(file, _FLOATS.get(code), tuple(entry["shape"]), begin, end)
    return found
