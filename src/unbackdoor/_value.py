"""Methods and attacks are values: frozen, keyword-only, checked when made.

`value` turns a class with annotated fields into such a value. A field declares its type, its bounds and its default
once; the check, the message and the command line use it, and the class docstring's `Args` section is its help.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from unbackdoor._errors import UnbackdoorError

T = TypeVar("T")

_BOUNDS = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "one of {expected}",
    "finite_number": "a finite number",
    "int_from_float": "a whole number",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "text that is not blank",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
_TYPES = {"float": "a number", "int": "a whole number", "bool": "true or false", "string": "text"}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def value(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only, checked dataclass.

    Raises:
        UnbackdoorError: when a value is made with a field out of bounds (`FST.alpha must be at least 0, got -1.`).
    """
    cls._bools_refused = field_validator("*", mode="before")(_bools_refused)  # type: ignore[attr-defined]
    checked_class = pydantic_dataclass(
        frozen=True, kw_only=True, config=ConfigDict(allow_inf_nan=False, extra="forbid")
    )(cls)
    checked = checked_class.__init__

    @functools.wraps(checked)
    def __init__(self: Any, *positional: Any, **fields: Any) -> None:
        if positional:
            raise UnbackdoorError(f"{cls.__name__} takes its fields by name, got {positional[0]!r} without one.")
        try:
            checked(self, **fields)
        except ValidationError as problem:
            raise UnbackdoorError(sentence(problem, checked_class)) from None

    checked_class.__init__ = __init__  # type: ignore[method-assign]
    return checked_class  # type: ignore[return-value]


def _bools_refused(cls: Any, raw: Any, about: ValidationInfo) -> Any:
    """Turns True and False into text for fields of numbers: pydantic would read them as 1 and 0."""
    kinds = _kinds(cls.__pydantic_fields__[about.field_name].annotation)
    return _bools_as_text(raw) if kinds & {int, float} and not kinds & {bool, str} else raw


def _kinds(annotation: Any) -> set[Any]:
    """Returns the parts of a type: int and None of `int | None`."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def _bools_as_text(raw: Any) -> Any:
    if isinstance(raw, list | tuple):
        return type(raw)(map(_bools_as_text, raw))
    return str(raw) if isinstance(raw, bool) else raw


def sentence(problem: ValidationError, cls: type | None = None) -> str:
    """Returns the problem of a field: owner, field, what is allowed, what came.

    Args:
        problem: pydantic's, whose first error is described.
        cls: the owner, to list its fields if an unknown one was given.
    """
    return error_sentence(problem.errors()[0], problem.title, cls)


def error_sentence(error: Mapping[str, Any], owner: str, cls: type | None = None) -> str:
    """The same for one of pydantic's errors."""
    field, kind, context = ".".join(map(str, error["loc"])), error["type"], error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        names = ", ".join(item.name for item in dataclasses.fields(cls)) if cls else ""
        return f"{owner} has no field {field!r}; its fields are {names}."
    if kind == "missing":
        return f"{owner}.{field} must be given."
    if isinstance(error["loc"][-1], int) and isinstance(error["input"], str) and "," in error["input"]:
        whole = ".".join(map(str, error["loc"][:-1]))
        return f"{owner}.{whole} must be given once for each of its values, got {error['input']}."
    allowed = _BOUNDS.get(kind, "").format(**context)
    allowed = allowed or next((words for type_, words in _TYPES.items() if kind.startswith(type_)), "")
    if not allowed:
        return f"{owner}.{field}: {error['msg'].removeprefix('Value error, ')}."
    return f"{owner}.{field} must be {allowed}, got {_readable(error['input'])}."


def _readable(raw: Any) -> str:
    return raw if isinstance(raw, str) and raw.strip() else repr(raw)


def check_seed(seed: int) -> None:
    """Refuse a seed that some generator cannot take, itself or counted on from."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UnbackdoorError(f"`seed` must be a whole number, at least 0 and less than 2**63, got {seed!r}.")


def fields_of(instance: Any) -> dict[str, Any]:
    """Returns all fields of a value, as JSON scalars and lists."""
    return dict(TypeAdapter(type(instance)).dump_python(instance, mode="json"))


def changed_fields(instance: Any) -> dict[str, Any]:
    """The fields of a value that differ from their defaults, as JSON scalars and lists."""
    defaults = {item.name: item.default for item in dataclasses.fields(instance)}
    return {name: field for name, field in fields_of(instance).items() if defaults[name] != getattr(instance, name)}
