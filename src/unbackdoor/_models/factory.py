"""Modules of the user: a function that builds one, and a file with its weights."""

import importlib.util
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import CONFIG, check_file, exists
from unbackdoor._models.arithmetic import HALF
from unbackdoor._models.calling import check_state
from unbackdoor._models.stored_types import keep_stored_types_
from unbackdoor._models.untrusted_weights import check_fractions, read_weights
from unbackdoor._models.weight_names import check_fit, lacking, renamed
from unbackdoor._models.weight_norms import detach_

logger = logging.getLogger("unbackdoor")


def make(factory: str) -> nn.Module:
    """Makes the module of `FILE.py:FUNCTION`."""
    file, _, function = factory.rpartition(":")
    if not file or not function:
        raise UnbackdoorError(f"`factory` must be FILE.py:FUNCTION, got {factory}.")
    if not exists(file):
        raise UnbackdoorError(f"`factory` names {file}, which does not exist. Give FILE.py:FUNCTION, a file of yours.")
    check_file(file, CONFIG)
    spec = importlib.util.spec_from_file_location("_unbackdoor_factory", file)
    if spec is None or spec.loader is None:
        raise UnbackdoorError(f"`factory` names {file}, which is not a Python file.")
    if isinstance(spec.loader, SourceFileLoader):
        spec.loader = _AsWritten(spec.name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    folder = str(Path(file).resolve().parent)
    sys.path.insert(0, folder)  # the file may import its neighbours, as a script may
    try:
        with _settings_kept():
            spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise UnbackdoorError(f"{file} has no function {function}. `factory` is FILE.py:FUNCTION.")
        with _settings_kept():
            model = getattr(module, function)()
    except (UnbackdoorError, KeyboardInterrupt):
        raise
    except BaseException as problem:  # the file is the user's own program and may do anything, even call sys.exit
        reason = printable(" ".join(f"{type(problem).__name__}: {problem}".split()), 300).rstrip(". :")
        raise UnbackdoorError(
            f"`factory` {factory} failed ({reason}). The function must make the module without arguments."
        ) from problem
    finally:
        sys.path.remove(folder)
    if not isinstance(model, nn.Module):
        raise UnbackdoorError(f"{factory} must return a torch.nn.Module, got {type(model).__name__}.")
    check_state(model, f"`factory` {factory} must return a module")
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    empty = next((name for name, tensor in tensors if is_lazy(tensor) or tensor.is_meta), None)
    if empty is not None:
        raise UnbackdoorError(
            f"{factory} returns a module whose {printable(empty)} has no memory yet, as in a lazy layer or on the "
            "meta device. Give its layers their sizes, or call a lazy module once before you return it."
        )
    return model


class _AsWritten(SourceFileLoader):
    """Compiles a file again: a compiled one may be stale if the file changed within a second and kept its length."""

    def get_code(self, fullname: str) -> CodeType:
        """Returns the code of the file as it is now."""
        return self.source_to_code(self.get_data(self.path), self.path)


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Restore settings of the process afterwards that a program may change, such as the current directory.

    Meanwhile nothing compiled is written next to the user's files, what the program prints goes to stderr, as stdout is
    for results, and it sees no arguments of the command, which it might take for its own.
    """
    folder, dtype, learning = Path.cwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    out, err, arguments, unwritten = sys.stdout, sys.stderr, sys.argv, sys.dont_write_bytecode
    sys.stdout, sys.argv, sys.dont_write_bytecode = err, arguments[:1], True
    try:
        yield
    finally:
        sys.argv, sys.dont_write_bytecode = arguments, unwritten
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(learning)
        sys.stdout, sys.stderr = out, err


def from_factory(path: Path, factory: str) -> nn.Module:
    """Returns the module of a factory with the weights of a file, in eval mode.

    Raises:
        UnbackdoorError: the factory fails, or the weights are damaged or do not fit its module.
    """
    model = make(factory)
    own = model.state_dict()
    weights = renamed(own, read_weights(path, own), str(path))
    extra = sorted(name for name in weights.keys() - own.keys() if name.split(".")[-1] not in _COUNTERS)
    shapes = [
        (name, tuple(weights[name].shape), tuple(own[name].shape))
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    check_fit(str(path), factory, lacking(own, weights), extra, sorted(shapes))
    fractions = {name for name, tensor in own.items() if tensor.is_floating_point()}
    check_fractions({name for name in fractions & weights.keys() if not weights[name].is_floating_point()}, str(path))
    model.load_state_dict(weights, strict=False)
    keep_stored_types_(model, weights)
    _note_types({name: (weights[name], own[name]) for name in fractions & weights.keys()}, path.name)
    detach_(model)
    return model.eval()


def _note_types(pairs: Mapping[str, tuple[Tensor, Tensor]], where: str) -> None:
    """Say in which types weights are computed and written, if those of the file are others than the module's.

    Args:
        pairs: by name, the tensor of the file and that of the module.
        where: the name of the file.
    """
    halved: set[str] = set()
    others: set[str] = set()
    for stored, own in pairs.values():
        if stored.dtype != own.dtype:
            narrower = stored.dtype in HALF and own.dtype not in HALF
            (halved if narrower else others).add(f"{_type(stored)} in the file and {_type(own)} in the module")
    if halved:
        logger.info(
            "%s: weights are %s, which is computed with. They are written as they came.",
            where,
            " and ".join(sorted(halved)),
        )
    if others:
        logger.info(
            "%s: weights are %s, whose type is kept. For the other one, let the factory return the module in it.",
            where,
            " and ".join(sorted(others)),
        )


# Buffers that the profiler thop leaves in a module: how many operations and parameters each layer has.
_COUNTERS = {"total_ops", "total_params"}


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
