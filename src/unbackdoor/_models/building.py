"""What a config asks for, held against the weights that are there, before and while a model is built from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import MEBIBYTE


class Extent(NamedTuple):
    """How much the weights files of a directory hold.

    Args:
        bytes: of all files.
        tensors: in them.
        widest: the longest side of any tensor; None where that is not known.
    """

    bytes: int
    tensors: int
    widest: int | None


@contextmanager
def bounded(path: Path, extent: Extent) -> Iterator[None]:
    """While the block runs, modules may register about as much as the weights files of a directory hold.

    transformers builds a model without numbers first, so a config that asks for more is found out before any memory is
    taken.

    Raises:
        UnbackdoorError: from within the block, once there is more.
    """
    numbers, parts = 2 * extent.bytes + 16 * MEBIBYTE, 10_000 + 100 * extent.tensors
    left = {"numbers": numbers, "buffers": numbers + 64 * MEBIBYTE, "parts": parts}

    def count(kind: str, entries: int) -> None:
        left[kind] -= entries
        if left[kind] < 0:
            raise UnbackdoorError(
                f"{path}/config.json asks for a model that is many times larger than the weights next to it "
                f"({extent.tensors:,} tensors in {extent.bytes:,} bytes). Fetch both again."
            )

    def parameter(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        count("numbers", 0 if tensor is None else tensor.numel())

    def buffer(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        count("buffers", 0 if tensor is None else tensor.numel())

    def part(_module: nn.Module, _name: str, _part: nn.Module | None) -> None:
        count("parts", 1)

    hooks = [
        register_module_parameter_registration_hook(parameter),
        register_module_buffer_registration_hook(buffer),
        register_module_module_registration_hook(part),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
