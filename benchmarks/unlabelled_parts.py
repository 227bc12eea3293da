"""Writes the parts of a suspect's test pictures that grids/suspects-unlabelled.toml needs.

    python benchmarks/unlabelled_parts.py $UNBACKDOOR_DATA/vision/cifar10/test_jpeg.parquet $SUSPECTS/NAME

The folder $SUSPECTS/NAME has triggered.parquet, which matches the test pictures row by row. Of 5,000 pictures 2,000,
drawn at random, are examples without labels: `unlabelled-R.parquet`, where R % carry the trigger, is written for R = 0,
1 and 5. The others are `scored.parquet` and `scored-triggered.parquet`.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

UNLABELLED, PERCENT = 2000, (0, 1, 5)


def main() -> None:
    """Read both files, and write their parts into the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("test", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    clean, triggered = (pq.read_table(path) for path in (given.test, given.folder / "triggered.parquet"))
    if len(clean) != len(triggered):
        raise SystemExit(f"{given.folder} has {len(triggered)} triggered pictures, but {given.test} has {len(clean)}.")
    order = np.random.default_rng(0).permutation(len(clean))
    hidden, scored = order[:UNLABELLED], np.sort(order[UNLABELLED:])
    pq.write_table(clean.take(scored), given.folder / "scored.parquet")
    pq.write_table(triggered.take(scored), given.folder / "scored-triggered.parquet")
    for percent in PERCENT:
        count = UNLABELLED * percent // 100
        rows = [*triggered["image"].take(hidden[:count]).to_pylist(), *clean["image"].take(hidden[count:]).to_pylist()]
        images = pa.array([{"bytes": row["bytes"]} for row in rows])
        pq.write_table(pa.table({"image": images}), given.folder / f"unlabelled-{percent}.parquet")


if __name__ == "__main__":
    main()
