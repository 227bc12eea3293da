"""Output directories: complete under their name, or absent; other people's files are never touched."""

import errno
import itertools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unbackdoor._errors import IncompleteError, UnbackdoorError, few
from unbackdoor._inputs import is_unicode, kind_of, open_file, read_json, unusable
from unbackdoor._interrupts import held
from unbackdoor._memory import shown

logger = logging.getLogger("unbackdoor")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RECORDS = ("record.json", "stress.json", "audit.json", "guard.json")
_BEGINNING = 2**20  # bytes of a file in which its mark stands

Content = dict[str, tuple[int, ...]]


def check_free(out: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> Content | None:
    """Refuse an output directory that exists or cannot be made, before any work is done.

    With `overwrite` it may exist, if it is empty or if this program wrote all of its files (as its `record.json`,
    `stress.json`, `audit.json` or `guard.json` lists them), and if it neither is nor contains one of the inputs.

    A warning names what a killed run left next to it.

    Returns:
        The present content of the directory, which `directory` may replace; None if there is no directory.

    Raises:
        UnbackdoorError: the directory exists or cannot be made.
    """
    if not is_unicode(str(out.absolute())):
        raise UnbackdoorError(f"{out} is not a name in UTF-8, which safetensors could write to. Choose another `out`.")
    if not os.path.lexists(out):
        _check_place(out)
        _warn_of_left(out)
        return None
    for source in inputs:
        if source.resolve() == out.resolve():
            raise UnbackdoorError(f"{out} is the input itself; `out` must be another directory.")
        if out.resolve() in source.resolve().parents:
            raise UnbackdoorError(f"{out} holds the input {source}; `out` must be another directory.")
    if not overwrite:
        raise UnbackdoorError(f"{out} exists. Use `overwrite=True`, or another `out`.")
    if out.is_symlink():
        raise UnbackdoorError(f"{out} is a link, which is not replaced. Choose another `out`, or the folder it names.")
    record = next((out / name for name in _RECORDS if (out / name).is_file()), None)
    if not out.is_dir() or (record is None and any(out.iterdir())):
        raise UnbackdoorError(f"{out} was not written by unbackdoor (it has no record.json). Choose another `out`.")
    _check_place(out)
    _warn_of_left(out)
    held = content(out)
    if record is not None:
        listed = read_json(record).get("files")
        own = {record.name, *(map(str, listed) if isinstance(listed, list) else ())}
        own |= {str(folder) for name in own for folder in Path(name).parents}
        others = sorted(held.keys() - own)
        if others:
            raise UnbackdoorError(
                f"{out} holds what {record.name} does not list, and so may be somebody else's ({few(others)}). Move "
                "it away, or choose another `out`."
            )
    return held


def _warn_of_left(out: Path) -> None:
    """Name what runs that could not clean up (SIGKILL, no memory) left next to an output.

    Nothing is removed: another run may be writing it, perhaps on another machine.
    """
    hidden = re.compile(rf"\.{re.escape(out.name)}\.(partial|old)-[a-z0-9_]{{8}}")  # as `mkdtemp` names them
    with suppress(OSError):  # they may go meanwhile
        for folder in sorted(out.parent.iterdir()):
            kind = hidden.fullmatch(folder.name)
            if kind is None or folder.is_symlink() or not folder.is_dir():
                continue
            size = shown(sum(file.lstat().st_size for file in folder.rglob("*")))
            if kind[1] == "partial":
                logger.warning(
                    "%s (%s) is what a killed run left of %s. Remove it, unless another run is writing it.",
                    folder,
                    size,
                    out,
                )
            elif (folder / "old").is_dir():
                logger.warning(
                    "%s (%s) is an earlier %s: a run was killed as it replaced it. Move it back, or remove it, unless "
                    "another run is replacing it.",
                    folder / "old",
                    size,
                    out,
                )


def check_free_file(file: Path, option: str, *, overwrite: bool, inputs: tuple[Path, ...] = (), mark: str = "") -> None:
    """Refuse a file that cannot be written, or that is somebody else's, before any work is done.

    With `overwrite` it may exist, if it is a file of ours, or empty, and not an input.

    Args:
        file: its name.
        option: the parameter that names it.
        overwrite: whether a file of that name may be replaced.
        inputs: what is read.
        mark: is among the first characters of each file of this kind that unbackdoor wrote.

    Raises:
        UnbackdoorError: it exists or cannot be made.
    """
    if os.path.isdir(file):
        raise UnbackdoorError(f"`{option}` must be a file, got the folder {file}.")
    if any(source.resolve() == file.resolve() for source in inputs):
        raise UnbackdoorError(f"{file} is an input; `{option}` must be another file.")
    if os.path.lexists(file):
        if not overwrite:
            raise UnbackdoorError(f"{file} exists. Use `overwrite=True`, or another `{option}`.")
        _check_replaceable(file, option, mark)
    _check_place(file, option)


def _check_replaceable(file: Path, option: str, mark: str) -> None:
    """Refuse to replace what is no file, or what unbackdoor did not write.

    Raises:
        UnbackdoorError: it is a link, a device, a pipe, or somebody else's file.
    """
    if file.is_symlink():
        raise UnbackdoorError(
            f"{file} is a link, which is not replaced. Choose another `{option}`, or the file it names."
        )
    if not file.is_file():
        raise UnbackdoorError(f"{file} is {kind_of(file)}, which is not replaced. Choose another `{option}`.")
    with open_file(file) as stored:
        beginning = stored.read(_BEGINNING).decode("utf-8", "replace")
    if beginning and mark not in beginning:
        raise UnbackdoorError(f"{file} was not written by unbackdoor. Choose another `{option}`.")


def _check_place(out: Path, option: str = "out") -> None:
    """Make a directory where `directory` or `write_file` will make something, with a name as long, and remove it.

    Raises:
        UnbackdoorError: none can be made.
    """
    home = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise UnbackdoorError(
            f"{out} cannot be written ({home} is not a folder to write to). Choose another `{option}`."
        )
    try:
        with held(), tempfile.TemporaryDirectory(prefix=".partial-", dir=home) as trial:
            folder = Path(trial) / out.absolute().relative_to(home).parent
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=folder)
    except OSError as problem:
        raise _failure(out, problem, option) from None


def content(folder: Path) -> Content:
    """The files and folders in a folder at any depth, by their path in it: inode, length and age of each."""
    held: Content = {".": (folder.stat().st_ino,)}
    for path in folder.rglob("*"):
        status = path.lstat()
        age = () if path.is_dir() and not path.is_symlink() else (status.st_size, status.st_mtime_ns)
        held[str(path.relative_to(folder))] = (status.st_ino, *age)
    return held


Elsewhere = Callable[[Path, Path], None]


def _as_it_is(folder: Path, name: Path) -> None:
    """Change nothing."""


@contextmanager
def directory(out: Path, replacing: Content | None = None, elsewhere: Elsewhere = _as_it_is) -> Iterator[Path]:
    """A directory to fill. It gets its name in one step if the block ends well, and is removed if it does not.

    Files that appeared or changed at that place meanwhile are kept: then the result gets another name.

    Args:
        out: name of the directory.
        replacing: the present content, as `check_free` returns it; it is removed when the block ends.
        elsewhere: called with the directory and its other name before it gets that, to change what names `out` in it.

    Raises:
        IncompleteError: the disk is full, it cannot be written, or something else got that name meanwhile.
    """
    partial, missing = None, _missing(out)
    try:
        with held():
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        partial.chmod(0o755)
        yield partial
        for entry in partial.rglob("*"):
            entry.chmod(0o755 if entry.is_dir() else 0o644)  # transformers writes weights for the owner alone
        with held():
            _place(partial, out, replacing, elsewhere)
    except OSError as problem:
        raise _incomplete(out, problem) from None
    except IncompleteError as problem:  # of a part, by the name of the directory that is removed
        raise IncompleteError(str(problem).replace(str(partial), str(out))) from None
    except Exception as problem:
        if type(problem).__name__ == "SafetensorError" and "os error" in str(problem):
            raise IncompleteError(
                f"{out} could not be written ({problem}); nothing was kept. Free some space."
            ) from None
        raise
    finally:
        with held():
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            _remove_empty(missing)


def _missing(path: Path) -> list[Path]:
    """The folders above a path that are not there, the deepest first."""
    return [folder for folder in path.absolute().parents if not os.path.lexists(folder)]


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders that are empty, up to the first that is not."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _place(partial: Path, out: Path, replacing: Content | None, elsewhere: Elsewhere) -> None:
    """Give a complete directory its name, and remove the content that is to be replaced, if it is unchanged."""
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    old = aside / "old"
    try:
        if replacing is not None:
            with suppress(FileNotFoundError):  # somebody else removed it
                os.rename(out, old)
        unchanged = not os.path.lexists(old) or (old.is_dir() and content(old) == replacing)
        if not (unchanged and _renamed(partial, out)):
            names = (out.with_name(f"{out.name}-{number}") for number in itertools.count(2))
            other = next(name for name in names if _renamed(partial, name, elsewhere))
            raise IncompleteError(
                f"{out} was made or changed by something else meanwhile, and stays as it is. The result is in {other}."
            )
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if os.path.lexists(old):
            with suppress(OSError):  # if its name is in use again, it keeps the other name
                os.rename(old, out)
        with suppress(OSError):
            aside.rmdir()


def _renamed(partial: Path, name: Path, first: Elsewhere = _as_it_is) -> bool:
    """Rename a directory to an unused name, in one step; False if the name was in use."""
    if os.path.lexists(name):  # also a broken link
        return False
    try:
        first(partial, name)
        os.rename(partial, name)  # of what may have appeared since, it replaces an empty directory, and nothing else
    except OSError as problem:
        if problem.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def write_file(path: Path, text: str, option: str = "out") -> None:
    """Write a text file by temporary file and atomic rename.

    Args:
        path: of the file.
        text: its content.
        option: the parameter that names it.

    Raises:
        IncompleteError: the disk is full, or it cannot be written.
    """
    partial, missing = None, _missing(path)
    try:
        with held():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as problem:
        raise _incomplete(path, problem, option) from None
    finally:
        with held():
            if partial is not None:
                Path(partial).unlink(missing_ok=True)
            _remove_empty(missing)


def _incomplete(out: Path, problem: OSError, option: str = "out") -> UnbackdoorError:
    """What is said after the work."""
    failure = _failure(out, problem, option)
    return failure if isinstance(failure, IncompleteError) else IncompleteError(failure)


def _failure(out: Path, problem: OSError, option: str) -> UnbackdoorError:
    if problem.errno in _FULL:
        return IncompleteError(
            f"{out} could not be written: {problem.strerror}. Nothing of it was kept; free some space."
        )
    if isinstance(problem.filename, str) and not _ours(Path(problem.filename), out):
        return unusable(problem.filename, problem)  # a file that was to be copied from elsewhere
    return UnbackdoorError(f"{out} cannot be written ({problem.strerror or problem}). Choose another `{option}`.")


def _ours(path: Path, out: Path) -> bool:
    """Whether a path is an output, one of its parents, or the temporary name of an output."""
    return path in (out, *out.parents) or any(part.startswith((f".{out.name}.", ".partial-")) for part in path.parts)
