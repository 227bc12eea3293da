"""How much faster two local workers finish a grid of small cells than one worker with one thread.

    python benchmarks/bench_workers.py --rounds 3

Both run the grid of the digits (grids/digits.toml) with more seeds, into fresh stores, one after the other in each
round, and their results are compared. Run it on a machine that has two idle cores, or say how busy it was.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(grid: Path, out: Path, workers: int) -> float:
    """Seconds on the clock of one run of the command, start-up included."""
    command = [sys.executable, "-m", "unbackdoor", "bench", str(grid), "--out", str(out), "--workers", str(workers)]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def scores(store: Path) -> dict[str, object]:
    """The measurements, by cell."""
    return {path.stem: json.loads(path.read_text())["result"]["score"] for path in (store / "cells").glob("*.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=10, help="purification seeds; each makes 8 cells")
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run([sys.executable, str(ROOT / "examples/digits_data.py"), str(place / "digits")], check=True)
        seeds = f"seeds = {[*range(options.seeds)]}"
        grid = place / "digits.toml"
        grid.write_text((ROOT / "grids/digits.toml").read_text().replace("seeds = [0, 1, 2]", seeds))
        for number in range(options.rounds):
            one = run(grid, place / f"one-{number}", 1)
            two = run(grid, place / f"two-{number}", 2)
            alone, shared = scores(place / f"one-{number}"), scores(place / f"two-{number}")
            same = sum(alone[key] == shared[key] for key in alone)
            ratios.append(one / two)
            print(
                f"round {number}: {len(alone)} cells; one worker {one:.1f} s, two {two:.1f} s, ratio {one / two:.2f}; "
                f"{same} of {len(alone)} scores equal; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    spread = f" ({statistics.stdev(ratios):.2f})" if len(ratios) > 1 else ""
    print(f"{statistics.mean(ratios):.2f}{spread} times as fast, mean and standard deviation over {len(ratios)} rounds")


if __name__ == "__main__":
    main()
