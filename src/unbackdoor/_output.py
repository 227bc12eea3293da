"""Output directories: complete under their name, or not there at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unbackdoor._errors import IncompleteError, UnbackdoorError
from unbackdoor._inputs import unusable

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_free(out: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output directory that exists or cannot be made, before any work is done.

    With `overwrite` it may exist if this program wrote it (it holds a `record.json` or `stress.json`) or it is empty,
    and if it neither is nor holds one of the inputs.

    Raises:
        UnbackdoorError: says why.
    """
    if not out.exists() and not out.is_symlink():
        home = next(folder for folder in out.absolute().parents if folder.exists())
        if not (home.is_dir() and os.access(home, os.W_OK)):
            raise UnbackdoorError(f"{out} cannot be written ({home} is no folder to write to). Choose another --out.")
        return
    for given in inputs:
        if given.resolve() == out.resolve():
            raise UnbackdoorError(f"{out} is the input itself; --out must be another directory.")
        if out.resolve() in given.resolve().parents:
            raise UnbackdoorError(f"{out} holds the input {given}; --out must be another directory.")
    if not overwrite:
        raise UnbackdoorError(f"{out} exists. Use --overwrite, or another --out.")
    written = any((out / name).exists() for name in ("record.json", "stress.json"))
    ours = out.is_dir() and (written or not any(out.iterdir()))
    if not ours or out.is_symlink():
        raise UnbackdoorError(f"{out} was not written by unbackdoor (it has no record.json). Choose another --out.")


@contextmanager
def directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which takes its name in one step when the block ends well and vanishes when it does not.

    Raises:
        IncompleteError: the disk is full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as problem:
        raise _failure(out, problem) from None
    try:
        partial.chmod(0o755)
        yield partial
        for entry in partial.rglob("*"):
            entry.chmod(0o755 if entry.is_dir() else 0o644)  # transformers writes weights for the owner alone
        _replace(partial, out)
    except OSError as problem:
        raise _failure(out, problem) from None
    except Exception as problem:
        if type(problem).__name__ == "SafetensorError" and "os error" in str(problem):
            raise IncompleteError(
                f"{out} could not be written ({problem}); nothing was kept. Free some space."
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, out: Path) -> None:
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        os.rename(out, old / out.name)
        os.rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, out)


def write_file(path: Path, text: str) -> None:
    """Write a text file by temporary file and atomic rename.

    Raises:
        IncompleteError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as problem:
        raise _failure(path, problem) from None
    finally:
        partial.unlink(missing_ok=True)


def _failure(out: Path, problem: OSError) -> UnbackdoorError:
    if problem.errno in _FULL:
        return IncompleteError(
            f"{out} could not be written: {problem.strerror}. Nothing of it was kept; free some space."
        )
    if isinstance(problem.filename, str) and not _ours(Path(problem.filename), out):
        return unusable(problem.filename, problem)  # a file that was to be copied from elsewhere
    return UnbackdoorError(f"{out} cannot be written ({problem.strerror or problem}). Choose another --out.")


def _ours(path: Path, out: Path) -> bool:
    """Whether a path is that of an output, lies on the way to it, or is what it is called until it is complete."""
    return path in (out, *out.parents) or any(part.startswith(f".{out.name}.") for part in path.parts)
