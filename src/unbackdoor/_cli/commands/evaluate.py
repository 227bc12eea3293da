"""`evaluate`: score a model on clean and on triggered examples."""

import json
import logging
from pathlib import Path

from pydantic import ValidationError

from unbackdoor._artifacts.audit_record import EvidenceRows
from unbackdoor._cli.commands.inputs import load_control, load_dataset, load_model, show_first_prompt
from unbackdoor._cli.commands.outcome import propose_control
from unbackdoor._cli.options import EvaluateOptions
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._evaluation.evaluate import evaluate as evaluate_model
from unbackdoor._inputs import RECORD, read_file
from unbackdoor._models import calling
from unbackdoor._tasks.generation_score import GenerationScore
from unbackdoor._tasks.image_text_score import ImageTextScore
from unbackdoor._tasks.score import Score

logger = logging.getLogger("unbackdoor")


def evaluate(source: str, options: EvaluateOptions) -> None:
    """The `evaluate` command."""
    if options.control is not None and options.attack is None and options.triggered is None and options.trigger is None:
        raise UnbackdoorError("--control needs --attack or --triggered: it counts flips on triggered examples.")
    model, encode = load_model(source, options)
    classes = calling.class_names(model)
    test = load_dataset(options.data, encode, options, classes)
    if options.rows is not None:
        test = test.select(_rows(options.rows, test))
    show_first_prompt(test)
    marked = None if options.triggered is None else load_dataset(options.triggered, encode, options, classes)
    control = load_control(options.control, options)
    measured = evaluate_model(
        model,
        test,
        attack=options.attack,
        triggered_data=marked,
        target=options.target,
        trigger=options.trigger,
        behaviour=options.behaviour,
        max_new_tokens=options.max_new_tokens,
        control=control and control.model,
        control_encode=control and control.encode,
        device=options.device,
        precision=options.precision,
        progress=True,
    )
    print(json.dumps(measured.to_json(), indent=2) if options.json else _score_text(measured))
    if isinstance(measured, Score):
        propose_control(measured, calling.class_count(model, test))


def _rows(path: str, test: Dataset) -> list[int]:
    """Returns the row numbers in a file that an audit wrote.

    Raises:
        UnbackdoorError: it is not a list of numbers of rows that the data have.
    """
    try:
        rows = EvidenceRows.model_validate_json(read_file(Path(path), RECORD), strict=True).root
    except ValidationError:
        rows = []
    if not rows:
        raise UnbackdoorError(f"--rows must be a file with a JSON list of row numbers, as an audit writes, got {path}.")
    if max(rows) >= len(test):
        raise UnbackdoorError(
            f"{path} names rows {min(rows)} to {max(rows)}, but {test.name} has {len(test):,}, from 0. Give the data "
            "that was audited."
        )
    return rows


def _score_text(measured: Score | GenerationScore | ImageTextScore) -> str:
    if isinstance(measured, GenerationScore):
        return str(measured)
    if not measured.per_class:  # pairs without labels
        return str(measured)
    lines = [str(measured), "", "clean accuracy per class"]
    width = max(map(len, measured.per_class))
    lines += [f"  {name:<{width}}  {part!r}" for name, part in measured.per_class.items()]
    return "\n".join(lines)
