"""The files with the weights of a model directory: finding and checking them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import check_file, read_json
from unbackdoor._models.building import Extent
from unbackdoor._models.untrusted_weights import (
    TensorLocation,
    check_finite,
    check_fractions,
    check_safetensors,
    foreign,
    read_weights,
)

# Beginnings of names of files that a training writes, with the ending of weights, but without weights.
_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model directory: one file, or several with an index.

    Args:
        files: sorted by name.
        pickled: whether they are pickles; otherwise they are safetensors files.
        index: the file that assigns tensors to files; None if there is only one file.
        locations: places of the tensors, by file and name; empty for pickles.
        extent: size of their content.
    """

    files: tuple[Path, ...]
    pickled: bool
    index: Path | None
    extent: Extent
    locations: dict[Path, dict[str, TensorLocation]] = field(default_factory=dict)

    def read(self) -> dict[str, Tensor]:
        """Reads all tensors by name, on the CPU."""
        parts = [read_weights(file) if self.pickled else load_file(file) for file in self.files]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def check_finite(self) -> None:
        """Refuse NaN and infinite weights in safetensors files, with one tensor at a time in memory."""
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no dictionary
                    check_finite({name: opened.get_tensor(name)}, str(file))


def weight_files(path: Path) -> WeightFiles:
    """Find the weights of a model directory and check them: of safetensors files the headers, of pickles everything.

    Raises:
        UnbackdoorError: there are none, or a file is missing, damaged or asks to run code.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if os.path.lexists(whole):
        return _safetensors_files((whole,), None)
    if os.path.lexists(index):
        weight_map = _weight_map(path, index)
        weights = _safetensors_files(_shards(path, weight_map), index)
        for name, part in weight_map.items():
            if name not in weights.locations[path / part]:
                raise UnbackdoorError(
                    f"{path} lists {printable(name)} in the shard {printable(part)}, which lacks it. Fetch it again."
                )
        return weights
    whole, index = path / "pytorch_model.bin", path / "pytorch_model.bin.index.json"
    if os.path.lexists(whole):
        return _pickles((whole,), None)
    if os.path.lexists(index):
        return _pickles(_shards(path, _weight_map(path, index)), index)
    raise _no_weights(path)


def _safetensors_files(files: tuple[Path, ...], index: Path | None) -> WeightFiles:
    locations = {file: check_safetensors(file) for file in files}
    for file, tensors in locations.items():
        whole = {name for name, part in tensors.items() if not part.fractional and name.endswith(".weight")}
        check_fractions(whole, str(file))
    shapes = [location.shape for tensors in locations.values() for location in tensors.values()]
    widest = max((side for shape in shapes for side in shape), default=0)
    extent = Extent(sum(file.stat().st_size for file in files), len(shapes), widest)
    return WeightFiles(files, False, index, extent, locations)


def _pickles(files: tuple[Path, ...], index: Path | None) -> WeightFiles:
    for file in files:
        weights = read_weights(file)
        whole = {name for name, part in weights.items() if not part.is_floating_point() and name.endswith(".weight")}
        check_fractions(whole, str(file))
    extent = Extent(
        sum(check_file(file).stat().st_size for file in files), 10_000, None
    )  # pickles have no header to count tensors in
    return WeightFiles(files, True, index, extent)


def _weight_map(path: Path, index: Path) -> dict[str, str]:
    """Returns the file of each tensor, from an index.

    Raises:
        UnbackdoorError: the index is incomplete, or a file is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(part, str) for part in weight_map.values())
    ):
        raise UnbackdoorError(f"{index} does not say which file holds which tensor. Fetch it again.")
    for file in _shards(path, weight_map):
        if file.parent != path or not os.path.lexists(file):
            raise UnbackdoorError(f"{path} lists the shard {printable(file.name)}, which is missing. Fetch it again.")
    return weight_map


def _shards(path: Path, weight_map: dict[str, str]) -> tuple[Path, ...]:
    return tuple(path / part for part in sorted(set(weight_map.values())))


def _no_weights(path: Path) -> UnbackdoorError:
    """Returns the error for a directory without weights under the usual names; it names files that may be meant."""
    others = sorted(file for file in path.iterdir() if foreign(file))
    if others:
        return UnbackdoorError(
            f"{path} has its weights for {foreign(others[0])} only ({printable(others[0].name)}); model.safetensors is "
            "expected. Convert it, or ask its owner for PyTorch weights."
        )
    endings = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # the likeliest first
    named = [file.name for file in sorted(path.iterdir(), key=lambda file: file.suffix != endings[0])]
    named = [name for name in named if name.endswith(endings) and not name.startswith(_TRAINING)]
    if named:
        expected = "model.safetensors" if named[0].endswith(endings[0]) else "pytorch_model.bin"
        return UnbackdoorError(
            f"{path} has no model.safetensors, but {printable(named[0])}. If it holds the model's weights, rename "
            f"it to {expected}."
        )
    return UnbackdoorError(f"{path} has no model.safetensors (nor pytorch_model.bin). Fetch it again.")
