"""How many processors a process may use, where a container limits their time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unbackdoor import _processors
from unbackdoor._processors import usable


def limits(root: Path, groups: str, **files: str) -> Path:
    """A root directory with the control groups of a process and their files; `/` is written as `__` in names."""
    files = {"proc__self__cgroup": groups, **{f"sys__fs__cgroup__{name}": text for name, text in files.items()}}
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def _sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_processors, "visible", lambda: 16)


def test_without_control_groups_all_visible_processors_are_usable(tmp_path: Path) -> None:
    assert usable(tmp_path) == 16


@pytest.mark.parametrize(
    ("quota", "processors"),
    [("200000 100000", 2), ("max 100000", 16), ("150000 100000", 1), ("50000 100000", 1), ("6400000 100000", 16)],
)
def test_the_limit_of_a_container(tmp_path: Path, quota: str, processors: int) -> None:
    root = limits(tmp_path, "0::/\n", **{"cpu.max": quota + "\n"})  # as docker and Kubernetes show it
    assert usable(root) == processors


def test_the_lowest_limit_of_the_groups_around_counts(tmp_path: Path) -> None:
    files = {"user.slice__cpu.max": "max 100000", "user.slice__a.scope__cpu.max": "800000 100000"}
    root = limits(tmp_path, "0::/user.slice/a.scope/b\n", **{"cpu.max": "400000 100000"}, **files)
    assert usable(root) == 4
    (root / "sys/fs/cgroup/user.slice/cpu.max").write_text("300000 100000")
    assert usable(root) == 3


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("place", ["/", "/docker/abc"])  # a container's own group is mounted, by whatever name
def test_limits_of_version_1(tmp_path: Path, mount: str, place: str) -> None:
    files = {f"{mount}__cpu.cfs_quota_us": "300000\n", f"{mount}__cpu.cfs_period_us": "100000\n"}
    root = limits(tmp_path, f"9:memory:/m\n4:{mount}:{place}\n0::/\n", **files)
    assert usable(root) == 3
    (root / "sys/fs/cgroup" / mount / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable(root) == 16


@pytest.mark.parametrize("text", ["", "two\n", "0 0", "100000"])
def test_files_of_another_form_limit_nothing(tmp_path: Path, text: str) -> None:
    assert usable(limits(tmp_path, "0::/\n", **{"cpu.max": text})) == 16


@pytest.mark.parametrize(("given", "threads"), [(None, "1"), ("2", "2")])
def test_torch_gets_as_many_threads_unless_the_user_decided(given: str | None, threads: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    code = (
        "from unbackdoor import _processors as p; p.visible, p.usable = (lambda: 2), (lambda: 1)\n"
        "from unbackdoor._cli.app import main\n"
        "try: main(['list', 'methods'])\n"
        "except SystemExit: pass\n"
        "import torch; print(torch.get_num_threads())"
    )
    if given is not None:
        environment["OMP_NUM_THREADS"] = given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == threads
