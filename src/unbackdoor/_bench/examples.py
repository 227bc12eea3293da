"""The examples of a task: decoded once per process, and the same draws of them for every method."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from unbackdoor._bench.schema import GridTask
from unbackdoor._bench.store import Store
from unbackdoor._bench.subjects import PlannedCell, Subject
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.overlap import without
from unbackdoor._data.splits import stratified
from unbackdoor._errors import UnbackdoorError


class Shelf:
    """Keeps the latest thing of each kind, for the next job of the same subject or task."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def keep(self, kind: str, of: Any, make: Callable[[], Any]) -> Any:
        """Returns the latest thing of this kind if it was made from the same inputs, else a new one."""
        if kind not in self._kept or self._kept[kind][0] != of:
            self._kept.pop(kind, None)  # before the new one takes memory
            self._kept[kind] = (of, make())
        return self._kept[kind][1]


class Examples:
    """The data of the tasks.

    Args:
        store: keeps the draws.
        shelf: keeps what is decoded.
    """

    def __init__(self, store: Store, shelf: Shelf) -> None:
        self.store, self.shelf = store, shelf

    def read(
        self,
        task: GridTask,
        part: Literal["train", "test", "second_test", "clean", "triggered", "unlabelled"],
        encode: Any,
        classes: tuple[str, ...] | None,
    ) -> Dataset:
        """A file of the task, decoded once for subjects with the same classes."""
        files = getattr(task, part)
        images = getattr(encode, "images", encode)  # those of pairs
        form = images.form if isinstance(images, ImageEncoder) else None  # pictures of several sizes are read by it
        known = (files, classes, task.columns, task.augment, form)
        data: Dataset = self.shelf.keep(
            part,
            known,
            lambda: Dataset.load(
                list(files),
                encode,
                columns=task.columns,
                classes=classes,
                augment=task.augment,
                labelled=part != "unlabelled",
            ),
        )
        name = ", ".join(Path(file).name for file in files)  # the folders are those of this machine
        return dataclasses.replace(data.encoded_by(encode or data.encode), name=name)

    def parts(self, subject: Subject, encode: Any, classes: tuple[str, ...] | None) -> tuple[Dataset, Dataset | None]:
        """The test examples that are scored, and the unseen ones that clean budgets are drawn from."""
        task = subject.task
        known = (subject.spec["task"], task.test, task.clean, classes, id(encode))

        def make() -> tuple[Any, Dataset, Dataset | None]:
            test = self.read(task, "test", encode, classes)
            if task.clean is not None:
                clean = self.read(task, "clean", encode, classes)
                return encode, without(test, clean), clean
            if not task.held_out:
                return encode, test, None
            spec = {"draw": "held out", "test": subject.spec["task"]["test"], "n": task.held_out, **_read_by(test)}
            rows = self.store.rows(spec, lambda: stratified(test.labels, task.held_out, seed=0).tolist())
            others = torch.ones(len(test), dtype=torch.bool)
            others[rows] = False
            return encode, test.select(others.nonzero().flatten()), test.select(rows)

        # The encoder is kept with them: its id is its own as long as it lives.
        _, scored, pool = self.shelf.keep("parts", known, make)
        return scored, pool

    def triggered(self, subject: Subject, scored: Dataset, encode: Any, classes: tuple[str, ...] | None) -> Dataset:
        """Returns the examples of an existing model that already carry its trigger.

        If they match the test examples row by row, those whose clean copy is not scored are left out.

        Raises:
            UnbackdoorError: part of the test examples is held out, and the triggered ones do not match them.
        """
        task = subject.task
        marked = self.read(task, "triggered", encode, classes)
        test = self.read(task, "test", encode, classes)
        alike = len(marked) == len(test) and bool((marked.labels == test.labels).all())
        if task.held_out and not alike:
            raise UnbackdoorError(
                f"{marked.name} must hold the rows of {test.name} in their order, since held_out keeps some of them "
                f"apart; it has {len(marked):,} rows, against {len(test):,}, or other labels. Give clean instead of "
                "held_out."
            )
        return marked.select(scored.rows) if alike and scored.rows is not None else marked

    def budget(self, cell: PlannedCell, pool: Dataset | None, encode: Any, classes: tuple[str, ...] | None) -> Dataset:
        """The frozen, stratified draw that all methods share."""
        budget, task = cell.budget, cell.subject.task
        assert budget is not None
        if budget.source == "train":
            pool = self.read(task, "train", encode, classes)
        assert pool is not None
        if budget.n > len(pool):
            raise UnbackdoorError(
                f"budgets.n must be at most {len(pool):,}, the examples of {pool.name}, got {budget.n}."
            )
        if budget.n == len(pool):
            return pool
        spec = {"draw": "budget", **cell.spec["clean"], **_read_by(pool)}
        if budget.source == "unseen":
            spec["held_out"] = task.held_out
        labels = pool.labels
        return pool.select(self.store.rows(spec, lambda: stratified(labels, budget.n, seed=budget.seed).tolist()))


def _read_by(data: Dataset) -> dict[str, Any]:
    """The settings that decide which rows of a file can be drawn: prompts that are too long are left out."""
    if data.modality != "conversations":
        return {}
    return {"template": data.conversation_encoder.template, "max_length": data.conversation_encoder.max_length}
