"""How much memory this process may still take: what the machine has left, or less where a container limits it."""

import sys
from collections.abc import Iterator
from pathlib import Path

from unbackdoor._errors import UnbackdoorError
from unbackdoor._processors import ROOT, groups, read

# The files of a control group with its limit, what it uses, and what of that are copies of files that can be dropped.
_LIMITS = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),  # version 1
)


def free(root: Path = ROOT) -> int | None:
    """Returns the bytes of memory that this process may still take, swap included; None if that is not known.

    Args:
        root: directory with `proc` and `sys` of Linux.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().available + psutil.swap_memory().free)
    machine = _numbers(read(root / "proc/meminfo").replace(":", ""))
    if "MemAvailable" not in machine:  # macOS, BSD
        return None
    left = 1024 * (machine["MemAvailable"] + machine.get("SwapFree", 0))
    return max(0, min([left, *_left_of_groups(root)]))


def check_memory(owner: str, needed: int, way_out: str) -> None:
    """Refuse what needs more memory than is free: the system would end this process without a word.

    Args:
        owner: the beginning of the sentence, `X needs` say.
        needed: bytes.
        way_out: its end.

    Raises:
        UnbackdoorError: names both numbers.
    """
    left = free()
    if left is not None and needed > left:
        raise UnbackdoorError(f"{owner} {shown(needed)} of memory, and {shown(left)} are free. {way_out}")


def shown(count: int) -> str:
    """Returns a number of bytes for a message.

    >>> shown(15 * 2**30 // 2), shown(3 * 2**20)
    ('7.5 GiB', '3.0 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _left_of_groups(root: Path) -> Iterator[int]:
    """What the control groups of this process leave, in bytes."""
    for folder in groups(root, "memory"):
        for limit, used, droppable in _LIMITS:
            try:
                most, taken = int(read(folder / limit)), int(read(folder / used))
            except ValueError:  # there is no such file, or no limit ("max")
                continue
            files = _numbers(read(folder / "memory.stat"))
            yield most - taken + sum(files.get(name, 0) for name in droppable)


def _numbers(text: str) -> dict[str, int]:
    """The number behind each name, one a line."""
    lines = [line.split() for line in text.splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
