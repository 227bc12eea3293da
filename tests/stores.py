"""A simulated store, cell by cell, for the tests of what is made of one."""

import json
from pathlib import Path
from typing import Any

from unbackdoor._bench import Store, identity
from unbackdoor._tasks.proportion import Proportion

N, TRIGGERED = 1000, 100
MACHINE = "a processor, 1 threads of 2 cores, 24 GiB"


def share(value: float, n: int) -> dict[str, float | int]:
    return Proportion(round(value * n), n).to_json()


def victim(attack: str = "badnets", rate: float | None = 0.05, seed: int | None = 0, **more: Any) -> dict[str, Any]:
    """The spec of a victim; `task` and `parameters` may be given."""
    return {
        "task": {"name": "digits", "train": "a" * 64, "test": "b" * 64, "held_out": 200, **more.get("task", {})},
        "attack": {"name": attack, "version": 1, "parameters": more.get("parameters", {})},
        "rate": rate,
        "seed": seed,
    }


CONTROL = victim("none", 0.0)


def spec(
    of: dict[str, Any], method: str = "fst", seed: int = 0, n: int | None = 200, **parameters: Any
) -> dict[str, Any]:
    """The spec of a cell; the method `none` has no budget."""
    clean = None if method == "none" or n is None else {"from": "unseen", "n": n, "seed": 0, "data": "b" * 64}
    return {
        "victim": of,
        "method": {"name": method, "version": 1, "parameters": parameters},
        "clean": clean,
        "seed": seed,
    }


def result(accuracy: float, success: float | None = None, **more: Any) -> dict[str, Any]:
    """A finished result; what `more` names replaces its entries."""
    score: dict[str, Any] = {"clean_accuracy": share(accuracy, N)}
    if success is not None:
        score["attack_success"] = share(success, TRIGGERED)
        score["recovered_accuracy"] = share(1 - success, TRIGGERED)
        score["label_rule"] = more.pop("label_rule", "all-to-one")
    score["per_class"] = {str(number): share(accuracy, 100) for number in range(10)}
    return {
        "status": "done",
        "score": score,
        "implanted": None if success is None else True,
        "method": {"repr": "FST()", "parameters": {"alpha": 0.1}},
        "seconds": 4.0,
        "scoring_seconds": 1.0,
        "training_seconds": 30.0,
        "peak_memory_bytes": 2**29,
        "examples_seen": 2000,
        "held_out": 0,
        "notes": [],
        "warnings": [],
        "provenance": provenance(),
        **more,
    }


def provenance(grid: str = "digits-0123abcd.toml") -> dict[str, Any]:
    return {
        "commit": "0123abc",
        "versions": {"unbackdoor": "0.1.0", "torch": "2.13.0"},
        "device": MACHINE,
        "date": "2026-11-21T10:00:00+00:00",
        "grid": grid,
    }


def failure(message: str) -> dict[str, Any]:
    return {"status": "failed", "message": message, "traceback": None, "provenance": provenance()}


def put_many(folder: Path, cells: int) -> Store:
    """About so many cells of different numbers: ten methods, five attacks, three rates, three seeds, some tasks."""
    store = Store(folder)
    store.start()
    (folder / "cells").mkdir()
    left, task = cells, 0
    while left > 0:
        more = {"task": {"name": f"task {task}"}}
        victims = [victim(f"attack-{a}", rate, **more) for a in range(5) for rate in (0.05, 0.01, 0.005)]
        for of in [victim("none", 0.0, **more), *victims]:
            control = of["attack"]["name"] == "none"
            methods = ["none", "fine-tuning", *(f"method-{m}" for m in range(8))]
            for place, method in enumerate(methods):
                for seed in range(1 if method == "none" else 3):
                    accuracy = 0.9 - 0.01 * place + 0.003 * seed + 0.0007 * (left % 11)
                    made = result(accuracy, None if control else 0.1 * (10 - place) - 0.01 * seed)
                    made["score"]["per_class"] = {
                        f"class {c}": share((left * 7 + c) % 400 / 400, 400) for c in range(10)
                    }
                    if control:
                        made["flips"] = {identity(other): share(0.02, TRIGGERED) for other in victims}
                    entry = spec(of, method, seed)
                    text = json.dumps({"version": 1, "spec": entry, "result": made}, indent=1)
                    (folder / "cells" / f"{identity(entry)}.json").write_text(text)
                    left -= 1
        task += 1
    return store
