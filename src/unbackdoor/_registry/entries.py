"""Names on the command line and their classes, resolved on use so that listing them imports nothing heavy."""

import dataclasses
import difflib
import importlib
import inspect
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._value import fields_of

Modality = Literal["images", "text", "conversations", "image-text"]


class Need(StrEnum):
    """A need of a method or an attack besides the model and its options, in the words of `list`."""

    CLEAN = "clean data"
    INPUTS = "clean inputs (their labels are not used)"
    BASE = "a pre-trained base"
    PROXY = "a proxy for the same task"
    TOKENIZER = "the tokenizer of the clean data"
    REFERENCE = "a causal language model (reference)"
    SURROGATE = "a clean model (trained first if none is given)"
    COPIES = "a triggered copy of the data"
    BATCH_NORM = "BatchNorm"
    NORMALISATION = "normalisation layers"
    CHANNELS = "convolutions followed by BatchNorm"
    SKIP_CONNECTIONS = "skip connections"
    STAGES = "convolutions or transformer blocks"
    ATTENTION = "attention heads"
    BLOCKS = "at least three transformer blocks"
    ADAPTER = "a suspect that is a LoRA adapter"
    ANSWER = "the attacker's answer"
    BEHAVIOURS = "a file of wanted and unwanted answers"
    BERT = "an encoder of the kind of BERT, RoBERTa or DeBERTa"


class Entry(NamedTuple):
    """The facts of a method, an attack or an architecture, and the place of its class.

    Args:
        name: name on the command line.
        location: `module:Class`.
        summary: one line.
        needs: inputs that are needed besides the model.
        passes: forward and backward passes over the clean data at the default settings; the fewest and the most if that
            depends on the model; None if passes do not measure the cost.
        cost: further cost, in words.
        year: year of the paper.
        paper: title of the paper.
        modality: the kinds of data that it serves.
        recommended: the kinds of data for which it is one of the first to try, see docs/choosing.md.
        damage: of a method: what most likely cost a model its accuracy, and what to try; the rest of a sentence.
        blind: of a detector or a guard: the triggers that it cannot see.
        on_request: of a detector: whether it runs only if it is named, since no clean models were measured with it.
    """

    name: str
    location: str
    summary: str
    needs: tuple[Need, ...] = ()
    passes: int | tuple[int, int] | None = None
    cost: str = ""
    year: int | None = None
    paper: str = ""
    modality: tuple[Modality, ...] = ("images",)
    recommended: tuple[Modality, ...] = ()
    damage: str = ""
    blind: str = ""
    on_request: bool = False

    def facts(self) -> str:
        """Returns one line for `list`: kinds of data, needs and cost."""
        parts = [", ".join(self.modality)]
        if self.needs:
            parts.append(f"needs {', '.join(self.needs)}")
        passes = "" if self.passes is None else _passes(self.passes)
        cost = ", ".join(part for part in (passes, self.cost) if part)
        return "; ".join([*parts, cost] if cost else parts)

    def resolve(self) -> Any:
        """Import the class."""
        return _imported(self.location)


def _passes(count: int | tuple[int, int]) -> str:
    if isinstance(count, tuple):
        return f"{count[0]} to {count[1]} passes"
    return f"{count} passes" if count else "no pass"


def _imported(location: str) -> Any:
    module, _, name = location.partition(":")
    return getattr(importlib.import_module(module), name)


def located(name: str) -> Any:
    """Imports the object that `package.module:Class` names.

    Raises:
        UnbackdoorError: the import fails.
    """
    try:
        return _imported(name)
    except (ImportError, AttributeError) as problem:
        raise UnbackdoorError(f"{name} cannot be imported: {problem}. It must read package.module:NAME.") from None


# For each table of entries what one of them is, and the command that takes it.
_COMMANDS = {
    "purifiers": ("a purifier", "unbackdoor purify"),
    "attacks": ("an attack", "unbackdoor attack"),
    "detectors": ("a detector", "unbackdoor audit --tests"),
    "guards": ("a guard", "unbackdoor guard fit"),
    "trainers": ("a trainer", "unbackdoor train"),
}


def find(name: str, entries: tuple[Entry, ...], kind: str, listing: str) -> Entry:
    """Returns the entry of a name, or of `package.module:Class` for a class that is not registered.

    Raises:
        UnbackdoorError: there is no such entry; names the closest one, or the command that takes one of that name.
    """
    for entry in entries:
        if entry.name == name:
            return entry
    if ":" in name:
        resolved = located(name)
        return Entry(name, name, (resolved.__doc__ or "").split("\n")[0])
    for module, (one, command) in _COMMANDS.items():
        if name in [entry.name for entry in _imported(f"unbackdoor._registry.{module}:REGISTRY")]:
            raise UnbackdoorError(
                f"There is no {kind} '{name}'; it is {one}. See {command}, and unbackdoor list {listing}."
            )
    close = difflib.get_close_matches(name, [entry.name for entry in entries], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise UnbackdoorError(f"There is no {kind} '{printable(name)}'.{hint} See unbackdoor list {listing}.")


def steps_of(instance: Any) -> tuple[Any, ...]:
    """Returns the steps of a value: those of `Then(a, b)`, or itself."""
    steps = getattr(instance, "steps", None)
    return steps if isinstance(steps, tuple) else (instance,)


def entry_of(instance: Any, entries: tuple[Entry, ...]) -> Entry | None:
    """Returns the entry of a value's class; None if it is not registered."""
    return next((entry for entry in entries if entry.location == _location(instance)), None)


def name_of(instance: Any, entries: tuple[Entry, ...]) -> str:
    """Returns the command-line name of a value: `a+b` for `Then(a, b)`, `package.module:Class` if not registered."""
    pairs = [(step, entry_of(step, entries)) for step in steps_of(instance)]
    return "+".join(_location(step) if entry is None else entry.name for step, entry in pairs)


def _location(instance: Any) -> str:
    owner = instance if inspect.isroutine(instance) else type(instance)  # a function has a name of its own
    return f"{owner.__module__}:{owner.__qualname__}"


def to_json(instance: Any, entries: tuple[Entry, ...]) -> dict[str, Any]:
    """Returns a value as its name and all its fields, one object per step if it has steps; a function has none."""
    if steps_of(instance) != (instance,):
        parts = [to_json(step, entries) for step in steps_of(instance)]
        return {"name": name_of(instance, entries), "parameters": [part["parameters"] for part in parts]}
    if not dataclasses.is_dataclass(instance):
        return {"name": getattr(instance, "__qualname__", type(instance).__qualname__), "parameters": {}}
    return {"name": name_of(instance, entries), "parameters": fields_of(instance)}
