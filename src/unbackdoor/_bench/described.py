"""What a cell keeps of a method, of the finding of a detector, and of the source that ran."""

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from unbackdoor._bench.columns import Column
from unbackdoor._detection.result import JudgedFinding
from unbackdoor._registry.entries import to_json


def finding_entry(finding: JudgedFinding) -> dict[str, Any]:
    """The result of a detector."""
    return {
        "detector": finding.detector,
        "unit": finding.unit,
        "looks_natural": finding.looks_natural,
        "seconds": finding.seconds,
        "classes": [
            {
                "target": each.candidate.target,
                **({"name": each.target_name} if each.candidate.name else {}),
                "sources": list(each.candidate.sources),
                "strength": each.candidate.strength,
                "size": each.candidate.size,
                "nominal_p": each.nominal_p,
                "moved": None if each.moved is None else each.moved.to_json(),
                "random": None if each.random is None else each.random.to_json(),
            }
            for each in finding.classes
        ],
    }


def described(column: Column) -> dict[str, Any]:
    """Returns a value's repr and parameters, with files named without the folders of this machine."""
    parameters = to_json(column.value, column.entries)["parameters"]
    text = json.dumps({"repr": repr(column.value), "parameters": parameters})
    for step in parameters if isinstance(parameters, list) else [parameters]:
        for parameter in step.values():
            if isinstance(parameter, str) and Path(parameter).is_absolute():
                text = text.replace(json.dumps(parameter)[1:-1], Path(parameter).name)
    return dict(json.loads(text))


@functools.lru_cache(maxsize=1)
def commit() -> str | None:
    """Returns the commit of the source tree that runs, with `-dirty` after changes; None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", os.fspath(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return described.stdout.strip() or None
