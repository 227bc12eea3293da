"""The place of a store: a folder, or an fsspec address. Both keep a file whole or not at all."""

import atexit
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from unbackdoor._artifacts.directories import content, directory, write_file
from unbackdoor._errors import IncompleteError, UnbackdoorError
from unbackdoor._inputs import RECORD, exists, read_file


class Place(Protocol):
    """The functions that a store needs of its place. Names are `kind/file`.

    Args:
        near: whether listing a folder costs nothing.
    """

    near: bool

    def names(self, kind: str) -> set[str]:
        """The finished files of a kind, without their suffix."""

    def path(self, name: str) -> str:
        """A file's address, for messages."""

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file."""

    def read_all(self, names: list[str]) -> Iterator[bytes | None]:
        """The contents of many files, in their order."""

    def write(self, name: str, content: str) -> None:
        """Write a file in one step."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def put_folder(self, name: str, fill: Callable[[Path], None]) -> None:
        """Write a folder in one step."""

    def get_folder(self, name: str) -> Path | None:
        """A folder on this machine, fetched if need be; None if there is no such folder."""

    @contextmanager
    def locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Lock a name against other processes; yields whether the lock was obtained."""


def place(address: str | Path) -> "Place":
    """Returns the place of a folder, or of an fsspec address such as `s3://bucket/runs`."""
    if not str(address):  # for Path, this is the current directory
        raise UnbackdoorError("`out` must be a folder or an address, got an empty name.")
    return Remote(str(address)) if "://" in str(address) else Folder(Path(address))


class Folder:
    """A folder. Files appear by rename; locks are the system's own, so they end with their process."""

    near = True

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise UnbackdoorError(f"{root} is a file, but a store is a folder. Choose another `out`.")
        self.root = root

    def names(self, kind: str) -> set[str]:
        """The names of all files of a kind, without their endings."""
        try:
            with os.scandir(self.root / kind) as entries:
                return {entry.name.partition(".")[0] for entry in entries if not entry.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def path(self, name: str) -> str:
        """The address of a file, for messages and records."""
        return str(self.root / name)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        path = self.root / name
        try:
            return read_file(path, RECORD) if exists(path) else None
        except UnbackdoorError:
            if exists(path):
                raise
            return None  # another process has just removed it

    def read_all(self, names: list[str]) -> Iterator[bytes | None]:
        """The contents of many files, in order; None for each that is missing."""
        return map(self.read, names)

    def write(self, name: str, content: str) -> None:
        """Write a file, complete or not at all."""
        write_file(self.root / name, content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def put_folder(self, name: str, fill: Callable[[Path], None]) -> None:
        """Write a folder, complete or not at all; `fill` puts the files into it."""
        earlier = content(self.root / name) if (self.root / name).is_dir() else None
        with directory(self.root / name, earlier) as folder:
            fill(folder)

    def get_folder(self, name: str) -> Path | None:
        """A folder on this machine with the files of one that was put; None if there is none."""
        folder = self.root / name
        return folder if folder.is_dir() else None

    @contextmanager
    def locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Lock a name while the block runs; yields False if another process has it and `wait` is off."""
        from filelock import FileLock, Timeout

        file = self.root / "locks" / name.replace("/", "-")
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            # A process that waits for the removed file has its lock while another locks a new file of that name. Both
            # check first whether the work is done, so at worst a cell is measured twice.
            file.unlink(missing_ok=True)
            lock.release()


BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "az", "oss")  # kinds of stores that do not make their first folder


class Remote:
    """An fsspec address, with one put per file and no locks: two runs may measure a cell twice, with equal results."""

    near = False

    def __init__(self, address: str) -> None:
        try:
            from fsspec.core import url_to_fs

            # s3fs answers a read from its listing, which misses the files that other processes wrote after it.
            self.files, self.root = url_to_fs(address, use_listings_cache=False)
        except (ImportError, ValueError) as problem:
            raise UnbackdoorError(
                f"{address} cannot be opened ({problem}). Install unbackdoor[store], or choose another `out`."
            ) from None
        self.address = address.rstrip("/")
        kind = address.partition("://")[0]
        bucket = self.root.partition("/")[0]
        try:
            there = kind not in BUCKETS or self.files.exists(bucket)
        except Exception as problem:  # each kind of store has its own
            reason = " ".join(str(problem).split()) or type(problem).__name__
            raise UnbackdoorError(
                f"{address} cannot be reached ({reason[:200]}). Check the address and the network."
            ) from None
        if not there:
            raise UnbackdoorError(
                f"{address} has no bucket {bucket}, or it may not be seen. Make it, or choose another."
            )
        self.fetched: dict[str, Path] = {}

    def names(self, kind: str) -> set[str]:
        """The names of all files of a kind, without their endings."""
        try:
            names = self.files.ls(f"{self.root}/{kind}", detail=False)
        except FileNotFoundError:
            return set()
        return {str(name).rpartition("/")[2].partition(".")[0] for name in names} - {""}

    def path(self, name: str) -> str:
        """The address of a file, for messages and records."""
        return f"{self.address}/{name}"

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            content: bytes = self.files.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None
        return content

    def read_all(self, names: list[str]) -> Iterator[bytes | None]:
        """The contents of many files, in order; None for each that is missing."""
        for start in range(0, len(names), 1000):
            part = [f"{self.root}/{name}" for name in names[start : start + 1000]]
            contents: dict[str, Any] = self.files.cat(part, on_error="return")
            for name in part:
                content = contents.get(name)
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
                yield None if isinstance(content, Exception) else content

    def write(self, name: str, content: str) -> None:
        """Write a file, complete or not at all."""
        self._put(name, content.encode())

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.files.exists(f"{self.root}/{name}"):
            self.files.rm_file(f"{self.root}/{name}")

    def put_folder(self, name: str, fill: Callable[[Path], None]) -> None:
        """Write a folder as one archive; `fill` puts the files into it."""
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder))
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as tar:
                tar.add(folder, arcname=".")
        self._put(f"{name}.tar", packed.getvalue())

    def get_folder(self, name: str) -> Path | None:
        """The files of an archive that was put, in a folder of this process; None if there is none."""
        if name not in self.fetched:
            content = self.read(f"{name}.tar")
            if content is None:
                return None
            folder = Path(tempfile.mkdtemp(prefix="unbackdoor-victim-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                tar.extractall(folder, filter="data")
            self.fetched[name] = folder
        return self.fetched[name]

    @contextmanager
    def locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Yield True at once: there are no locks here."""
        yield True

    def _put(self, name: str, content: bytes) -> None:
        if "file" in (self.files.protocol if isinstance(self.files.protocol, tuple) else (self.files.protocol,)):
            self.files.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
        try:
            self.files.pipe_file(f"{self.root}/{name}", content)
        except OSError as problem:
            reason = " ".join(str(problem).split())
            raise IncompleteError(f"{self.path(name)} could not be written: {reason[:200]}.") from None
