"""From the parameters that messages name in backticks to the command line's options and arguments."""

import ast
import re
from collections.abc import Collection, Mapping
from typing import Any

from unbackdoor._errors import listed

_NAMED = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")
_RECIPE = re.compile(r"\bVictimRecipe\.(\w+)")  # the options of `attack` make one
_LEFT_OUT = re.compile(r"^\w+\.(\w+) must be given\.$")  # a field of a method or attack

# Arguments without a name, and options whose parameter has another name in Python.
_SPELLING = {
    "model": "MODEL",
    "source": "MODEL",
    "grid": "GRID",
    "runs": "RUNS",
    "triggered_data": "--triggered",
    "counts": "--k",
}


def as_options(text: object, command: str = "", own: Collection[str] | None = None) -> str:
    """Returns a message with the options in place of the parameters.

    Args:
        text: message that may name parameters (`image_size`) and settings (`device='cpu'`) in backticks.
        command: the command that runs; only `attack` and `train` have test examples apart from the data.
        own: its options; the message then says which of those that it names the command does not have. None if they
            are not known.

    >>> as_options("`seed` must be at least 0, got -1. Leave `image_size` out, or take `device='cpu'`.")
    '--seed must be at least 0, got -1. Leave --image-size out, or take --device cpu.'
    >>> as_options("Pass `overwrite=True`, `tune=False` or `columns={'label': 'NAME'}`.")
    'Pass --overwrite, --no-tune or --columns label=NAME.'
    >>> as_options("VictimRecipe.batch_size must be at least 2, got 1.")
    '--batch-size must be at least 2, got 1.'
    >>> as_options("Sande.known_answer must be given.")
    '--known-answer must be given.'
    >>> as_options("Name one with `head`.", "attack", {"--out"})
    'Name one with --head. (unbackdoor attack has no --head.)'
    """
    names = _SPELLING if command in ("attack", "train") else {**_SPELLING, "test": "--data"}

    def option(match: re.Match[str]) -> str:
        name = match[1].replace("_", "-")
        if match[2] is None:
            return names.get(match[1], f"--{name}")
        setting = _literal(match[2])
        if isinstance(setting, bool):
            return f"--{name}" if setting else f"--no-{name}"
        return f"{names.get(match[1], f'--{name}')} {_typed(setting)}"

    parts = _RECIPE.sub(r"`\1`", _LEFT_OUT.sub(r"`\1` must be given.", str(text)))
    shown = _NAMED.sub(option, parts)
    named = dict.fromkeys(option(match).split(" ")[0] for match in _NAMED.finditer(parts))
    strange = [name for name in named if own is not None and name.startswith("--") and not _is_of(name, own)]
    return f"{shown} (unbackdoor {command} has no {listed(strange)}.)" if strange else shown


def _is_of(option: str, own: Collection[str]) -> bool:
    """Whether a command has an option, or the one that it switches off."""
    return not {option, option.replace("--no-", "--")}.isdisjoint(own)


def with_options(record: Mapping[str, Any], command: str = "") -> dict[str, list[str]]:
    """Returns notes and warnings of a record with the options in place of the parameters; see `as_options`."""
    return {key: [as_options(sentence, command) for sentence in record[key]] for key in ("notes", "warnings")}


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a placeholder, such as FILE
        return text


def _typed(setting: object) -> str:
    """Returns a value as it is typed: several separated by commas, a dictionary as KEY=VALUE."""
    if isinstance(setting, dict):
        return ",".join(f"{key}={entry}" for key, entry in setting.items())
    return ",".join(map(str, setting)) if isinstance(setting, list | tuple) else str(setting)
