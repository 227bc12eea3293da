"""Untrusted files: only regular ones, of a bounded size, are opened, and opening never waits."""

import errno
import functools
import inspect
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from unbackdoor._errors import UnbackdoorError, printable

P = ParamSpec("P")
T = TypeVar("T")

MEBIBYTE = 2**20

# Bounds by kind, in bytes, each many times larger than in any published model or data set.
CONFIG = 16 * MEBIBYTE  # config.json, preprocessor_config.json, a grid, a Python file
RECORD = 64 * MEBIBYTE  # files that list rows or tensors: attack.json, record.json, an index, a cell of a store
COMPANION = 256 * MEBIBYTE  # a file that is copied with a model
PICTURE = 128 * MEBIBYTE  # one encoded picture
TABLE = 64 * 1024 * MEBIBYTE  # parquet, CSV, JSON lines: these are read in parts

_FLAGS = os.O_RDONLY
for _name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"):  # the first two are not on Windows, the third is only there
    _FLAGS |= getattr(os, _name, 0)

# How files begin that stand in for others: what git leaves without LFS, and what a server answers with.
_POINTER = b"version https://git-lfs"
_PAGE = (b"<!doctype html", b"<html")
_PROSE = ("", ".md", ".txt", ".html", ".htm")  # a card, a licence: these may be pages

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_file(path: str | Path, most: int | None = None) -> Path:
    """Refuse anything but a regular file: reading a pipe or a device may never end, or never begin.

    A library that takes a path may open it after this.

    Args:
        path: path of a file, or of a link to one.
        most: largest number of bytes; None for no bound, if only parts of it are read.

    Raises:
        UnbackdoorError: the file does not exist, is not a regular one, cannot be read, or is longer; or it only stands
            in for a file that was not fetched.
    """
    open_file(path, most).close()
    return Path(path)


def open_file(path: str | Path, most: int | None = None) -> BufferedReader:
    """A regular file, open for reading; see `check_file`."""
    path = Path(path)
    try:
        status = path.stat()
        readable = os.access(path, os.R_OK)
    except (OSError, ValueError) as problem:
        raise unusable(path, problem) from None
    _check(path, status, most)
    if not readable:
        raise UnbackdoorError(f"{path} cannot be read (Permission denied). Check who may read it.")
    try:
        # Without O_NONBLOCK, a named pipe that has just taken the file's place would wait for somebody to write to it.
        file = os.fdopen(os.open(path, _FLAGS), "rb")
    except OSError as problem:
        raise unusable(path, problem) from None
    try:
        _check(path, os.fstat(file.fileno()), most)
        _check_stand_in(path, file)
    except BaseException:
        file.close()
        raise
    return file


def read_file(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes; see `check_file`."""
    with open_file(path, most) as file:
        try:
            content = file.read(most + 1)  # files in /proc claim to be empty, but are not
        except OSError as problem:
            raise unusable(Path(path), problem) from None
    if len(content) > most:
        raise _too_long(Path(path), len(content), most)
    return content


def read_text(path: str | Path, most: int) -> str:
    """The content of a regular text file in UTF-8; see `check_file`."""
    try:
        return read_file(path, most).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise UnbackdoorError(
            f"{path} is not text in UTF-8 ({problem.reason} at byte {problem.start:,}). Fetch it again, or save it "
            "as UTF-8."
        ) from None


def read_json(path: Path, most: int = RECORD) -> dict[str, Any]:
    """A JSON object of at most so many bytes.

    Raises:
        UnbackdoorError: the file holds no JSON object, or one that is nested too deeply or has invalid text.
    """
    return parsed(read_text(path, most), path)


def parsed(text: str, path: object) -> dict[str, Any]:
    """The JSON object of a text; see `read_json`.

    Args:
        text: of a file.
        path: path of the file, for messages.
    """
    content = any_json(text, path)
    if not isinstance(content, dict):
        raise UnbackdoorError(f"{path} must hold a JSON object, got {type(content).__name__}. Fetch it again.")
    return content


def any_json(text: str, path: object) -> Any:
    """The content of a text in JSON, of whatever kind; see `parsed`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:  # also of a number with thousands of digits
        raise UnbackdoorError(f"{path} is not valid JSON ({printable(problem)}). Fetch it again.") from None
    _check_json(path, content)
    return content


def _check_json(path: object, content: Any) -> None:
    """Refuse JSON that can be read, but on which functions fail that go through it or write it."""
    level: list[Any] = [content]
    for _ in range(100):
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                below += entry
                below += entry.values()
            elif isinstance(entry, list):
                below += entry
            elif isinstance(entry, str) and not entry.isascii():
                try:
                    entry.encode()
                except UnicodeEncodeError:
                    raise UnbackdoorError(
                        f"{path} has text that is not valid Unicode ({printable(entry)}). Fetch it again."
                    ) from None
        if not below:
            return
        level = below
    raise UnbackdoorError(f"{path} is nested more than 100 levels deep. Fetch it again.")


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn everything that a library raises while it reads an untrusted file into an error about that file.

    Only the reading of one input belongs in the block, so that a fault of this program stays a traceback.

    Args:
        what: the input, for messages.

    Raises:
        UnbackdoorError: names the input, and the exception.
    """
    try:
        yield
    except (UnbackdoorError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as problem:  # a panic of Rust is not an Exception
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(problem, MemoryError) or "alloc" in str(problem) or "out of memory" in str(problem):
            raise UnbackdoorError(
                f"{what} needs more memory than there is. Take a smaller one, or a machine with more."
            ) from problem
        reason = " ".join(str(problem).split("\n")[0].split()).rstrip(". ")
        reason = printable(f"{type(problem).__name__}: {reason}" if reason else type(problem).__name__, 200)
        raise UnbackdoorError(f"{what} cannot be read ({reason}). Fetch it again, or ask its owner.") from problem


def reader(source: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Turn everything that a function raises while it reads an untrusted input into an error about it; see `reading`.

    Args:
        source: the parameter of the function that names the input.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def guarded(*arguments: P.args, **named: P.kwargs) -> T:
            path = signature.bind_partial(*arguments, **named).arguments.get(source, source)
            with reading(", ".join(map(str, path)) if isinstance(path, list | tuple) else path):
                return function(*arguments, **named)

        return guarded

    return decorate


@contextmanager
def silent_rust() -> Iterator[None]:
    """Hide the lines that Rust's libraries write to stderr when they panic: the error that follows says it once."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def exists(path: str | Path) -> bool:
    """Whether a path exists; one that no file can have (too long, or with a null character) does not."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def kind_of(path: Path) -> str:
    """What is at a path that is no regular file, in words."""
    return _kind(path.stat())


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair; names of files that are not in UTF-8 have some."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unusable(path: str | Path, problem: Exception) -> UnbackdoorError:
    """The error about a path that the system cannot open."""
    if isinstance(problem, FileNotFoundError) and Path(path).is_symlink():
        return UnbackdoorError(
            f"{path} is a link to a file that is not there. Fetch that file, or copy what links name (cp -rL)."
        )
    if isinstance(problem, FileNotFoundError | NotADirectoryError):
        return UnbackdoorError(f"{path} does not exist. Check its name.")
    reason = printable(getattr(problem, "strerror", None) or problem)
    return UnbackdoorError(f"{path} cannot be read ({reason}). Check its name and who may read it.")


def _check(path: Path, status: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnbackdoorError(f"{path} must be a regular file, got {_kind(status)}. Give the file itself.")
    if most is not None and status.st_size > most:
        raise _too_long(path, status.st_size, most)


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")


def _check_stand_in(path: Path, file: BufferedReader) -> None:
    """Refuse what is often there in place of a file that was not fetched; nothing is taken from the file."""
    try:
        start = file.peek(64)[:64].lstrip().lower()
    except OSError as problem:
        raise unusable(path, problem) from None
    if start.startswith(_POINTER):
        raise UnbackdoorError(f"{path} is a pointer of Git LFS, not the file itself. Fetch that by git lfs pull.")
    if start.startswith(_PAGE) and path.suffix.lower() not in _PROSE:
        raise UnbackdoorError(
            f"{path} is a web page, not the file that its name promises. Fetch it again; its address may need a login."
        )


def _too_long(path: Path, length: int, most: int) -> UnbackdoorError:
    return UnbackdoorError(
        f"{path} must have at most {most:,} bytes, got {length:,}{' or more' if length == most + 1 else ''}. "
        "No file of its kind is that long; check what it is."
    )
