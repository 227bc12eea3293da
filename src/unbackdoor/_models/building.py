"""A bound for the size of a model: that of its weights, checked while it is built from its config."""

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
    """The size of the weights files of a directory.

    Args:
        bytes: number of bytes of all files.
        tensors: number of tensors in them.
        widest: the longest side of any tensor; None if that is not known.
    """

    bytes: int
    tensors: int
    widest: int | None


@contextmanager
def bounded(path: Path, extent: Extent) -> Iterator[None]:
    """While the block runs, modules may register about as many weights as the files of a directory hold.

    transformers builds a model without numbers first, so a config that asks for more is detected before any memory is
    allocated.

    Raises:
        UnbackdoorError: raised within the block if more are registered.
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
