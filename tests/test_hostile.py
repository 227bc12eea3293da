"""The corpus of hostile and malformed inputs: one sentence each, nothing run, nothing asked, nothing written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "hostile"))

import corpus
import material

RUNNER = Path(__file__).parent / "hostile" / "runner.py"
PARTS = 2  # processes, so that those that have several cores use them
FEWER = 3  # the usual run has one in so many of the hostile cases, and every second twin; the thorough one the others
SECONDS = 30  # of the processor that any input may take
LIMIT = 1536  # MiB that a process with some hundred cases in it may take
PATIENCE = 300  # seconds without any result after which a case counts as hanging, also on a busy machine


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "material"
    material.make(folder)
    material.make_more(folder)
    return folder


def usual(cases: dict[str, corpus.Case]) -> list[str]:
    """Names of the cases of the usual run."""
    hostile, twins = ([name for name, case in cases.items() if case.harmless is kind] for kind in (False, True))
    return [*hostile[::FEWER], *twins[::2]]


def test_the_usual_run_has_enough_of_the_corpus() -> None:
    cases = corpus.cases()
    chosen = usual(cases)
    assert sum(not cases[name].harmless for name in chosen) >= 300
    assert sum(cases[name].harmless for name in chosen) >= 50


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["usual", "rest"])
def test_each_gets_one_sentence_and_each_harmless_twin_is_taken(
    part: int, rest: bool, things: Path, tmp_path: Path
) -> None:
    cases = corpus.cases()
    chosen = set(usual(cases))
    names = [name for name in cases if (name in chosen) is not rest][part::PARTS]
    results, folder = tmp_path / "results.jsonl", tmp_path / "cases"
    folder.mkdir()
    with (tmp_path / "errors").open("w") as errors:
        running = subprocess.Popen(
            [sys.executable, str(RUNNER), str(things), str(folder), str(results), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert running.stdin is not None
        running.stdin.write(b"y\n" * 1000)
        running.stdin.close()
        _watched(running, results)
    done = [json.loads(line) for line in results.read_text().splitlines()]
    begun = [entry["name"] for entry in done if "started" in entry]
    found = {entry["name"]: entry for entry in done if "code" in entry}
    assert set(found) == set(names), f"ended in {begun[-1:]}: {(tmp_path / 'errors').read_text()[-2000:]}"
    wrong = {name: problems for name, entry in found.items() if (problems := _wrong(cases[name], entry))}
    assert not wrong
    assert max(entry["peak"] for entry in found.values()) < LIMIT


def _watched(running: subprocess.Popen, results: Path) -> None:
    """Wait for a process, and end it when nothing comes of it any more."""
    length, since = -1, time.monotonic()
    while running.poll() is None:
        time.sleep(0.2)
        now = results.stat().st_size if results.exists() else 0
        if now != length:
            length, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            running.kill()
            running.wait()


def _wrong(case: corpus.Case, entry: dict[str, Any]) -> list[str]:
    """The faults of an outcome."""
    lines = entry["err"].split("\n")[:-1]
    reported = [line for line in lines if not line.startswith(("note: ", "warning: "))]
    wrong = []
    if case.harmless:
        wrong += [f"exit code {entry['code']}: {reported}"] * (entry["code"] != 0)
    else:
        wrong += [f"exit code {entry['code']}: {reported}"] * (entry["code"] != 2)
        wrong += [f"{len(reported)} lines: {reported}"] * (len(reported) != 1)
        wrong += [f"left {entry['left']}"] * bool(entry["left"])
        wrong += [f"wrote {entry['out']}"] * bool(entry["out"])
    wrong += ["not printable"] * any(not letter.isprintable() for line in lines for letter in line)
    wrong += ["long"] * any(len(line) > 1100 for line in lines)
    wrong += ["code was run"] * entry["canary"]
    wrong += [f"{entry['seconds']} seconds"] * (entry["seconds"] > SECONDS)
    return wrong
