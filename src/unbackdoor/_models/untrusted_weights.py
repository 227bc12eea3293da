"""Reading untrusted weights: of safetensors the header first, of pickles only plain tensors."""

import contextlib
import io
import json
import logging
import math
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from unbackdoor._errors import SENTENCE, UnbackdoorError, few, printable
from unbackdoor._inputs import MEBIBYTE, check_file, is_unicode, open_file, reading
from unbackdoor._memory import check_memory
from unbackdoor._models.weight_names import fits

logger = logging.getLogger("unbackdoor")

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

_HEADER = 16 * MEBIBYTE  # bytes of the header of a safetensors file; about 100 per tensor are usual
_INDEX = 16 * MEBIBYTE  # bytes of the pickle in a PyTorch file that gives the place of each tensor

_NUMBERS = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip

# Keys of the weights in files of trainers that save more than weights, the likeliest first.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")

# What trainers save besides the weights, results and the options that they were started with. Whole names: a module
# that is imported for one of them holds others that run code.
_SETTINGS = re.compile(
    r"numpy\.(_?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)|ndarray|dtype|dtypes\.\w+DType)"
    r"|_codecs\.encode|argparse\.Namespace|pathlib\.(_local\.)?\w*Path|collections\.(defaultdict|Counter)"
    r"|(builtins|__builtin__)\.(list|dict|set|int|float|str)"
)

# Endings of weights that other programs read.
_FOREIGN = {
    ".h5": "TensorFlow or Keras",
    ".keras": "Keras",
    ".pb": "TensorFlow",
    ".tflite": "TensorFlow Lite",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".gguf": "llama.cpp (GGUF)",
    ".ot": "rust-bert",
    ".mlmodel": "Core ML",
    ".npz": "NumPy",
    ".npy": "NumPy",
}


@dataclass(frozen=True)
class TensorLocation:
    """The place of a tensor in a safetensors file.

    Args:
        file: the file that contains it.
        code: code of its type, such as `BF16`.
        shape: shape of the tensor.
        begin: position of its first byte in the file.
        end: position after its last byte.
    """

    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the tensor; None if it is not a usual floating-point type."""
        return FLOATS.get(self.code)

    @property
    def fractional(self) -> bool:
        """Whether its values are floating-point numbers of any type."""
        return self.code.startswith(("F", "BF"))

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def foreign(path: Path) -> str | None:
    """Returns the program whose weights a file holds, by its ending; None for PyTorch and unknown endings."""
    return _FOREIGN.get(path.suffix.lower())


def read_weights(path: Path, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Reads the tensors of a weights file, by name, on the CPU.

    Args:
        path: path of the file.
        own: `state_dict` of the module that they are for; it decides if a file holds several.

    Raises:
        UnbackdoorError: the file is missing, damaged, holds something other than tensors, or has a value that is not
            finite.
    """
    if not path.exists():
        raise UnbackdoorError(f"{path} does not exist; a weights file (.safetensors, .pt, .pth, .bin) is expected.")
    length = check_file(path).stat().st_size
    program = foreign(path)
    if program is not None:
        raise UnbackdoorError(
            f"{path} holds weights for {program}; PyTorch weights (.safetensors, .pt, .pth, .bin) are expected. "
            "Convert it, or ask its owner for model.safetensors."
        )
    if path.suffix != ".safetensors":
        check_memory(
            f"{path} is a pickle, which is read whole and needs",
            length,
            "Take a machine with more, or save it as safetensors.",
        )
    weights = _safetensors(path) if path.suffix == ".safetensors" else _pickle(path, own)
    check_plain(weights, str(path), length)
    check_finite(weights, path.name)
    return weights


def check_plain(weights: dict[str, Tensor], where: str, length: int) -> None:
    """Refuse tensors that are not plain numbers in memory, and those that claim to be larger than their file.

    Args:
        weights: tensors by name.
        where: name of the file, for messages.
        length: length of the file, in bytes.

    Raises:
        UnbackdoorError: names the first one.
    """
    total = 0
    for name, tensor in weights.items():
        check_kind(name, tensor, where)
        # Each shared tensor is counted; a stride of 0 makes a tensor of any size from one number.
        total += tensor.numel() * tensor.element_size()
        if total > 64 * length + MEBIBYTE:
            raise UnbackdoorError(
                f"{where} has {length:,} bytes, but its tensors up to {printable(name)} claim to have {total:,}. "
                "Fetch it again."
            )


def check_kind(name: str, tensor: Tensor, where: str) -> None:
    """Refuse a tensor that is not an array of real numbers on the CPU."""
    kind = _unsupported_kind(tensor)
    if kind is not None:
        raise UnbackdoorError(
            f"{where} holds {printable(name)} as {kind}; plain numbers are expected (float64, float32, float16, "
            "bfloat16, whole numbers). Save the model as such."
        )


def _unsupported_kind(tensor: Tensor) -> str | None:
    """Returns the kind of a tensor that is not a plain array of numbers on the CPU; None for a plain one."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.device.type != "cpu":
        return f"a tensor without numbers (on the device {tensor.device.type})"
    if tensor.dtype not in _NUMBERS:
        return str(tensor.dtype).removeprefix("torch.")
    return None


def check_fractions(whole: Iterable[str], where: str) -> None:
    """Refuse weights in whole numbers: they are quantised, and the scale that belongs to them is not known.

    Args:
        whole: names of tensors that hold whole numbers, but are weights.
        where: name of the file, for messages.
    """
    name = min(whole, default=None)
    if name is not None:
        raise UnbackdoorError(
            f"{where} holds {printable(name)} in whole numbers, as quantised models do; floating-point weights are "
            "expected (float64, float32, float16, bfloat16). Take the model as it was before it was quantised."
        )


def check_finite(weights: dict[str, Tensor], where: str) -> None:
    """Refuse NaN and infinite weights, and tensors that are not plain numbers in memory."""
    for name, tensor in weights.items():
        check_kind(name, tensor, where)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnbackdoorError(
                f"{where} has values that are not finite in {printable(name)}; finite weights are expected. Fetch it "
                "again, or ask its owner for a working model."
            )


def check_safetensors(path: Path) -> dict[str, TensorLocation]:
    """Refuse a safetensors file whose header and length do not agree, before any of it is mapped into memory.

    Returns:
        the places of its tensors, by name.

    Raises:
        UnbackdoorError: the file is damaged, or holds tensors of an unsupported type.
    """
    length = check_file(path).stat().st_size
    if not is_unicode(str(path)):
        raise UnbackdoorError(f"{path} has a name that is not in UTF-8, which safetensors cannot open. Rename it.")
    again = "Fetch it again."
    with open_file(path) as file:
        start = file.read(8)
        if len(start) < 8:
            raise UnbackdoorError(
                f"{path} ends early: a safetensors file has at least 8 bytes, it has {length}. {again}"
            )
        (header_length,) = struct.unpack("<Q", start)
        if header_length > min(_HEADER, max(length - 8, 0)):
            if start.startswith((b"PK\x03\x04", b"\x80\x02")):  # a header of 640 bytes begins so, too
                raise UnbackdoorError(
                    f"{path} is a pickle by its content, although its name says otherwise. Let its name end in .pt, or "
                    "in a directory .bin."
                )
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
                if entry["dtype"] not in _BYTES and entry["dtype"].startswith(("C64", "F4", "F6_", "F8_")):
                    raise UnbackdoorError(
                        f"{path} holds {printable(name)} as {printable(entry['dtype'])}; plain numbers are expected "
                        "(float64, float32, float16, bfloat16, whole numbers). Save the model as such."
                    )
                if len(entry["shape"]) > 16 or not all(0 <= side < 2**63 for side in entry["shape"]):
                    raise ValueError
                if stop - begin != math.prod(entry["shape"]) * _BYTES[entry["dtype"]] or begin < 0:
                    raise UnbackdoorError(
                        f"{path} has a wrong header: {printable(name)} is {entry['dtype']} of shape {entry['shape']}, "
                        f"but spans {stop - begin:,} bytes. {again}"
                    )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
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
        raise UnbackdoorError(f"{path} has a wrong header: {printable(problem)}. {again}") from None
    first = 8 + header_length
    return {
        name: TensorLocation(
            path, entry["dtype"], tuple(entry["shape"]), *(first + offset for offset in entry["data_offsets"])
        )
        for name, entry in tensors.items()
    }


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    check_safetensors(path)
    with reading(path):
        return dict(load_file(path))


def _pickle(path: Path, own: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Reads the weights in a pickle; only tensors in plain containers are built from it (`weights_only=True`)."""
    _check_archive(path)
    if _is_program(path):
        raise UnbackdoorError(
            f"{path} is a TorchScript or exported program, which is not run; a state dict is expected. Ask its owner "
            "for model.state_dict() as safetensors, and give `factory`."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles that torch.save did not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a pickle may be broken in any way
        wanted = _asks_for(path)
        if wanted:
            raise _refused(path, wanted) from None
        # If a file is not a pickle, torch says at length that weights_only=False would help. It would not.
        with open_file(path) as file:
            start = file.read(512)
        if packed := _packed(path, start):
            raise UnbackdoorError(
                f"{path} is packed ({packed}), and packed weights are not read. Unpack it, and give the file in it."
            ) from None
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
            raise UnbackdoorError(
                f"{path} is a safetensors file by its content, although its name says otherwise. Let its name end in "
                ".safetensors."
            ) from None
        reason = (
            "not a pickle of tensors" if isinstance(problem, pickle.UnpicklingError) else str(problem).split("\n")[0]
        )
        reason = printable(reason, 200).rstrip(". ") or type(problem).__name__
        raise UnbackdoorError(f"{path} is damaged or not a PyTorch weights file ({reason}). Fetch it again.") from None
    state_dicts = dict(_state_dicts(content)) or _among_others(path, content, own)
    if not state_dicts:
        raise UnbackdoorError(
            f"{path} does not hold named tensors; a state dict is expected. Save model.state_dict() as safetensors."
        )
    return _chosen(path, state_dicts, own)


def _packed(path: Path, start: bytes) -> str | None:
    """Returns the format of a packed file, by its first 512 bytes; None for any other, and for a file of PyTorch."""
    if start[257:262] == b"ustar":
        return "tar"
    if start.startswith(b"PK\x03\x04"):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return None if any(name.endswith("data.pkl") for name in archive.namelist()) else "zip"
    marks = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"\x28\xb5\x2f\xfd": "zstd"}
    return next((kind for mark, kind in marks.items() if start.startswith(mark)), None)


def _check_archive(path: Path) -> None:
    """Refuse a file of PyTorch, a zip archive, that unpacks to much more than it has, or has a name twice."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch reports the problem
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise UnbackdoorError(
            f"{path} has {printable(twice)} twice, so its content depends on the program that reads it. Fetch it again."
        )
    length, total = path.stat().st_size, sum(entry.file_size for entry in entries)
    if total > 4 * length + MEBIBYTE:
        raise UnbackdoorError(f"{path} has {length:,} bytes, but unpacks to {total:,}. Fetch it again.")
    index = next((entry for entry in entries if entry.filename.endswith(".pkl") and entry.file_size > _INDEX), None)
    if index is not None:
        raise UnbackdoorError(
            f"{path} has an index ({printable(index.filename)}) of {index.file_size:,} bytes; at most {_INDEX:,} are "
            "read. Ask its owner for safetensors."
        )


def _state_dicts(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Returns the dictionaries of tensors in an unpickled object, by their keys (places in lists), joined by dots."""
    if isinstance(content, list | tuple):
        content = {place: part for place, part in enumerate(content) if isinstance(part, dict | list | tuple)}
    if not isinstance(content, dict) or not content:
        return
    if all(isinstance(part, Tensor) for part in content.values()):
        yield key, {str(name): tensor for name, tensor in content.items()}
    elif depth < 3:
        for name, part in content.items():
            yield from _state_dicts(part, f"{key}.{name}" if key else str(name), depth + 1)


def _among_others(path: Path, content: Any, own: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of a dictionary with plain values next to them, such as the number of an epoch, if they fit.

    Args:
        path: path of the file.
        content: what was in it.
        own: `state_dict` of the module that they are for; without one, it is not known what the file is.
    """
    parts = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): part for name, part in parts if isinstance(part, Tensor)}
    left = [str(name) for name, part in parts if not isinstance(part, Tensor)]
    if own is None or not fits(own, tensors) or any(isinstance(part, dict | list | tuple) for _, part in parts):
        return {}
    note = f"{path.name}: {few(left)} {'is no tensor and is' if len(left) == 1 else 'are no tensors and are'} left out"
    logger.info("%s.", printable(note, SENTENCE))
    return {"": tensors}


def _chosen(
    path: Path, state_dicts: dict[str, dict[str, Tensor]], own: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Returns the model's state dict among those of a file: the only one, the only one that fits, or the likeliest."""
    fitting = {key: weights for key, weights in state_dicts.items() if own is None or fits(own, weights)} or state_dicts
    likely = [key for wrapper in _WRAPPERS for key in fitting if key.split(".")[-1] == wrapper]
    key = next(iter(fitting)) if len(fitting) == 1 else next(iter(likely), None)
    if key is None:
        raise UnbackdoorError(
            f"{path} holds {len(state_dicts)} state dicts ({few(list(state_dicts))}), and it is unclear which of them "
            f"is the model's; one is expected. Save it alone: torch.save(torch.load({path.name!r})"
            f"[{printable(next(iter(state_dicts)))!r}], 'weights.pt')."
        )
    others = [each for each in state_dicts if each != key]
    if key:
        note = f"{path.name}: the weights under {key} are used"
        if others:
            note += f", those under {few(others)} are left out"
        logger.info("%s.", printable(note, SENTENCE))
    return fitting[key]


def _is_program(path: Path) -> bool:
    """Whether a file is an archive of torch.jit.save or torch.export.save."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                name.endswith(("/constants.pkl", "/archive_format")) or "/code/" in name for name in archive.namelist()
            )
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # torch.load refuses a damaged one


def _refused(path: Path, wanted: list[str]) -> UnbackdoorError:
    """Returns the error for a pickle that asks for more than tensors; it says what its owner could give instead."""
    key = next((each for each in _WRAPPERS if each in _strings(path)), None)
    if key is not None and all(map(_SETTINGS.fullmatch, wanted)):
        what = "NumPy objects" if wanted[0].startswith("numpy.") else "the settings of a training"
        return UnbackdoorError(
            f"{path} holds {what} ({wanted[0]}) besides its weights, but only tensors are read from a pickle. "
            "Ask its owner for the state dict alone, or, if nothing is at stake, save it: "
            f"torch.save(torch.load({path.name!r}, weights_only=False)[{key!r}], 'weights.pt')."
        )
    way_out = "Ask its owner for safetensors."
    if any(name.startswith("torch.nn.modules.") for name in wanted):
        way_out = "It is a whole module: ask its owner for model.state_dict() as safetensors, and give `factory`."
    return UnbackdoorError(f"{path} is a pickle that asks to run {wanted[0]}; it was not loaded. {way_out}")


def _asks_for(path: Path) -> list[str]:
    """Returns the globals in a pickle that a state dict does not need, in order, without running anything."""
    safe = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
    asked: dict[str, None] = {}
    try:
        for wanted in (name for stream in _streams(path) for name in _globals(stream)):
            if wanted not in safe and not (wanted.startswith("torch.") and wanted.endswith("Storage")):
                asked[wanted] = None
    except Exception:  # not a pickle, or a broken one: the caller names the part that could be read, and refuses it
        return list(asked)
    return list(asked)


def _strings(path: Path) -> set[str]:
    """Returns the strings in a pickle, the names of its entries among them, without running anything."""
    try:
        return {
            str(argument)
            for stream in _streams(path)
            for opcode, argument, _ in pickletools.genops(stream)
            if "UNICODE" in opcode.name
        }
    except Exception:  # a broken one; the caller refuses it anyway
        return set()


def _streams(path: Path) -> Iterator[BinaryIO]:
    """Returns the pickles of a PyTorch file: one in a zip archive, or five in a row in the older format."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield io.BytesIO(archive.read(name))
    else:
        with open_file(path) as file:
            for _ in range(5):
                yield file


def _globals(stream: BinaryIO) -> Iterator[str]:
    """Yields the `module.name` of everything that a pickle would import; its strings may come from its memo."""
    strings: list[str] = []  # in the order in which they were pushed
    memo: dict[Any, str | None] = {}
    top: str | None = None  # top of the stack, if it is a string
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
