"""The options that a command line could have: a sentence must not advise another one."""

import dataclasses

from unbackdoor._cli.forms import form
from unbackdoor._cli.listing import KINDS, Kind
from unbackdoor._cli.options import (
    AttackOptions,
    AuditOptions,
    EvaluateOptions,
    GuardEvaluateOptions,
    GuardFitOptions,
    GuardRunOptions,
    PurifyOptions,
    StressOptions,
    TrainOptions,
)

_COMMANDS = {
    "attack": AttackOptions,
    "audit": AuditOptions,
    "evaluate": EvaluateOptions,
    "guard evaluate": GuardEvaluateOptions,
    "guard fit": GuardFitOptions,
    "guard run": GuardRunOptions,
    "purify": PurifyOptions,
    "stress": StressOptions,
    "train": TrainOptions,
}
_CHOSEN: dict[str, Kind] = {"attack": "attacks", "guard fit": "guards", "purify": "methods", "train": "trainers"}


def command_of(arguments: list[str]) -> str:
    """Returns the command of a command line, such as `purify` or `guard fit`; empty without one."""
    words = [word for word in arguments if not word.startswith("-")]
    return " ".join(words[: 2 if words[:1] == ["guard"] else 1])


def own_options(arguments: list[str]) -> frozenset[str] | None:
    """Returns the options of a command line; None for a command whose options are few and named in its own messages.

    >>> "--batch-size" in own_options(["purify", "fst", "suspect/"]), "--batch-size" in own_options(["purify", "auto"])
    (True, False)
    """
    command = command_of(arguments)
    if command not in _COMMANDS:
        return None
    names = [field.name for field in dataclasses.fields(_COMMANDS[command])]
    chosen = next(iter([word for word in arguments if not word.startswith("-")][len(command.split()) :]), "")
    entries = KINDS[_CHOSEN[command]] if command in _CHOSEN else ()
    for entry in entries:
        if entry.name in chosen.split("+"):
            names += [field.name for field in dataclasses.fields(form(entry))]
    return frozenset(f"--{name.replace('_', '-')}" for name in names)


def out_of_memory_sentence(arguments: list[str]) -> str:
    """Returns what is said if memory runs out: by which options of the command line less of it is needed."""
    own = own_options(arguments) or frozenset()
    smaller = [name for name in ("--batch-size", "--image-size", "--max-length") if name in own]
    advice = [f"a smaller {' or '.join(smaller)}"] if smaller else []
    advice += ["fewer examples", *(["--device cpu"] if "--device" in own else ["a machine with more memory"])]
    return f"Out of memory; nothing was kept. Take {', '.join(advice[:-1])}, or {advice[-1]}."
