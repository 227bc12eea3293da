"""Reports: read a store, count, and write a page or a table."""

import shlex
from pathlib import Path

from unbackdoor._artifacts.directories import check_free_file, write_file
from unbackdoor._bench import Store
from unbackdoor._errors import UnbackdoorError
from unbackdoor._reports.store import writers
from unbackdoor._reports.store.build import build
from unbackdoor._reports.store.numbers import Report

# The mark by which a report of each kind is recognised.
_MARKS = {
    ".html": "<title>Purification results: ",
    ".csv": "task,attack,rate,label_rule,",
    ".json": '{\n "format": ',
    ".tex": "% Only runs that differ in nothing but their seeds are averaged.",
    ".md": "\n## How it was measured\n",
}
SUFFIXES = tuple(_MARKS)


def report(runs: str | Path) -> Report:
    """Read the measurements of a store: the numbers of `unbackdoor report`, as a value.

    Args:
        runs: the store that `unbackdoor bench` wrote: a folder, or an address such as s3://bucket/runs.

    Raises:
        UnbackdoorError: there is no store, or it has nothing to report.
    """
    return build(_store(str(runs)), shown(str(runs)), whole=False)[0]


def _store(runs: str) -> Store:
    if "://" not in runs and not Path(runs).is_dir():
        came = "is not a folder" if Path(runs).exists() else "does not exist"
        raise UnbackdoorError(f"{runs} {came}. Give the folder or address that unbackdoor bench wrote to its `out`.")
    return Store(runs)


def write_report(runs: str, out: str) -> None:
    """Write a report on a store; the suffix of `out` says which kind.

    Raises:
        UnbackdoorError: the suffix is not known, `out` is somebody else's file, or the store has nothing to report.
        IncompleteError: the disk is full.
    """
    path = Path(out)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UnbackdoorError(f"`out` must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {out}.")
    check_free_file(path, "out", overwrite=True, mark=_MARKS[kind])
    store = _store(runs)
    report, records = build(store, shown(runs), whole=kind == ".html")
    if kind == ".html":
        from unbackdoor._reports.store.page import render

        text = render(report, records, store)
    elif kind == ".md":
        text = writers.as_markdown(report, shown(out))
    else:
        text = {".csv": writers.as_csv, ".json": writers.as_json, ".tex": writers.as_latex}[kind](report)
    write_file(path, text)
    failed = f", {len(report.failures):,} failed" if report.failures else ""
    guards = f", guards in {len(report.guards):,}" if report.guards else ""
    print(f"{out}: {len(report.cells):,} cells in {len(report.rows):,} settings{guards}{failed}.")


def shown(runs: str) -> str:
    """An address for the commands on a page, without the folders of this machine.

    >>> shown("runs/digits"), shown("/home/somebody/digits"), shown("s3://bucket/runs")
    ('runs/digits', 'digits', 's3://bucket/runs')
    """
    return shlex.quote(runs if "://" in runs or not Path(runs).is_absolute() else Path(runs).name)
