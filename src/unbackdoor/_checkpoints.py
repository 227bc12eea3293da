"""Reading weights that nobody vouches for: safetensors by its header first, pickles only as plain tensors."""

import io
import json
import math
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from unbackdoor._errors import UnbackdoorError

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

# Where trainers put the weights when they save more than the weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, by name, on the CPU.

    Raises:
        UnbackdoorError: the file is missing, damaged, holds something other than tensors, or has a value that is not
            finite.
    """
    if not path.is_file():
        raise UnbackdoorError(f"{path} does not exist; a weights file (.safetensors, .pt, .pth, .bin) is expected.")
    weights = _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)
    check_finite(weights, path.name)
    return weights


def check_finite(weights: dict[str, Tensor], where: str) -> None:
    """Refuse NaN and infinite weights."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnbackdoorError(
                f"{where} has values that are not finite in {name}; finite weights are expected. Fetch it again, or "
                "ask its owner for a working model."
            )


def check_safetensors(path: Path) -> set[str]:
    """Refuse a safetensors file whose header and length do not agree, before anything is mapped.

    Returns:
        The names of its tensors.

    Raises:
        UnbackdoorError: says which of the two it is.
    """
    length = path.stat().st_size
    again = "Fetch it again."
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise UnbackdoorError(
                f"{path} ends early: a safetensors file has at least 8 bytes, it has {length}. {again}"
            )
        (header_length,) = struct.unpack("<Q", start)
        if header_length > min(100_000_000, max(length - 8, 0)):
            raise UnbackdoorError(
                f"{path} is not a safetensors file, or ends inside its header ({header_length:,} bytes promised, "
                f"{length:,} in the file). {again}"
            )
        try:
            header = json.loads(file.read(header_length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            for name, entry in tensors.items():
                begin, stop = entry["data_offsets"]
                if stop - begin != math.prod(entry["shape"]) * _BYTES[entry["dtype"]] or begin < 0:
                    raise UnbackdoorError(
                        f"{path} has a wrong header: {name} is {entry['dtype']} of shape {entry['shape']}, but spans "
                        f"{stop - begin:,} bytes. {again}"
                    )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise UnbackdoorError(f"{path} has a header that is not valid safetensors. {again}") from None
    promised = 8 + header_length + end
    if promised != length:
        fault = "ends early" if length < promised else "is too long"
        raise UnbackdoorError(
            f"{path} {fault}: its header promises {promised:,} bytes, the file has {length:,}. {again}"
        )
    try:  # the library's own checks: tensors that overlap, holes between them, names given twice
        with safetensors.safe_open(path, framework="pt"):
            pass
    except safetensors.SafetensorError as problem:
        raise UnbackdoorError(f"{path} has a wrong header: {problem}. {again}") from None
    return set(tensors)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    check_safetensors(path)
    return dict(load_file(path))


def _pickle(path: Path) -> dict[str, Tensor]:
    """A pickle, of which nothing but tensors in plain containers is built (`weights_only=True`)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders at pickles that torch.save did not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a pickle may be broken in any way
        wanted = _asks_for(path)
        if wanted:
            raise UnbackdoorError(
                f"{path} is a pickle that asks to run {wanted}; it was not loaded. Ask its owner for safetensors."
            ) from None
        # Of a file that is no pickle, torch says at length that weights_only=False would help. It would not.
        reason = "no pickle of tensors" if isinstance(problem, pickle.UnpicklingError) else str(problem).split("\n")[0]
        reason = reason[:200].rstrip(". ") or type(problem).__name__
        raise UnbackdoorError(f"{path} is damaged or no PyTorch weights file ({reason}). Fetch it again.") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(part, Tensor) for part in content.values()):
        raise UnbackdoorError(
            f"{path} does not hold named tensors; a state dict is expected. Save model.state_dict() as safetensors."
        )
    return {str(name): tensor for name, tensor in content.items()}


def _asks_for(path: Path) -> str | None:
    """The first global that a pickle asks for and a state dict does not need, read without running anything."""
    safe = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
    try:
        for wanted in (name for stream in _streams(path) for name in _globals(stream)):
            if wanted not in safe and not (wanted.startswith("torch.") and wanted.endswith("Storage")):
                return wanted
    except Exception:  # no pickle, or a broken one: what could be read asks for nothing, and the caller refuses it
        return None
    return None


def _streams(path: Path) -> Iterator[BinaryIO]:
    """The pickles of a PyTorch file: one in today's zip archive, five in a row in the older format."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield io.BytesIO(archive.read(name))
    else:
        with path.open("rb") as file:
            for _ in range(5):
                yield file


def _globals(stream: BinaryIO) -> Iterator[str]:
    """The `module.name` of everything that one pickle would import; strings may come by way of its memo."""
    strings: list[str] = []  # in the order in which they were pushed
    memo: dict[Any, str | None] = {}
    top: str | None = None  # of the stack, if it is a string
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = top
            continue
        top = None
        if name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            top = memo.get(argument)
        elif "UNICODE" in name or "STRING" in name:
            top = str(argument)
        if top is not None:
            strings.append(top)


def check_fit(path: str, owner: str, missing: list[str], extra: list[str], shapes: list[tuple[str, Any, Any]]) -> None:
    """Refuse weights that are not those of their architecture; names the first few."""
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensor(s) ({few(missing)})")
    if extra:
        problems.append(f"has {len(extra)} that it does not know ({few(extra)})")
    if shapes:
        odd = [f"{name} is {tuple(came)}, not {tuple(wanted)}" for name, came, wanted in shapes[:3]]
        problems.append(f"has {len(shapes)} of another shape ({'; '.join(odd)}{'; ...' * (len(shapes) > 3)})")
    if problems:
        wrapped = missing and sorted(extra) == sorted(f"module.{name}" for name in missing)
        way = "Take module. off the names, which DataParallel put there" if wrapped else "Check the architecture"
        raise UnbackdoorError(f"{path} does not fit {owner}: it {' and '.join(problems)}. {way}.")


def few(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
