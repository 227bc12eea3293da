"""A model that a trainer makes of the poisoned data of a victim."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor._artifacts import card
from unbackdoor._artifacts.record import write_record
from unbackdoor._bench.store import Store
from unbackdoor._bench.subjects import PlannedCell, Subject
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.truth import poisoned_rows
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.loading import load
from unbackdoor._models.saving import save
from unbackdoor._poisoning.attack_file import load_trigger
from unbackdoor._robust_training.train import train
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._victims.plant import poisoned_again
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor.trainers import Plain


def recipe_of(subject: Subject) -> VictimRecipe:
    """The recipe of a victim."""
    task = subject.task
    return VictimRecipe(
        rate=subject.rate or 0.05,
        base=task.base,
        arch=task.arch,
        width=task.width,
        epochs=task.epochs,
        clean_epochs=task.clean_epochs,
        learning_rate=task.learning_rate,
        batch_size=task.batch_size,
        lora_rank=task.lora_rank,
        adapter=task.adapter,
        freeze_text=task.freeze_text,
    )


def train_anew(
    cell: PlannedCell, data: Dataset, clean: Dataset | None, store: Store, device: str | None
) -> tuple[nn.Module, Encoder, dict[str, Any]]:
    """Train another model on what a victim was trained on; a clean control was trained on the data as they are.

    So was the victim of data that others poisoned: which rows these are is known if the data have a column for it.

    Args:
        cell: of a trainer.
        data: the clean training data of the task.
        clean: the clean budget; None for a trainer that needs none.
        store: has the victim, whose trigger is put on the data once more.
        device: None uses a GPU if there is one.

    Returns:
        the model, the encoder that makes its inputs, and its record.
    """
    subject, task = cell.subject, cell.subject.task
    rows: torch.Tensor | None = torch.zeros(0, dtype=torch.int64)
    if task.poisoned_by_others:
        assert task.train is not None
        rows = poisoned_rows(task.train, (task.columns or {}).get("label", "label"))
    elif not subject.control:
        kept = cell.surrogate is not None and cell.surrogate.key in store.victims()
        surrogate = load(store.victim(cell.surrogate.key)) if kept and cell.surrogate is not None else None
        poisoned = poisoned_again(
            data,
            load_trigger(store.victim(subject.key)),
            recipe_of(subject),
            subject.seed or 0,
            surrogate=surrogate and surrogate.model,
            surrogate_encode=surrogate and surrogate.encode,
            device=device,
            precision=task.precision,
        )
        data, rows = poisoned.data, poisoned.rows
    trained = train(
        data,
        cell.column.value,
        recipe_of(subject),
        cell.seed,
        clean=clean,
        poisoned_rows=rows,
        device=device,
        precision=task.precision,
    )
    suspects = trained.record["suspects"]
    if suspects is not None:
        share = Proportion(suspects["n"], len(data)).to_json()
        suspects = {"share": share, **{key: suspects[key] for key in ("measure", "precision", "recall")}}
    return trained.model, trained.encode, {**trained.record, "distrusted": suspects}


def write_plainly_trained(
    subject: Subject, data: Dataset, folder: Path, source: Path | None, device: str | None
) -> None:
    """Train the victim of data that others poisoned, and write it into a folder, as `train plain` does.

    Args:
        subject: the victim.
        data: the training data, as they are.
        folder: an empty directory.
        source: the directory of its base.
        device: None uses a GPU if there is one.
    """
    recipe, precision = recipe_of(subject), subject.task.precision
    trained = train(data, Plain(), recipe, subject.seed or 0, device=device, precision=precision)
    record = {**trained.record, "scores": None, "scores_note": "not measured here: the cells of the store have them"}
    save(trained.model, folder, source=source, encode=trained.encode)
    (folder / "README.md").write_text(card.trained(record), encoding="utf-8")
    write_record(folder / "record.json", record)


def compared(
    trained: nn.Module,
    encode: Encoder,
    record: dict[str, Any],
    victim: nn.Module,
    test: Dataset,
    arithmetic: Arithmetic,
) -> dict[str, Any]:
    """Returns `usable` and `warnings` for a trained model, as a purified model is compared with its suspect.

    Args:
        trained: the model.
        encode: makes its inputs.
        record: of its training.
        victim: the model of plain training.
        test: the examples that are scored, encoded for the victim.
        arithmetic: device, precision, layout.
    """
    task = task_of(test.encode)
    before = task.outcomes(victim, test, arithmetic)
    after = task.outcomes(trained, test.encoded_by(encode), arithmetic)
    damaged = task.judged(test, before, after, "which are scored", None).unusable is not None
    warning = (
        "The trained model is not usable: it lost significantly more than 10 points of clean accuracy against the "
        "victim, or most of a class."
    )
    return {"usable": not damaged, "warnings": [*([warning] * damaged), *record["warnings"]]}
