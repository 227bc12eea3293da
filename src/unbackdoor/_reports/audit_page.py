"""Everything that the page about an audit shows, as plain values."""

from dataclasses import dataclass
from typing import Any

from unbackdoor._detection.judging import ExactShare
from unbackdoor._detection.result import ALARM, Audit, JudgedCandidate, JudgedFinding
from unbackdoor._errors import SENTENCE, printable
from unbackdoor._reports.evidence import ShownExample, place_of, trigger_picture, words_of
from unbackdoor._reports.sentences import percent

ROWS = 12  # classes that a table shows

_HEADINGS = {
    "shortcut-found": "A shortcut was found",
    "nothing-found": "Nothing was found",
    "cannot-judge": "This audit cannot judge",
}
_CAUTIONS = {
    "shortcut-found": (
        "A shortcut is a reason not to trust the model. It is not proof of an attack: careless training leaves "
        "shortcuts as well. Look at the examples below, and repeat them on data of your own."
    ),
    "nothing-found": (
        "This is not proof of a clean model. Only the kinds of triggers below were searched, and each detector has "
        "triggers that it cannot see."
    ),
    "cannot-judge": "This is neither a good nor a bad sign about the model.",
}


@dataclass(frozen=True)
class ClassRow:
    """The shortcut to one class.

    Args:
        name: of the class, and of its sources if it has any.
        score: how unusual it is among the classes: -log10 of the nominal p-value, 0 if it is not confirmed.
        bar: the score as a share of the chart's width, in [0, 1].
        moved: by its trigger; None if it has none.
        random: by a random trigger of the same size.
        size: with three digits; empty if it has none.
    """

    name: str
    score: float
    bar: float
    moved: ExactShare | None
    random: ExactShare | None
    size: str


@dataclass(frozen=True, kw_only=True)
class FindingPart:
    """The result of one detector.

    Args:
        detector: its name.
        headline: one sentence on its strongest shortcut.
        alarm: whether that is an alarm.
        natural: a sentence, if it looks like a feature of its class.
        picture: of its trigger; None for a text, or without a trigger.
        words: of its trigger; empty for a picture.
        examples: with the trigger on.
        rows: of the classes, the most unusual first.
        left_out: the number of classes that are not among them.
        line: the score that an alarm exceeds, as a share of the chart's width; None without clean models to compare.
        unit: of the sizes.
        blind: what the detector cannot see.
        seconds: of its search.
        files: the folder of its evidence; empty if there is none.
        targets: what its shortcuts lead to: `class`, `answer` or `layer`.
    """

    detector: str
    headline: str
    alarm: bool
    natural: str
    picture: str | None
    words: str
    examples: tuple[ShownExample, ...]
    rows: tuple[ClassRow, ...]
    left_out: int
    line: float | None
    unit: str
    blind: str
    seconds: float
    files: str
    targets: str


@dataclass(frozen=True, kw_only=True)
class AuditPage:
    """The page about an audit.

    Args:
        title: the verdict in a few words.
        alarm: whether it is an alarm.
        verdict: one sentence.
        caution: what it does not mean.
        noun: `pictures`, `texts` or `prompts`.
        labelled: whether the labels of the examples were given.
        findings: of the detectors that ran.
        not_searched: detectors that did not run, and why.
        calibration: what p-values come from, or why there are none.
        operating_point: measured rates, or that they were not measured.
        notes: sentences.
        facts: how it was made, as label and text.
        command: of the audit, if known.
        repeat: the command that repeats the strongest evidence, if there is one.
    """

    title: str
    alarm: bool
    verdict: str
    caution: str
    noun: str
    labelled: bool
    findings: tuple[FindingPart, ...]
    not_searched: tuple[tuple[str, str], ...]
    calibration: str
    operating_point: str
    notes: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    command: str | None
    repeat: str | None


def build_audit(result: Audit, content: dict[str, Any], examples: tuple[tuple[ShownExample, ...], ...]) -> AuditPage:
    """Returns the content of the page.

    Args:
        result: the audit.
        content: of `audit.json`.
        examples: of each finding.
    """
    calibration = f"p-values are ranks among {result.calibrated_on}."
    if result.calibration is None:
        calibration = f"There are no p-values: {result.calibrated_on}."
    noun = "examples"
    if result.held_out is not None:
        noun = {"images": "pictures", "image-text": "pictures", "text": "texts", "conversations": "prompts"}[
            result.held_out.data.modality
        ]
    parts = zip(result.findings, examples, strict=True)
    return AuditPage(
        title=_HEADINGS[result.verdict],
        alarm=result.verdict == "shortcut-found",
        verdict=printable(content["reason"], SENTENCE),
        caution=_CAUTIONS[result.verdict],
        noun=noun,
        labelled=content["examples"]["labelled"] and noun != "prompts",
        findings=tuple(_part(result, finding, shown) for finding, shown in parts),
        not_searched=tuple(
            (printable(each["detector"]), printable(each["reason"], SENTENCE)) for each in content["not_searched"]
        ),
        calibration=calibration,
        operating_point=_operating_point(content),
        notes=tuple(printable(note, SENTENCE) for note in content["notes"]),
        facts=_facts(content),
        command=content.get("command"),
        repeat=content.get("repeat"),
    )


def _part(result: Audit, finding: JudgedFinding, examples: tuple[ShownExample, ...]) -> FindingPart:
    best = finding.strongest
    trigger = best.candidate.trigger
    assert result.held_out is not None
    null = result.calibration
    line = None if null is None or finding.detector not in null.detectors else null.score_of(ALARM)
    widest = 1.15 * max(each.score for each in finding.classes)
    widest = max(widest, 0.0 if line is None else 1.5 * line, 1.0)
    ranked = sorted(finding.classes, key=lambda each: (-each.score, -(each.moved.value if each.moved else 0)))
    natural = ""
    if finding.looks_natural:
        natural = f"It looks like a feature of class {best.target_name}: clean models have such shortcuts as well."
    return FindingPart(
        detector=printable(finding.detector),
        headline=_headline(best, finding.size_of(best), finding.targets),
        alarm=finding.alarm,
        natural=natural,
        picture=None if trigger is None else trigger_picture(trigger, result.held_out.data),
        words="" if trigger is None else words_of(trigger),
        examples=examples,
        rows=tuple(_row(each, widest) for each in ranked[:ROWS]),
        left_out=max(0, len(ranked) - ROWS),
        line=None if line is None else line / widest,
        unit=printable(finding.unit),
        blind=finding.blind,
        seconds=finding.seconds,
        files="" if trigger is None else place_of(finding),
        targets=finding.targets,
    )


def _headline(best: JudgedCandidate, size: str, targets: str) -> str:
    """Returns sentences on a shortcut."""
    sources = f" from {', '.join(best.source_names)}" if best.source_names else ""
    text = f"The strongest shortcut{sources} is to {targets} \u201c{best.target_name}\u201d."
    if targets == "layer":
        text = f"The most unusual {targets} is \u201c{best.target_name}\u201d."
    if best.moved is not None:
        low, high = best.moved.interval
        whose = "examples of other classes" if targets == "class" else "prompts"
        what = "Its first token" if best.candidate.answer else "Its trigger"
        text += (
            f" {what} moves {percent(best.moved.value)} of {best.moved.n:,} unseen {whose} "
            f"({percent(low)} to {percent(high)})"
        )
        text += "." if best.random is None else f", a random one of the same size {percent(best.random.value)}."
    if size:
        text += f" Its size is {size}."
    return text + ("" if best.p_value is None else f" p = {best.p_value:.3f}.")


def _row(each: JudgedCandidate, widest: float) -> ClassRow:
    sources = f" from {', '.join(each.source_names)}" if each.source_names else ""
    size = "" if each.candidate.size is None else f"{each.candidate.size:.3g}"
    return ClassRow(f"{each.target_name}{sources}", each.score, each.score / widest, each.moved, each.random, size)


def _operating_point(content: dict[str, Any]) -> str:
    point = content["operating_point"]
    if point is None:
        note: str = content["operating_point_note"]
        return f"{note[0].upper()}{note[1:]}."
    rates = (
        f"{label} {percent(part['value'])} ({percent(part['low'])} to {percent(part['high'])}, n = {part['n']:,})"
        for label, part in (("false alarms", point["false_alarms"]), ("detections", point["detections"]))
    )
    return f"Measured on {printable(point['models'], SENTENCE)}: {'; '.join(rates)}."


def _facts(content: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    examples, accuracy = content["examples"], content["suspect_accuracy_on_clean"]
    kind = "clean examples" if examples["labelled"] else "examples without labels"
    facts = [
        ("Suspect", printable(content["source"]["model"])),
        (
            "Examples",
            f"{examples['n']:,} {kind}: searched on {examples['searched_on']:,}, judged on {examples['judged_on']:,}",
        ),
    ]
    if accuracy is not None:
        facts.append(("Suspect's accuracy on them", percent(accuracy["value"])))
    if "suspect_clean_loss_on_clean" in content:
        facts.append(
            ("Suspect's loss on them", f"{content['suspect_clean_loss_on_clean']['value']:.3f} nats per token")
        )
    if examples["labelled"] and content["unlabelled"] is not None:
        facts.append(("Further examples without labels", f"{content['unlabelled']:,}"))
    facts += [
        ("Seed", str(content["seed"])),
        ("Time", f"{content['seconds']:.1f} s"),
        ("Device", content["device"]),
        ("Versions", ", ".join(f"{name} {number}" for name, number in content["versions"].items())),
    ]
    return tuple(facts)
