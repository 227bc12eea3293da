"""Commands with a NAME (attack, train, purify, guard fit): functions with the options of the chosen classes."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeVar

from cyclopts import Parameter

from unbackdoor._cli.forms import form
from unbackdoor._cli.options import AttackOptions, GuardFitOptions, PurifyOptions, TrainOptions, asking, of
from unbackdoor._errors import UnbackdoorError
from unbackdoor._registry.entries import Entry, Need
from unbackdoor._registry.purifiers import REGISTRY as PURIFIERS

T = TypeVar("T")


class Classes(NamedTuple):
    """Gives the class of an entry.

    Args:
        of: the real class for work; for help a form of it, see `forms.form`.
        for_help: whether it is for help.
    """

    of: Callable[[Entry], Any]
    for_help: bool


_MODEL = "MODEL is a Hugging Face directory or Hub name, or a weights file with --factory."
_PLAIN = "An option that only one step has may be given without the name of the step, as --alpha."


def single(verb: str, entry: Entry, classes: Classes, typed: str) -> Callable[..., None]:
    """The function behind `attack NAME` or `purify NAME`, with the options of that class; `typed` is for the record."""
    cls = classes.of(entry)
    flat = Parameter(name="*")
    owner = of(entry.name)
    if verb == "purify":

        def purify(model: str, /, *, options: Any, method: Any = None) -> None:
            from unbackdoor._cli.commands.purify import purify as work

            work(model, method if method is not None else cls(), options, command=typed)

        purify.__doc__ = _help(cls, _MODEL)
        purify.__annotations__ = {
            "model": str,
            "options": Annotated[_asking(PurifyOptions, [entry], classes), flat],
            "method": Annotated[cls, Parameter(name="*", group=owner)],
            "return": None,
        }
        return purify

    def attack(*, options: Any, method: Any = None) -> None:
        from unbackdoor._cli.commands.attack import attack as work

        work(method if method is not None else cls(), options)

    attack.__doc__ = _help(cls, "")
    attack.__annotations__ = {
        "options": Annotated[_asking(AttackOptions, [entry], classes), flat],
        "method": Annotated[cls, Parameter(name="*", group=owner)],
        "return": None,
    }
    return attack


def training(entry: Entry, classes: Classes, typed: str) -> Callable[..., None]:
    """The function behind `train NAME`, with the options of that class; `typed` is for the record."""
    cls = classes.of(entry)

    def train(*, options: Any, trainer: Any = None) -> None:
        from unbackdoor._cli.commands.train import train as work

        work(trainer if trainer is not None else cls(), options, command=typed)

    train.__doc__ = _help(cls, "")
    train.__annotations__ = {
        "options": Annotated[_asking(TrainOptions, [entry], classes), Parameter(name="*")],
        "trainer": Annotated[cls, Parameter(name="*", group=of(entry.name))],
        "return": None,
    }
    return train


def fitting(entry: Entry, classes: Classes, typed: str) -> Callable[..., None]:
    """The function behind `guard fit NAME`, with the options of that class; `typed` is for the record."""
    cls = classes.of(entry)

    def fit(model: str, /, *, options: Any, guard: Any = None) -> None:
        from unbackdoor._cli.commands.guard import fit as work

        work(model, guard if guard is not None else cls(), options, command=typed)

    fit.__doc__ = _help(cls, _MODEL)
    fit.__annotations__ = {
        "model": str,
        "options": Annotated[_asking(GuardFitOptions, [entry], classes), Parameter(name="*")],
        "guard": Annotated[cls, Parameter(name="*", group=of(entry.name))],
        "return": None,
    }
    return fit


def composition(steps: list[Entry], classes: Classes, typed: str) -> Callable[..., None]:
    """The function behind `purify A+B`: the options of each step under its name, as in --fst.alpha."""
    if len({entry.name for entry in steps}) < len(steps):
        raise UnbackdoorError(
            f"{'+'.join(entry.name for entry in steps)} has a step twice, whose options would have the same name. Use "
            "Then in Python."
        )
    names = [f"step_{number}" for number in range(len(steps))]

    def purify(model: str, /, *, options: Any, **instances: Any) -> None:
        from unbackdoor._cli.commands.purify import purify as work
        from unbackdoor.purifiers.then import Then

        methods = [instances.get(name) or classes.of(entry)() for name, entry in zip(names, steps, strict=True)]
        work(model, Then(*methods), options, command=typed)

    documents = [_help(classes.of(entry), "").split("\n\n")[0] for entry in steps]
    purify.__doc__ = "\n\n".join([" Then: ".join(documents), _MODEL, _PLAIN])
    annotations: dict[str, Any] = {
        "model": str,
        "options": Annotated[_asking(PurifyOptions, steps, classes), Parameter(name="*")],
    }
    parameters = [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY, annotation=str),
        inspect.Parameter("options", inspect.Parameter.KEYWORD_ONLY, annotation=annotations["options"]),
    ]
    for name, entry in zip(names, steps, strict=True):
        kind: Any = Annotated[classes.of(entry), Parameter(name=entry.name, group=of(entry.name))]
        annotations[name] = kind
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    purify.__annotations__ = {**annotations, "return": None}
    purify.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return purify


def spelled_out(arguments: list[str]) -> list[str]:
    """Returns the arguments of `purify A+B` with --alpha written as --fst.alpha if only one step has such an option."""
    words = [word for word in arguments if not word.startswith("-")]
    if words[:1] != ["purify"] or "+" not in "".join(words[1:2]):
        return arguments
    owners: dict[str, list[str]] = {}
    for name in words[1].split("+"):
        entry = next((entry for entry in PURIFIERS if entry.name == name), None)
        for item in dataclasses.fields(form(entry)) if entry else ():
            owners.setdefault(item.name.replace("_", "-"), []).append(name)
    shared = {item.name.replace("_", "-") for item in dataclasses.fields(PurifyOptions)}
    spelled = []
    for word in arguments:
        option, equals, rest = word.removeprefix("--").partition("=")
        negated = option.removeprefix("no-")
        steps = owners.get(negated if option.startswith("no-") and option not in owners else option, [])
        if word.startswith("--") and len(steps) == 1 and option not in shared:
            no = "no-" if option != negated and option not in owners else ""
            word = f"--{steps[0]}.{no}{negated if no else option}{equals}{rest}"
        spelled.append(word)
    return spelled


_OPTIONS = {Need.CLEAN: "clean", Need.TOKENIZER: "clean", Need.BASE: "base", Need.PROXY: "proxy"}
_OPTIONS |= {Need.REFERENCE: "reference"}

_SPARED = "Needed, unless --rho R --no-tune is given; after e-pur, unless --stream is given as well."


def _asking(options: type[T], entries: list[Entry], classes: Classes) -> type[T]:
    """Returns the options of a command, with those that the chosen steps need among the required ones."""
    needed = {need for entry in entries for need in entry.needs}
    tuning = [entry for entry in entries if Need.CLEAN in entry.needs]
    notes = {"clean": _SPARED} if [entry.name for entry in tuning] == ["fine-mixing"] else {}
    names = dict.fromkeys(option for need, option in _OPTIONS.items() if need in needed and option not in notes)
    return asking(options, *names, notes=notes, marked=classes.for_help)


def _help(cls: type, more: str) -> str:
    """Returns the first paragraph of a class docstring, and the paper's address if the docstring has one."""
    paragraphs = [" ".join(part.split()) for part in (cls.__doc__ or "").split("\n\n")]
    paper = next((part for part in paragraphs if "https://" in part), "")
    return "\n\n".join(part for part in (paragraphs[0], more, paper) if part)
