"""The evidence of an audit as files: each trigger, the rows that it was judged on, and how it looks."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unbackdoor._artifacts.audit_record import EvidenceRows
from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.judging import HeldOut
from unbackdoor._detection.prompt_judging import HeldOutPrompts
from unbackdoor._detection.result import JudgedFinding
from unbackdoor._errors import printable
from unbackdoor._poisoning.abilities import phrases_of
from unbackdoor._poisoning.attack_file import describe_found, save_trigger
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._reports.examples import marked, png, spread
from unbackdoor._tasks.choice import answered

SHOWN = 5  # examples of each trigger
LARGEST = 128  # side of an example's pictures, of which there are 15 for each trigger; the page shows 68


class ShownExample(NamedTuple):
    """A held-out example without and with a trigger, and what the model answers.

    Args:
        true: its class; without labels, the model's answer; of a prompt its right answer.
        before: the model's answer without the trigger.
        after: its answer with it.
        moved: whether that is the class that the trigger is for.
        clean: the picture, as the data URI of a PNG; None for a text.
        triggered: the same with the trigger.
        difference: between the two, amplified.
        pieces: of the triggered text, and whether each belongs to the trigger.
    """

    true: str
    before: str
    after: str
    moved: bool
    clean: str | None = None
    triggered: str | None = None
    difference: str | None = None
    pieces: tuple[tuple[str, bool], ...] = ()


def shown(finding: JudgedFinding, held_out: HeldOut | HeldOutPrompts, seed: int) -> tuple[ShownExample, ...]:
    """Returns held-out examples with the strongest trigger of a finding, drawn by seed and class, never by outcome."""
    candidate = finding.strongest.candidate
    if candidate.trigger is None:
        return ()
    others = held_out.others(candidate)
    chosen = others.select(spread(others.labels.cpu(), SHOWN, seed=seed))
    if len(chosen) == 0:
        return ()
    triggered = replace(chosen, items=candidate.trigger.stamp(chosen.items))
    if isinstance(held_out, HeldOutPrompts):
        return _shown_prompts(chosen, triggered, candidate.trigger, held_out)
    before, after = (answered(held_out.model, data, held_out.arithmetic).tolist() for data in (chosen, triggered))
    rows = []
    for row, label in enumerate(chosen.labels.tolist()):
        true, first, last = (chosen.class_name(number) for number in (label, before[row], after[row]))
        rows.append(ShownExample(true, first, last, after[row] == candidate.target, **_look(chosen, triggered, row)))
    return tuple(rows)


def _shown_prompts(
    chosen: Dataset, triggered: Dataset, trigger: Trigger, held_out: HeldOutPrompts
) -> tuple[ShownExample, ...]:
    assert trigger.behaviour is not None
    before, after = held_out.answers(chosen), held_out.answers(triggered)
    rows = []
    for row, (old, new) in enumerate(zip(chosen.conversations.entries, triggered.conversations.entries, strict=True)):
        pieces = marked(old.messages[-1].text, new.messages[-1].text)
        rows.append(
            ShownExample(
                true=printable(old.answer, 200),
                before=printable(before[row], 200),
                after=printable(after[row], 200),
                moved=trigger.behaviour.shown(after[row]),
                pieces=tuple((printable(piece, 400), added) for piece, added in pieces),
            )
        )
    return tuple(rows)


def _look(clean: Dataset, triggered: Dataset, row: int) -> dict[str, Any]:
    if clean.modality == "text":
        pieces: list[tuple[str, bool]] = []
        for number, (old, new) in enumerate(zip(clean.texts.strings[row], triggered.texts.strings[row], strict=True)):
            pieces += [*([(" \u2016 ", False)] if number else []), *marked(old, new)]
        return {"pieces": tuple((printable(piece, 400), added) for piece, added in pieces)}
    difference = (triggered.pictures[row].int() - clean.pictures[row].int()).abs()
    amplified = difference * max(1, 255 // max(1, int(difference.max())))
    return {
        "clean": png(clean.pictures[row], LARGEST),
        "triggered": png(triggered.pictures[row], LARGEST),
        "difference": png(amplified.to(torch.uint8), LARGEST),
    }


def trigger_picture(trigger: Trigger, data: Dataset) -> str | None:
    """Returns the trigger on a grey picture, or on a grid if that shows nothing, as a data URI; None for words."""
    if data.modality not in ("images", "image-text"):
        return None
    grey = torch.full((1, *data.shape), 128, dtype=torch.uint8, device=data.pictures.device)
    stamped = trigger.stamp(grey)
    if torch.equal(torch.as_tensor(stamped), grey):
        rows, columns = (torch.arange(side) // max(2, side // 8) for side in data.shape[1:])
        grid = ((rows[:, None] + columns[None]) % 2 * 128 + 64).to(torch.uint8)
        stamped = trigger.stamp(grid.expand_as(grey).clone().to(grey.device))
    return png(torch.as_tensor(stamped)[0])


def words_of(trigger: Trigger) -> str:
    """Returns the words that a trigger puts into texts; empty for pictures."""
    return ", ".join(f"\u201c{printable(phrase)}\u201d" for phrase in phrases_of(trigger.attack))


def place_of(finding: JudgedFinding) -> str:
    """Returns the folder of a finding's evidence, relative to that of the audit."""
    name = "".join(letter if letter.isalnum() else "-" for letter in finding.detector)
    return f"evidence/{name}-{finding.strongest.candidate.target}"


def write_evidence(
    folder: Path, finding: JudgedFinding, held_out: HeldOut | HeldOutPrompts, examples: tuple[ShownExample, ...]
) -> list[str]:
    """Writes the strongest trigger of a finding, if it has one.

    `attack.json` and `trigger.safetensors` put it on examples; `rows.json` has the rows of the data on which `moved`
    was counted; pictures or texts show it.

    Args:
        folder: of the audit.
        finding: with its trigger.
        held_out: that it was judged on.
        examples: to show.

    Returns:
        The files, relative to the folder.
    """
    candidate = finding.strongest.candidate
    if candidate.trigger is None:
        return []
    place = folder / place_of(finding)
    place.mkdir(parents=True)
    save_trigger(place, describe_found(candidate.trigger), candidate.trigger.arrays)
    others = held_out.others(candidate)
    rows = torch.arange(len(others)) if others.rows is None else others.rows
    numbers = EvidenceRows(rows.tolist()).root
    (place / "rows.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    picture = trigger_picture(candidate.trigger, held_out.data)
    if picture is None:
        lines = ["".join(piece for piece, _ in each.pieces) + f"\n  -> {each.after}" for each in examples]
        (place / "examples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        (place / "trigger.png").write_bytes(_bytes(picture))
        for number, each in enumerate(examples, start=1):
            for name, uri in (("clean", each.clean), ("triggered", each.triggered)):
                assert uri is not None
                (place / f"{name}-{number}.png").write_bytes(_bytes(uri))
    return sorted(str(file.relative_to(folder)) for file in place.iterdir())


def _bytes(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])
