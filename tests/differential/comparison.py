"""Draws a model and a data set, asks the product and the independent reader, and holds one against the other.

By hand: python tests/differential/comparison.py 1000 [FIRST]
"""

import contextlib
import io
import json
import logging
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import drawn_data
import drawn_models
import independent
import torch
import transformers
from allowed import REFUSALS

import unbackdoor as ub
from unbackdoor._cli.app import main
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import class_names
from unbackdoor._tasks.classification import answers

CLOSE = 5e-3  # of class scores that spread by about 1
SHARE_OF_COMMANDS = 8  # every so manieth case also runs by the command line


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case: `same`, `refused` (of an allowed kind), or `different` (with what is wrong)."""

    number: int
    what: str
    kind: str
    reported: str = ""


def compare(number: int, shelf: drawn_models.Shelf, place: Path) -> Outcome:
    """One case, by its number alone: everything is drawn from it."""
    draw = random.Random(f"case {number}")
    suspect = drawn_models.Shelf.draw(shelf, draw, place)
    examples = drawn_data.drawn(draw, suspect, place)
    kind = f"{suspect.stored}; {examples.stored}"
    wanted = [refused for refused in (suspect.refused, examples.refused) if refused is not None]

    def wrong(reported: str) -> Outcome:
        return Outcome(number, "different", kind, f"{reported} [names {suspect.names}, data {examples.source}]")

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            loaded = ub.load(suspect.given, **suspect.options)
            data = ub.Dataset.load(
                examples.source, loaded.encode, columns=examples.columns or None, classes=class_names(loaded.model)
            )
            score = ub.evaluate(loaded.model, data, device="cpu", precision="fp32")
            found = answers(loaded.model, data, choose(loaded.model, "cpu", "fp32")).float()
    except ub.UnbackdoorError as refusal:
        if not wanted:
            return wrong(f"refused: {refusal}")
        if "\n" in str(refusal) or not any(re.search(REFUSALS[each], str(refusal)) for each in wanted):
            return wrong(f"refused as something else than {wanted}: {refusal}")
        if number % SHARE_OF_COMMANDS == 0:
            code, out, err = _command(suspect, examples)
            if code != 2 or out or "Traceback" in err:
                return wrong(f"the command exits with {code} after {out!r}, {err!r}")
        return Outcome(number, "refused", wanted[0])
    except Exception:
        return wrong(traceback.format_exc())
    if wanted:
        return wrong(f"accepted, but {wanted} was to be refused")
    expected, labels = _independent(suspect, examples)
    if examples.cells:
        if data.labels.tolist() != labels:
            return wrong(f"labels {data.labels.tolist()} in place of {labels}")
    else:  # a folder: rows come in the order of classes and names
        order = sorted(
            range(len(labels)), key=lambda row: (labels[row], str(examples.files[row].relative_to(examples.source)))
        )
        expected, labels = expected[order], [labels[row] for row in order]
        if sorted(data.labels.tolist()) != labels:
            return wrong(f"labels {data.labels.tolist()} in place of {labels}")
        ours = data.labels.argsort(stable=True)
        found = _paired(found[ours], expected, labels)
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=CLOSE, rtol=1e-3):
        gap = (found - expected).abs().max() if found.shape == expected.shape else found.shape
        return wrong(f"class scores differ by {gap}")
    best = expected.topk(2, dim=1).values
    sure = best[:, 0] - best[:, 1] > 2 * CLOSE
    hits = expected.argmax(dim=1) == torch.tensor(labels)
    least, most = int((hits & sure).sum()), int((hits | ~sure).sum())
    if not least <= score.clean_accuracy.count <= most or score.clean_accuracy.n != len(labels):
        return wrong(f"a score of {score.clean_accuracy!r} in place of {int(hits.sum())} of {len(labels)}")
    if number % SHARE_OF_COMMANDS == 0 and not isinstance(examples.source, list):
        code, out, err = _command(suspect, examples)
        if code != 0 or json.loads(out)["clean_accuracy"] != score.clean_accuracy.to_json():
            return wrong(f"the command exits with {code} after {out!r}, {err!r}")
    return Outcome(number, "same", kind)


def _paired(found: torch.Tensor, expected: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Our rows in the order of theirs, within each class by what is nearest: names sort in more than one way."""
    paired = torch.empty_like(expected)
    for label in set(labels):
        rows = [row for row, each in enumerate(labels) if each == label]
        left = list(rows)
        for row in rows:
            nearest = min(left, key=lambda other: float((found[other] - expected[row]).abs().max()))
            paired[row] = found[nearest]
            left.remove(nearest)
    return paired


def _independent(suspect: drawn_models.Suspect, examples: drawn_data.Examples) -> tuple[torch.Tensor, list[int]]:
    if examples.cells:
        rows = independent.table_cells(examples.files, examples.cells, examples.delimiter)
    else:
        rows = [(str(file),) for file in examples.files]
    assert len(rows) == len(examples.labels), "the reader itself must find all rows"
    if suspect.modality == "text":
        return independent.answers_to_texts(suspect.plain, rows), examples.labels
    pictures = [independent.picture(cell, examples.files[0].parent) for (cell,) in rows]
    if suspect.options:
        return independent.answers_of_a_factory(suspect.plain, pictures=pictures, **suspect.options), examples.labels
    return independent.answers_to_pictures(suspect.plain, pictures), examples.labels


def _command(suspect: drawn_models.Suspect, examples: drawn_data.Examples) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of `unbackdoor evaluate`."""
    arguments = ["evaluate", str(suspect.given), "--data", str(examples.source), "--json", "--precision", "fp32"]
    if examples.columns:
        arguments += ["--columns", ",".join(f"{ours}={theirs}" for ours, theirs in examples.columns.items())]
    for name, given in suspect.options.items():
        text = ",".join(map(str, given)) if isinstance(given, tuple) else str(given)
        arguments += [f"--{name.replace('_', '-')}", text]
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("unbackdoor")
    before = logger.handlers, logger.level, logger.propagate
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(arguments)
    except SystemExit as stopped:
        return stopped.code, out.getvalue(), err.getvalue()
    finally:
        logger.handlers, logger.level, logger.propagate = before
    return None, out.getvalue(), err.getvalue()


def outcomes(first: int, count: int, folder: Path) -> Iterator[Outcome]:
    """The outcomes of the cases from `first` on."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    shelf = drawn_models.Shelf(folder / "shelf")
    for number in range(first, first + count):
        place = folder / "case"
        place.mkdir()
        yield compare(number, shelf, place)
        shutil.rmtree(place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("unbackdoor").setLevel(logging.ERROR)
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for outcome in outcomes(int((sys.argv[2:] or ["0"])[0]), int(sys.argv[1]), Path(folder)):
            totals[f"refused: {outcome.kind}" if outcome.what == "refused" else outcome.what] += 1
            if outcome.what == "different":
                print(outcome.number, outcome.kind, outcome.reported, sep="\n  ", flush=True)
    print(*(f"{count:5} {what}" for what, count in sorted(totals.items())), sep="\n")
