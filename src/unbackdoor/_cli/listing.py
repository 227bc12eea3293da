"""The output of `list`, derived from the tables of facts."""

import textwrap
from collections.abc import Callable
from typing import Literal, get_args

from unbackdoor._registry.archs import REGISTRY as ARCHS
from unbackdoor._registry.attacks import REGISTRY as ATTACKS
from unbackdoor._registry.detectors import REGISTRY as DETECTORS
from unbackdoor._registry.entries import Entry, Modality, Need
from unbackdoor._registry.guards import REGISTRY as GUARDS
from unbackdoor._registry.purifiers import REGISTRY as PURIFIERS
from unbackdoor._registry.trainers import REGISTRY as TRAINERS

Kind = Literal["methods", "attacks", "archs", "detectors", "guards", "trainers"]

NONE = Entry(
    "none",
    "unbackdoor._cli.commands.attack:NoAttack",
    "no attack: a clean model by the same recipe, the control",
    modality=get_args(Modality),
)

KINDS: dict[Kind, tuple[Entry, ...]] = {
    "methods": PURIFIERS,
    "attacks": (*ATTACKS, NONE),
    "archs": ARCHS,
    "detectors": DETECTORS,
    "guards": GUARDS,
    "trainers": TRAINERS,
}


def show(kind: Kind | None) -> None:
    """Print the entries of a kind with their facts; for None, the names of all."""
    if kind is None:
        for each, entries in KINDS.items():
            print(f"{each} (more: unbackdoor list {each})")
            print(_wrapped(", ".join(entry.name for entry in entries)))
        return
    width = max(len(entry.name) for entry in KINDS[kind])
    if kind != "methods":
        _show_facts(KINDS[kind], width)
        return
    shown: set[str] = set()
    for heading, first, belongs in _GROUPS:
        group = [entry for entry in PURIFIERS if belongs(entry)]
        group.sort(key=lambda entry: not _is_recommended(entry, first))  # the others stay in the order of the table
        recommended = [entry.name for entry in group if _is_recommended(entry, first)]
        advice = f": start with {' or '.join(recommended)} (docs/choosing.md says why)" if recommended else ""
        print(f"{heading}{advice}\n")
        _show_facts([entry for entry in group if entry.name not in shown], width)
        again = [entry.name for entry in group if entry.name in shown]
        if again:
            print(_wrapped(f"and from above: {', '.join(again)}"))
        print()
        shown |= {entry.name for entry in group}


def _has(modality: Modality) -> Callable[[Entry], bool]:
    def belongs(entry: Entry) -> bool:
        return modality in entry.modality and Need.CLEAN in entry.needs and not _wants_a_model(entry)

    return belongs


def _wants_a_model(entry: Entry) -> bool:
    return not {Need.BASE, Need.PROXY}.isdisjoint(entry.needs)


# Groups by what a user has: heading, kinds of data whose recommendations count there, condition for an entry.
_GROUPS: tuple[tuple[str, tuple[Modality, ...], Callable[[Entry], bool]], ...] = (
    ("With clean images", ("images",), _has("images")),
    ("With clean texts", ("text",), _has("text")),
    ("With clean prompts and their answers", ("conversations",), _has("conversations")),
    ("With clean pairs of image and caption", ("image-text",), _has("image-text")),
    ("With the pre-trained base of the model, or another model for its task", ("images", "text"), _wants_a_model),
    ("With nothing but the model", (), lambda entry: Need.CLEAN not in entry.needs and not _wants_a_model(entry)),
)


def _is_recommended(entry: Entry, modalities: tuple[Modality, ...]) -> bool:
    return not set(modalities).isdisjoint(entry.recommended)


def _show_facts(entries: list[Entry] | tuple[Entry, ...], width: int) -> None:
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.summary}")
        print(f"{'':<{width}}  {entry.facts()}")
        if entry.year:
            print(f"{'':<{width}}  {entry.paper} ({entry.year})")
        if entry.blind:
            print(f"{'':<{width}}  cannot see: {entry.blind}")
        if entry.on_request:
            print(f"{'':<{width}}  runs only if --tests names it")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
