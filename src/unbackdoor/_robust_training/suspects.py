"""The rows that a trainer distrusts, how often it is right, and suspects.parquet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbackdoor._data.dataset import Dataset
from unbackdoor._tasks.proportion import Proportion

FILE = "suspects.parquet"


@dataclass(frozen=True)
class Suspects:
    """Rows that a trainer distrusts.

    Args:
        rows: positions in the data that it was given, (k,), each once.
        scores: the suspicion of each, (k,); a larger one is more suspicious.
        measure: what a score is, in words.
    """

    rows: Tensor
    scores: Tensor
    measure: str

    def precision_and_recall(self, poisoned: Tensor) -> tuple[Proportion | None, Proportion | None]:
        """Precision and recall.

        Args:
            poisoned: positions of the poisoned rows, (m,).

        Returns:
            The share of distrusted rows that are poisoned, and of poisoned rows that are distrusted; None of no rows.
        """
        right = int(torch.isin(self.rows, poisoned).sum())
        return (
            Proportion(right, len(self.rows)) if len(self.rows) else None,
            Proportion(right, len(poisoned)) if len(poisoned) else None,
        )

    def to_json(self, poisoned: Tensor | None) -> dict[str, Any]:
        """The entry of the record; without the truth, precision and recall are null."""
        precision, recall = (None, None) if poisoned is None else self.precision_and_recall(poisoned)
        return {
            "n": len(self.rows),
            "measure": self.measure,
            "poisoned": None if poisoned is None else len(poisoned),
            "precision": None if precision is None else precision.to_json(),
            "recall": None if recall is None else recall.to_json(),
        }

    def write(self, folder: Path, data: Dataset) -> None:
        """Write suspects.parquet into a directory, the most suspicious row first.

        Args:
            folder: the directory.
            data: the data that the positions are of.
        """
        import pyarrow
        from pyarrow import parquet

        order = self.scores.argsort(descending=True, stable=True)
        rows = self.rows[order]
        labels = data.labels.cpu()[rows].tolist()
        table = {
            "row": (rows if data.rows is None else data.rows.cpu()[rows]).tolist(),
            "label": labels,
            "class": [data.class_name(label) for label in labels],
            "score": self.scores[order].double().tolist(),
        }
        parquet.write_table(pyarrow.table(table), folder / FILE)
