"""Times listing, resuming and reading a simulated store of 100,000 cells.

    python benchmarks/store_growth.py --out /tmp/growth --cells 100000

The script writes a grid of about that many cells, fills its store with results of the usual size (ten classes), and
then times, each in a process of its own: listing the keys, starting the finished grid again, a dry run, reading all
cells (the start of a report), and the report as a table and as a page.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from unbackdoor._bench import Store
from unbackdoor._bench.grid import read
from unbackdoor._bench.plan import all_cells
from unbackdoor._tasks.proportion import Proportion


def write_grid(folder: Path, cells: int) -> Path:
    """About so many cells: 2 tasks x 5 attacks x 1 or 10 rates x 10 methods x 10 seeds x some victim seeds."""
    steps = 10 if cells >= 10_000 else 1
    victims = 2 * (5 * steps + 1)  # the controls are among them
    seeds = max(1, round(cells / victims / (1 + 10 * 10)))
    lines = [f"victim_seeds = {list(range(seeds))}", "seeds = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    for task in ("one", "two"):
        for part in ("train", "test"):
            (folder / f"{task}-{part}.csv").write_text(f"{task} {part}\n")
        lines += [f"[tasks.{task}]", f'train = "{task}-train.csv"', f'test = "{task}-test.csv"', "held_out = 1000"]
    rates = [round(0.005 * (step + 1), 3) for step in range(steps)]
    for attack in ("badnets", "blended", "sig", "wanet", "label-consistent"):
        lines += ["[[attacks]]", f'name = "{attack}"', f"rate = {rates}"]
    for number in range(9):
        lines += ["[[methods]]", 'name = "fst"', f'label = "fst-{number}"', f"alpha = {round(0.05 * (number + 1), 2)}"]
    path = folder / "grid.toml"
    path.write_text("\n".join([*lines, "[[budgets]]", "n = 1000"]) + "\n")
    return path


def fill(store: Store, path: Path) -> int:
    """Write a result for every cell, without the renaming that a real one takes: it is not what is measured here."""
    share = Proportion(3700, 4000).to_json()
    score = {
        "clean_accuracy": share,
        "attack_success": share,
        "recovered_accuracy": share,
        "label_rule": "all-to-one",
        "per_class": {f"class {number}": share for number in range(10)},
    }
    store.start()
    folder = Path(store.address) / "cells"
    folder.mkdir()
    cells = all_cells(read(path))
    for cell in cells:
        result = {
            "status": "done",
            "score": score,
            "implanted": True,
            "method": {"repr": f"{cell.method}", "parameters": {"alpha": 0.1, "epochs": 10}},
            "seconds": 17.0,
            "scoring_seconds": 2.0,
            "training_seconds": 300.0,
            "peak_memory_bytes": 900_000_000,
            "examples_seen": 10_000,
            "held_out": 0,
            "notes": [],
            "warnings": [],
            "provenance": {"commit": "0" * 7, "versions": {}, "device": "a processor", "date": "", "grid": "grid.toml"},
        }
        if cell.others:
            result["flips"] = {other.key: share for other in cell.others}
        text = json.dumps({"version": 1, "spec": cell.spec, "result": result}, indent=1)
        (folder / f"{cell.key}.json").write_text(text)
    return len(cells)


def timed(title: str, *arguments: str) -> None:
    """Print the seconds, and those of the processor, that a Python process takes."""
    wall, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{title:34} {time.perf_counter() - wall:7.1f} s, of the processor {busy:6.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=100_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    grid, out = write_grid(options.out, options.cells), str(options.out / "runs")
    count = fill(Store(out), grid)
    size = sum(entry.stat().st_size for entry in os.scandir(Path(out) / "cells"))
    print(f"{count:,} cells, {size / 2**20:,.0f} MiB")
    listing = "import sys; from unbackdoor._bench import Store; print(len(Store(sys.argv[1]).done()))"
    reading = "import sys; from unbackdoor._bench import Store; print(sum(1 for _ in Store(sys.argv[1]).cells()))"
    timed("importing what a grid needs", "-c", "import unbackdoor._purification.purify")
    timed("listing", "-c", listing, out)
    timed("starting the finished grid again", "-m", "unbackdoor", "bench", str(grid), "--out", out)
    timed("a dry run of all of it", "-m", "unbackdoor", "bench", str(grid), "--out", out, "--rerun", "all", "--dry-run")
    timed("reading all cells", "-c", reading, out)
    for name in ("report.csv", "report.html"):
        timed(name, "-m", "unbackdoor", "report", out, "-o", str(options.out / name))
        print(f"{'':34} {(options.out / name).stat().st_size / 2**20:7.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
