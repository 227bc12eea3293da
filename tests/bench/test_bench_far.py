"""Grids on a Ray cluster and in an object store: real ones, started here with their own tools."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import Refusals, run
from unbackdoor import Dataset, UnbackdoorError
from unbackdoor._bench import Store, identity
from unbackdoor._bench.run import bench
from unbackdoor._bench.schema import Resources
from unbackdoor._bench.workers import Cluster

if any(importlib.util.find_spec(name) is None for name in ("ray", "moto", "s3fs", "flask")):
    pytest.skip("ray, moto[server] or s3fs is not installed", allow_module_level=True)

GRID = """
seeds = [0, 1]
[tasks.digits]
train = "train.jsonl"
test = "test.jsonl"
held_out = 40
width = 2
epochs = 1
precision = "fp32"
[[attacks]]
name = "badnets"
rate = 0.1
[[methods]]
name = "fine-tuning"
epochs = 2
[[budgets]]
n = 30
[resources]
cpus = 1
"""

# Slow enough on the cluster to be under way when its node is lost.
SLOW = """
import os, time
from unbackdoor._value import value

@value
class Slow:
    "Takes its time."
    def __call__(self, model, clean, run):
        time.sleep(float(os.environ["SECONDS"]))
        run.tune(model, clean, epochs=1)
        return model
"""

# Starts a cluster of two nodes on this machine, says where it is, and loses a node on request.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
second = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(second, allow_graceful=False)
print("lost", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def place(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a grid and a slow method."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("far")
    for name, rows in (("train", range(200)), ("test", range(200, 300))):
        lines = []
        for row in rows:
            Image.fromarray(digits.pixels[row, 0].numpy()).save(folder / f"{row}.png")
            lines.append(json.dumps({"image": f"{row}.png", "label": int(digits.labels[row])}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "near.toml").write_text(GRID)
    (folder / "slow.toml").write_text(GRID.replace("[0, 1]", "[0, 1, 2]") + '[[methods]]\nname = "bench_slow:Slow"\n')
    (folder / "bench_slow.py").write_text(SLOW)
    return folder


def environment(place: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *sys.path]), "OMP_NUM_THREADS": "1", **more}


def command(path: Path, out: object, *more: str) -> list[str]:
    return [sys.executable, "-m", "unbackdoor", "bench", str(path), "--out", str(out), *more]


def measured(store: Store) -> dict[str, Any]:
    return {
        identity(spec): {key: result.get(key) for key in ("status", "score", "flips", "implanted", "method")}
        for spec, result in store.cells()
    }


@pytest.mark.thorough
@pytest.mark.long
def test_a_node_of_a_ray_cluster_is_lost(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = environment(place, RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", SECONDS="1.5")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], env=quiet, **pipes)
    try:
        address = cluster.stdout.readline().strip()
        far = subprocess.Popen(command(place / "slow.toml", tmp_path / "far", "--ray", address), env=quiet)
        kept = tmp_path / "far" / "cells"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and far.poll() is None and len(list(kept.glob("*.json"))) < 4:
            time.sleep(0.1)
        at_loss = len(list(kept.glob("*.json")))
        cluster.stdin.write("\n")
        cluster.stdin.flush()
        assert cluster.stdout.readline().strip() == "lost"
        assert far.wait(timeout=240) == 0
    finally:
        cluster.communicate("\n")
    assert 0 < at_loss < 14  # the node was lost while there was work
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("SECONDS", "0")
    bench(str(place / "slow.toml"), out=str(tmp_path / "near"))
    expected = measured(Store(tmp_path / "near"))
    assert len(expected) == 2 * (1 + 2 * 3)
    assert measured(Store(tmp_path / "far")) == expected


def test_a_ray_cluster_that_is_not_there(refused: Refusals, tmp_path: Path) -> None:
    said = refused("bench", "near.toml", "--out", tmp_path / "runs", "--ray", "not-an-address")
    assert said.startswith("--ray not-an-address cannot be reached (")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        UnbackdoorError, match=rf"`ray='{address}'` cannot be reached \(.*refused\)\. Start it: ray start"
    ):
        Cluster(address, Resources())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of moto's server; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        env=environment(Path.cwd()),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for name, entry in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
        "FSSPEC_S3_ENDPOINT_URL": address,
    }.items():
        monkeypatch.setenv(name, entry)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{address}/runs", method="PUT")).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield "s3://runs/digits"
    finally:
        server.terminate()
        server.wait()


READ = """
import json, sys
from unbackdoor._bench import Store, identity
keys = ("status", "score", "flips", "implanted", "method")
store = Store(sys.argv[1])
print(json.dumps({identity(spec): {key: result.get(key) for key in keys} for spec, result in store.cells()}))
"""


STALE = """
import sys
import s3fs
from unbackdoor._bench.places import Remote
ours = Remote(sys.argv[1])
s3fs.S3FileSystem.clear_instance_cache()  # or the two would share one client
theirs = Remote(sys.argv[1])
ours.write("victims/first.tar", "1")
assert ours.names("victims") == {"first"}
theirs.write("victims/second.tar", "2")
print(ours.read("victims/second.tar"), ours.read_all(["victims/second.tar"]).__next__())
theirs.remove("victims/first.tar")
print(ours.read("victims/first.tar"), sorted(ours.names("victims")))
ours.remove("victims/second.tar")
print(sorted(theirs.names("victims")))
"""


def test_what_another_process_wrote_after_a_listing_is_seen(place: Path, bucket: str) -> None:
    read = subprocess.run(
        [sys.executable, "-c", STALE, bucket], env=environment(place), capture_output=True, text=True, check=True
    )
    assert read.stdout.splitlines() == ["b'2' b'2'", "None ['second']", "[]"]


@pytest.mark.thorough
@pytest.mark.long
def test_a_store_in_an_object_store(place: Path, tmp_path: Path, bucket: str) -> None:
    def command(out: object, *more: str) -> str:
        done = run("bench", place / "near.toml", "--out", out, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    absent = "s3://nothing-of-the-kind/runs"
    with pytest.raises(UnbackdoorError, match=f"{absent} has no bucket nothing-of-the-kind, or it may not be seen"):
        Store(absent)
    command(tmp_path / "near")
    command(bucket, "--workers", "2")
    assert command(bucket) == "Nothing to do: 6 cells, none of them left.\n"
    # In a process of its own: what s3fs leaves open would be a warning here.
    read = subprocess.run(
        [sys.executable, "-c", READ, bucket], env=environment(place), capture_output=True, text=True, check=True
    )
    assert json.loads(read.stdout) == measured(Store(tmp_path / "near"))
