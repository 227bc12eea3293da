"""How many processors this process may use: of those in the machine, those that a container's limits leave.

Torch starts a thread for each processor that it sees. Limits on processor time (`docker run --cpus 2`, a pod's
`limits`, `CPUQuota` of systemd) do not hide processors: 64 threads then share the time of two, and wait for each other.
"""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def visible() -> int:
    """Returns the number of processors that this process may run on, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable(root: Path = ROOT) -> int:
    """Returns the number of processors whose time this process may use, at least 1; part of one is left out.

    Args:
        root: directory with `proc` and `sys` of Linux; where they are missing, there are no limits.
    """
    return max(1, int(min([visible(), *_quotas(root)])))


def limit_threads() -> None:
    """Let torch, which is imported later, start as many threads as processors are usable, unless the user decided."""
    if "OMP_NUM_THREADS" not in os.environ and (threads := usable()) < visible():
        os.environ["OMP_NUM_THREADS"] = str(threads)


def groups(root: Path, controller: str, *mounts: str) -> Iterator[Path]:
    """Returns the folders of this process's control groups (versions 1 and 2) and of those that they lie in.

    Args:
        root: directory with `proc` and `sys` of Linux; where they are missing, there are none.
        controller: what the groups limit: `cpu` or `memory`.
        mounts: other names under which version 1 has it.
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = Path(place.strip("/"))
        for mount in dict.fromkeys((controllers, controller, *mounts) if controllers else ("", "unified")):
            yield from (root / "sys/fs/cgroup" / mount / each for each in (group, *group.parents))


def _quotas(root: Path) -> Iterator[float]:
    """The limits of this process's control groups, in processors."""
    for folder in groups(root, "cpu", "cpu,cpuacct"):
        yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """The limit of one control group, in processors, if it has one."""
    parts = read(folder / "cpu.max").split()  # version 2: "200000 100000" or "max 100000"
    if not parts:
        parts = [read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]  # version 1: -1 is no limit
    try:
        quota, period = (int(part) for part in parts)
    except ValueError:
        return
    if quota > 0 and period > 0:
        yield quota / period


def read(path: Path) -> str:
    """Returns the text of a file; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
