"""Whether the columns of a grid fit its tasks: what can be known before anything runs."""

from pathlib import Path

from unbackdoor._bench.columns import Column
from unbackdoor._bench.schema import GridTask
from unbackdoor._bench.subjects import PlannedCell, Subject
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import read_json
from unbackdoor._registry.entries import Need, entry_of, steps_of

_LEAVE_OUT = "Take it away by cells.leave_out."

# Settings of a task that only victims of one kind of data have.
_SETTINGS = {
    **dict.fromkeys(("lora_rank", "adapter", "template", "max_new_tokens"), ("conversations", "language models")),
    **dict.fromkeys(("prompts", "freeze_text"), ("image-text", "models of images and texts")),
}


def check_columns(cells: list[PlannedCell]) -> None:
    """Refuse attacks and columns that a task cannot have; the kind of data of an existing model is not known yet.

    Raises:
        UnbackdoorError: says what does not fit.
    """
    tasks = {cell.subject.name: cell.subject.task for cell in cells if cell.subject.model is None}
    kinds = {name: _kind(task) for name, task in tasks.items()}
    for cell in {(cell.subject, cell.label): cell for cell in cells}.values():
        subject, column = cell.subject, cell.column
        _check_trainer(subject, column)
        _check_reference(subject, column)
        if subject.model is None:
            _check_kind(subject, column, kinds[subject.name])
    for cell in cells:
        _check_enough(cell)


def _check_kind(subject: Subject, column: Column, kind: str) -> None:
    """Refuse an attack or a column for data of another kind."""
    from unbackdoor._poisoning.abilities import modalities_of

    if subject.behaviour is not None and kind != "conversations":
        raise UnbackdoorError(
            f"The grid gives {subject.label} a behaviour, which is for language models, but tasks.{subject.name} "
            f"has {kind}. Leave it out."
        )
    for name, (of, models) in _SETTINGS.items():
        if kind != of and name in subject.task.model_fields_set:
            raise UnbackdoorError(
                f"tasks.{subject.name}.{name} is for {models}, but the task has {kind}. Leave it out."
            )
    parts: list[tuple[str, object, tuple[str, ...]]] = [(subject.label, subject.attack, modalities_of(subject.attack))]
    for step in steps_of(column.value) if column.kind in ("method", "trainer", "guard") else ():
        entry = entry_of(step, column.entries)
        parts.append((column.label, step, (kind,) if entry is None else entry.modality))  # others refuse later
    for name, part, modality in parts:
        if part is not None and kind not in modality:
            raise UnbackdoorError(
                f"The grid has {name} on tasks.{subject.name}, which has {kind}, but {type(part).__name__} is for "
                f"{' and '.join(modality)}. {_LEAVE_OUT}"
            )


def _check_trainer(subject: Subject, column: Column) -> None:
    """Refuse a trainer where there is no poisoned training data."""
    from unbackdoor._poisoning.abilities import Implants

    if column.kind != "trainer":
        return
    where = f"The grid has the trainer {column.label} on tasks.{subject.name}"
    if subject.model is not None:
        raise UnbackdoorError(
            f"{where}, whose model is somebody else's: a trainer needs the data that a victim was trained on. "
            f"{_LEAVE_OUT}"
        )
    if isinstance(subject.attack, Implants):
        raise UnbackdoorError(
            f"{where} with the attack {subject.label}, which trains the victim in a way of its own: its data alone "
            f"carry no backdoor, so a trainer has nothing to withstand. {_LEAVE_OUT}"
        )


def _check_reference(subject: Subject, column: Column) -> None:
    """Refuse a guard without the second models that it needs."""
    if column.kind != "guard":
        return
    for name, need in (("reference", Need.REFERENCE), ("base", Need.BASE)):
        spared = need is Need.BASE and (subject.model is not None or subject.task.adapter)  # an adapter needs none
        if getattr(subject.task, name) is None and not spared and column.needs(need, unknown=False):
            raise UnbackdoorError(
                f"The grid has the guard {column.label} on tasks.{subject.name}, which has no {name}: {need}. Name one "
                f"by {name} = PATH."
            )


def _check_enough(cell: PlannedCell) -> None:
    """Refuse a budget that is too small for the smallest share of false alarms."""
    from unbackdoor._guarding.threshold import needed

    if not cell.column.false_alarms or cell.budget is None:
        return
    share = min(cell.column.false_alarms)
    if cell.budget.n < (least := needed(share)):
        raise UnbackdoorError(
            f"The grid has the guard {cell.label} with a budget of {cell.budget.n:,} clean examples, but a share of "
            f"{share:g} in false_alarms needs {least:,}: half of them set the threshold. Raise budgets.n or the share."
        )


def _kind(task: GridTask) -> str:
    """The kind of data that the victims of a task are trained on; a base of the Hub is not fetched to know it."""
    from unbackdoor._data.conversation_rows import holds_prompts
    from unbackdoor._data.reading import opened
    from unbackdoor._models.config import modality_of

    if task.base is None:
        return "images"
    config = Path(task.base) / "config.json"
    kind = "conversations"
    if Path(task.base).is_dir():
        kind = modality_of(read_json(config)) if config.is_file() else "text"
    if kind != "conversations":
        return kind
    assert task.train is not None
    if holds_prompts(task.train, task.columns):
        return "conversations"
    (first, *_) = opened(task.train, ", ".join(task.train), label="label", classes=None, labelled=False)
    held = {*first.cells, *(task.columns or {})}
    if not {"image", "file_name"} & held:
        return "text"
    return "image-text" if {"caption", "text"} & held else "images"
