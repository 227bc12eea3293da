"""How much memory a process may still take, where a container limits it."""

from pathlib import Path

import pytest

from unbackdoor._memory import free

MACHINE = (
    "MemTotal:       8000 kB\nMemFree: 100 kB\nMemAvailable:    4000 kB\nSwapFree:     500 kB\nHugePages_Total: 0\n"
)


def machine(root: Path, groups: str, **files: str) -> Path:
    """A root directory with the files of a machine and of control groups; `/` is written as `__` in names."""
    named = {"proc__meminfo": MACHINE, "proc__self__cgroup": groups}
    for name, text in (named | {f"sys__fs__cgroup__{name}": text for name, text in files.items()}).items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_memory_that_the_machine_has_left_with_its_swap(tmp_path: Path) -> None:
    assert free(machine(tmp_path, "")) == 4500 * 1024
    (tmp_path / "proc/meminfo").unlink()
    assert free(tmp_path) is None  # as on macOS


def test_the_limit_of_a_container_counts_without_copies_of_files(tmp_path: Path) -> None:
    files = {"memory.max": "1000000\n", "memory.current": "700000\n"}
    stat = {"memory.stat": "anon 500000\ninactive_file 150000\nactive_file 20000\n"}
    assert free(machine(tmp_path, "0::/\n", **files, **stat)) == 470_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert free(tmp_path) == 4500 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("100000\n")
    assert free(tmp_path) == 0


@pytest.mark.parametrize("place", ["/", "/docker/abc"])
def test_limits_of_version_1(tmp_path: Path, place: str) -> None:
    files = {"memory__memory.limit_in_bytes": "1000000", "memory__memory.usage_in_bytes": "900000"}
    stat = {"memory__memory.stat": "cache 5\ninactive_file 1\ntotal_inactive_file 50000\n"}
    assert free(machine(tmp_path, f"4:cpu:/x\n9:memory:{place}\n", **files, **stat)) == 150_000
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712")  # no limit
    assert free(tmp_path) == 4500 * 1024
