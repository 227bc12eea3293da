"""The fields of a method for its help, read from the source of its class: to import that takes longer than the help.

Help needs the names, types and defaults of the fields and the docstring. The class declares them once, by expressions
over few names, so these are found in the parsed source and evaluated, and nothing else is run. A generated table of
the same facts would be a second copy of them, and a base of light modules would split each method in two.
"""

import ast
import builtins
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import unbackdoor
from unbackdoor._registry.entries import Entry
from unbackdoor._value import value

_NONE = {
    "(?:is|takes)": "it is",
    "searches it": "it is searched",
    "chooses it": "it is chosen",
    "lets\\s+`false_alarms`\\s+decide\\s+it": "--false-alarms decides it",
}
"""What `None` does, as docstrings put it, and what an option does that is left out."""


def form(entry: Entry) -> type:
    """Returns a value class with the fields and the docstring of an entry's class; it cannot be called.

    The class itself for one that is not of this package: its source may be anywhere.
    """
    module, _, name = entry.location.partition(":")
    if module.partition(".")[0] != "unbackdoor":
        return entry.resolve()  # type: ignore[no-any-return]
    source = _source(module)
    node = source.classes[name]
    # The parser of options reads their meanings from the docstring, but not of a class whose module is not imported.
    members: dict[str, Any] = {"__doc__": in_words(ast.get_docstring(node, clean=False) or ""), "__module__": __name__}
    types: dict[str, Any] = {}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and not _of_the_class(part):
            types[part.target.id] = source.evaluated(part.annotation)
            if part.value is not None:
                members[part.target.id] = source.evaluated(part.value)
    return value(type(name, (), {**members, "__annotations__": types}))


def in_words(docstring: str) -> str:
    """Returns a docstring with `None`, which cannot be typed as an option's value, in words.

    >>> in_words("None is 128 for images; None searches it. None is twice the rank.")
    'by default it is 128 for images; by default it is searched. By default it is twice the rank.'
    """
    for pattern, words in _NONE.items():
        docstring = re.sub(rf"\bNone\s+{pattern}", f"by default {words}", docstring)
    return re.sub(r"(\.\s+)by default", r"\1By default", docstring)


def _of_the_class(part: ast.AnnAssign) -> bool:
    """Whether all values share it: `version: ClassVar[int] = 2`."""
    return isinstance(part.annotation, ast.Subscript) and ast.unparse(part.annotation.value) == "ClassVar"


class _Source:
    """A module of this package, parsed: its classes, what names are assigned there, and where others come from."""

    def __init__(self, module: str) -> None:
        path = Path(unbackdoor.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        self.classes: dict[str, ast.ClassDef] = {}
        self.assigned: dict[str, ast.expr] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.ClassDef():
                    self.classes[node.name] = node
                case ast.Assign(targets=[ast.Name(id=name)], value=assigned):
                    self.assigned[name] = assigned
                case ast.ImportFrom(module=str(origin), names=aliases):
                    self.imported |= {alias.asname or alias.name: (origin, alias.name) for alias in aliases}

    def evaluated(self, expression: ast.expr) -> Any:
        """Returns what an expression gives in that module."""
        names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)} - vars(builtins).keys()
        code = compile(ast.Expression(expression), "<field>", "eval")
        return eval(code, {name: self.named(name) for name in names})

    def named(self, name: str) -> Any:
        """Returns what a name stands for in that module."""
        if name in self.assigned:
            return self.evaluated(self.assigned[name])
        origin, original = self.imported[name]
        if origin.startswith("unbackdoor."):
            return _source(origin).named(original)
        return getattr(importlib.import_module(origin), original)


@functools.cache
def _source(module: str) -> _Source:
    return _Source(module)
