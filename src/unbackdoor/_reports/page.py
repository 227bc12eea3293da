"""The content of the page as plain values: pictures, verdicts, scores and settings."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import SENTENCE, printable
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._reports.examples import Example, examples_of
from unbackdoor._reports.sentences import caution, percent
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._tasks.score import Score


class Contender(NamedTuple):
    """One model on the page.

    Args:
        name: `suspect` for the first, the method's name for the others.
        model: the model whose predictions are shown.
        score: score of the model.
        seconds: seconds of purification; None for the suspect.
    """

    name: str
    model: nn.Module
    score: Score
    seconds: float | None


@dataclass(frozen=True)
class ComparedMeasure:
    """One score of all contenders; a part is None if it was not measured."""

    name: str
    meaning: str
    better: Literal["higher", "lower"]
    parts: tuple[Proportion | None, ...]


@dataclass(frozen=True)
class ClassAccuracy:
    """Clean accuracy on one class, and for each contender whether it fell below the suspect's, intervals apart."""

    name: str
    parts: tuple[Proportion, ...]
    fell: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """The numbers of the page.

    Args:
        title: title of the page.
        noun: `pictures` or `texts`.
        verdict: one plain sentence.
        others: a sentence for each contender between the first and the last.
        caution: the limits of the verdict.
        names: names of the contenders, the suspect first.
        seconds: seconds of purification, for each contender.
        measures: clean accuracy first.
        charted: the measures that the charts show.
        examples: the same for all contenders.
        amplified: the factor by which differences are amplified.
        triggered: the examples carry a trigger.
        target: the class that the attacker wants for all of them; None without an attack, or with one for each class.
        classes: clean accuracy for each class.
        facts: settings and costs, as label and text.
        unusable: why the last model is not usable; None if it is.
        warnings: the other warnings of the purification.
        command: the command that repeats the run, if known.
    """

    title: str
    noun: str
    verdict: str
    others: tuple[str, ...]
    caution: str
    names: tuple[str, ...]
    seconds: tuple[float | None, ...]
    measures: tuple[ComparedMeasure, ...]
    charted: tuple[ComparedMeasure, ...]
    examples: tuple[Example, ...]
    amplified: int
    triggered: bool
    target: str | None
    classes: tuple[ClassAccuracy, ...]
    facts: tuple[tuple[str, str], ...]
    unusable: str | None
    warnings: tuple[str, ...]
    command: str | None


def build(
    *, title: str, contenders: list[Contender], test: Dataset, attacked: Triggered | None, record: dict[str, Any]
) -> Page:
    """Collect the numbers of the page.

    Args:
        title: title of the page.
        contenders: the suspect first, the model that the page is about last.
        test: the clean examples that were scored.
        attacked: the triggered ones; clean and triggered pictures stand next to each other if the labels show that
            these are the examples of `test` in their order, as `triggered` makes them.
        record: the content of `record.json`; its `seed` draws the example pictures, its `command` repeats the run.
    """
    models = [contender.model for contender in contenders]
    examples, amplified = examples_of(models, test, attacked, int(record.get("seed") or 0))
    noun = "pictures" if test.modality == "images" else "texts"
    usable = record.get("usable") is not False
    warnings = [printable(text, SENTENCE) for text in record.get("warnings", ())]
    measures = _measures([contender.score for contender in contenders], noun)
    return Page(
        title=title,
        noun=noun,
        verdict=_verdict(contenders, test, attacked),
        others=tuple(_other(contender) for contender in contenders[1:-1]),
        caution=caution(contenders[0].score.attack_success, "one trigger"),
        names=tuple(contender.name for contender in contenders),
        seconds=tuple(contender.seconds for contender in contenders),
        measures=measures,
        charted=measures[:3],
        examples=examples,
        amplified=amplified,
        triggered=attacked is not None,
        target=None if attacked is None or attacked.target is None else test.class_name(attacked.target),
        classes=_classes([contender.score for contender in contenders]),
        facts=facts_of(record, len(test), attacked),
        unusable=None if usable else warnings[0],
        warnings=tuple(warnings[not usable :]),
        command=record.get("command"),
    )


def _measures(scores: list[Score], noun: str) -> tuple[ComparedMeasure, ...]:
    """Those that at least one contender has."""
    kinds: tuple[tuple[str, str, str, Literal["higher", "lower"]], ...] = (
        ("clean_accuracy", "Clean accuracy", f"clean {noun} classified as their class", "higher"),
        ("attack_success", "Attack success", f"triggered {noun} classified as the attacker wants", "lower"),
        ("recovered_accuracy", "Recovered accuracy", f"triggered {noun} classified as their true class", "higher"),
        (
            "clean_model_flip_rate",
            "Clean model's flip rate",
            f"triggered {noun} that a model without the backdoor classifies as the attacker wants",
            "lower",
        ),
    )
    measures = [
        ComparedMeasure(name, meaning, better, tuple(getattr(score, field) for score in scores))
        for field, name, meaning, better in kinds
    ]
    return tuple(measure for measure in measures if any(part is not None for part in measure.parts))


def _classes(scores: list[Score]) -> tuple[ClassAccuracy, ...]:
    rows = []
    for name, before in scores[0].per_class.items():
        parts = tuple(score.per_class[name] for score in scores)
        rows.append(ClassAccuracy(name, parts, tuple(part.interval[1] < before.interval[0] for part in parts)))
    return tuple(rows)


def _verdict(contenders: list[Contender], test: Dataset, attacked: Triggered | None) -> str:
    before, after = contenders[0].score, contenders[-1]
    noun = "pictures" if test.modality == "images" else "texts"
    accuracy = f"clean accuracy went from {_percent(before.clean_accuracy)} to {_percent(after.score.clean_accuracy)}"
    if attacked is None or before.attack_success is None or after.score.attack_success is None:
        return f"With {after.name}, {accuracy}."
    wanted = "the class that the attacker wants"
    if attacked.target is not None:
        wanted = f"“{test.class_name(attacked.target)}”, which the attacker wants,"
    recovered = ""
    if before.recovered_accuracy is not None and after.score.recovered_accuracy is not None:
        recovered = (
            f"; as their true class in {_percent(before.recovered_accuracy)} before and in "
            f"{_percent(after.score.recovered_accuracy)} after"
        )
    return (
        f"Triggered {noun} were classified as {wanted} in {_percent(before.attack_success)} of cases before and in "
        f"{_percent(after.score.attack_success)} after {after.name}{recovered}. {accuracy[0].upper()}{accuracy[1:]}."
    )


def _other(contender: Contender) -> str:
    accuracy = f"clean accuracy {_percent(contender.score.clean_accuracy)}"
    if contender.score.attack_success is None:
        return f"{contender.name}: {accuracy}."
    return f"After {contender.name} it is {_percent(contender.score.attack_success)} of cases ({accuracy})."


def _percent(part: Proportion) -> str:
    return percent(part.value)


def _method_facts(method: dict[str, Any], choice: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The method with its settings and, if it is one that chooses, which one it kept."""
    facts = [("Method", str(method["repr"]))]
    return facts if choice is None else [*facts, ("Kept", str(choice["kept"] or "the suspect, unchanged"))]


def facts_of(record: dict[str, Any], scored: int, attacked: Triggered | None) -> tuple[tuple[str, str], ...]:
    """The settings and costs in the record; missing ones are left out."""
    facts: list[tuple[str, str]] = []
    method, source, clean = record.get("method"), record.get("source"), record.get("clean")
    if source:
        facts.append(("Suspect", printable(source["model"])))
    if method:
        facts += _method_facts(method, record.get("choice"))
    if clean:
        text = f"{clean['n']:,} examples"
        if clean.get("held_out"):
            text += f", {clean['held_out']:,} of them held back for a selection"
        facts.append(("Clean data", text))
    own = record.get("suspect_accuracy_on_clean")
    if own:
        facts.append(("Suspect's accuracy on it", f"{100 * own['value']:.1f}\u202f%"))
    facts += [(str(label), str(text)) for label, text in record.get("facts", {}).items()]
    facts.append(("Scored on", f"{scored:,} clean examples"))
    if attacked is not None:
        facts.append(("Triggered", f"{len(attacked.data):,} of them, label rule {attacked.label_rule}"))
    if "seed" in record:
        facts.append(("Seed", str(record["seed"])))
    if "seconds" in record:
        facts.append(("Time", f"{record['seconds']:.1f} s"))
    if "peak_memory_bytes" in record:
        facts.append(("Peak memory", f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    if "device" in record:
        facts.append(("Device", str(record["device"])))
    if "versions" in record:
        facts.append(("Versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())))
    return tuple(facts)
