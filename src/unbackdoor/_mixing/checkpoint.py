"""Checkpoints on disk: the safetensors files of a model directory, read and written piece by piece."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.untrusted_weights import FLOATS, TensorLocation

# The bits of infinity, and the types as which all numbers are read: with a sign, and without. In both readings, no
# finite number is larger than infinity, so the largest one decides, and no mask has to be stored.
_INFINITY = {
    torch.float64: (0x7FF << 52, np.int64, np.uint64),
    torch.float32: (0xFF << 23, np.int32, np.uint32),
    torch.float16: (0x1F << 10, np.int16, np.uint16),
    torch.bfloat16: (0xFF << 7, np.int16, np.uint16),
}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory with safetensors files, none of which has to fit into memory.

    Args:
        directory: the model directory.
        tensors: places of the tensors, by name.
    """

    directory: ModelDirectory
    tensors: dict[str, TensorLocation]

    @classmethod
    def of(cls, directory: ModelDirectory) -> "Checkpoint":
        """Returns the checkpoint of a checked directory.

        Raises:
            UnbackdoorError: its weights are pickles or of a type that cannot be mixed, or two files hold one tensor.
        """
        if directory.weights.pickled:
            raise UnbackdoorError(
                f"{directory} has its weights in a pickle, but `stream` needs safetensors. Leave `stream` out, or save "
                "the model as safetensors first."
            )
        tensors: dict[str, TensorLocation] = {}
        for file, locations in directory.weights.locations.items():
            for name, location in locations.items():
                if location.fractional and location.dtype is None:
                    raise UnbackdoorError(
                        f"{file} holds {name} as {location.code}; weights of type {', '.join(FLOATS)} can be mixed. "
                        "Fetch those."
                    )
                if name in tensors:
                    others = f"{tensors[name].file.name} and {file.name}"
                    raise UnbackdoorError(f"{directory} has {name} twice, in {others}. Fetch it again.")
                tensors[name] = location
        return cls(directory, tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of its floating-point tensors, by name."""
        return {name: location.shape for name, location in self.tensors.items() if location.dtype is not None}

    def read(self, name: str, start: int, count: int, into: Tensor | None = None) -> Tensor:
        """Reads some numbers of a floating-point tensor, in row-major order, or bytes of any other.

        Several threads may read at the same time: each call opens the file for itself.

        Args:
            name: name of the tensor.
            start: position of the first number.
            count: number of numbers.
            into: memory to read into, uint8, long enough for all bytes.

        Raises:
            UnbackdoorError: the file has become shorter, or a value is not finite.
        """
        location = self.tensors[name]
        size = location.dtype.itemsize if location.dtype is not None else 1
        memory = torch.empty(count * size, dtype=torch.uint8) if into is None else into[: count * size]
        with location.file.open("rb") as file:
            file.seek(location.begin + start * size)
            length = file.readinto(memory.numpy().data)
        if length != count * size:
            raise UnbackdoorError(f"{location.file} ends early: it has changed while it was read. Fetch it again.")
        if location.dtype is None:
            return memory
        numbers = memory.view(location.dtype)
        if not finite(numbers):
            raise UnbackdoorError(
                f"{location.file} has values that are not finite in {name}; finite weights are expected. Fetch it "
                "again, or ask its owner for a working model."
            )
        return numbers


def finite(numbers: Tensor) -> bool:
    """Whether all numbers of a flat tensor are finite."""
    infinity, signed, unsigned = _INFINITY[numbers.dtype]
    bits = numbers.view(torch.uint8).numpy().view(signed)
    minus_infinity = infinity + (1 << (8 * bits.itemsize - 1))
    return bool(bits.max(initial=0) < infinity and bits.view(unsigned).max(initial=0) < minus_infinity)


def write(file: BinaryIO, numbers: Tensor, offset: int) -> None:
    """Write all bytes of a flat tensor at some place of a file."""
    file.seek(offset)
    file.write(numbers.view(torch.uint8).numpy().data)


def header_bytes(file: Path) -> bytes:
    """Returns the bytes before the first tensor of a checked safetensors file."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", start := opened.read(8))
        return start + opened.read(length)
