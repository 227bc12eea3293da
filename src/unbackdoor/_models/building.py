"""What a config asks for, held against the weights that are there, before and while a model is built from it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import MEBIBYTE

# Each of these makes a loop, over layers that have weights of their own or share them.
_LOOPS = re.compile(r"(layers?|blocks?|depths?|stages?|repeats?|hops?|iterations?|steps)$|(_per_|_layers?_|attends)")
_PIECES = re.compile(r"window|chunk|bucket|block|head|group|expert|stride|kernel|dilation|patch|conv")
_FREE = re.compile(r"theta|length|scal|factor|base|token|seed|max_position")  # numbers that no size follows from


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


def check_config(path: Path, config: dict[str, Any], extent: Extent) -> None:
    """Refuse a config whose fields are of the wrong kind, or whose sizes the weights cannot have.

    Raises:
        UnbackdoorError: names the field.
    """
    where = path / "config.json"
    _check_kinds(where, config)
    classes = max(1000, 2**20 if extent.widest is None else extent.widest)
    for key, given in _numbers(config):
        most = 2**31
        if key in ("num_labels", "_num_labels"):
            most = classes
        elif _LOOPS.search(key):
            most = max(1024, extent.tensors)
        elif _PIECES.search(key):
            most = 2**16
        elif _FREE.search(key):
            most = 2**63
        if abs(given) > most or (given < 1 and key == "num_labels"):
            raise UnbackdoorError(
                f"{where} asks for {printable(key)} = {printable(f'{given:,}')}, but the weights beside it have "
                f"{extent.tensors:,} tensors in {extent.bytes:,} bytes; at most {most:,} is possible. Fetch both again."
            )
    names = config.get("id2label")
    if isinstance(names, dict) and len(names) > classes:
        raise UnbackdoorError(
            f"{where} names {len(names):,} classes, but no tensor beside it has more than {classes:,} rows. Fetch both "
            "again."
        )


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
                f"{path}/config.json asks for a model that is many times larger than the weights beside it "
                f"({extent.tensors:,} tensors in {extent.bytes:,} bytes). Fetch both again."
            )

    def parameter(_module: nn.Module, _name: str, given: Tensor | None) -> None:
        count("numbers", 0 if given is None else given.numel())

    def buffer(_module: nn.Module, _name: str, given: Tensor | None) -> None:
        count("buffers", 0 if given is None else given.numel())

    def part(_module: nn.Module, _name: str, _given: nn.Module | None) -> None:
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


def _check_kinds(where: Path, config: dict[str, Any]) -> None:
    """Refuse fields that this program or transformers would trip over."""

    def refuse(field: str, allowed: str) -> None:
        came = printable(repr(config[field]))
        raise UnbackdoorError(f"{where} must have {field} as {allowed}, got {came}. Fetch it again.")

    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        refuse("architectures", "a list of names")
    names = config.get("id2label")
    if isinstance(names, dict) and any(isinstance(name, dict | list) for name in names.values()):
        refuse("id2label", "names by number")


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers of a config at any depth, with the name of the field that they stand in."""
    if isinstance(config, dict):
        for name, entry in config.items():
            if name not in ("id2label", "label2id", "task_specific_params"):
                yield from _numbers(entry, name)
    elif isinstance(config, list):
        for entry in config:
            yield from _numbers(entry, key)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield key, config
