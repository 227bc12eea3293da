"""`audit`: is there a shortcut in a model, and how do we know?"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unbackdoor._artifacts import directories
from unbackdoor._artifacts.audit_record import write_audit
from unbackdoor._artifacts.record import last_name
from unbackdoor._cli.commands.inputs import (
    base_of,
    factory_name,
    free_file,
    free_place,
    load_dataset,
    load_model,
    show_first_prompt,
)
from unbackdoor._cli.options import AuditOptions, ModelOptions
from unbackdoor._cli.parameters import as_options
from unbackdoor._cli.shell import shell_words
from unbackdoor._detection.audit import audit as audit_model
from unbackdoor._detection.prompt_judging import TOKENS, HeldOutPrompts
from unbackdoor._detection.result import Audit, JudgedFinding
from unbackdoor._errors import (
    SENTENCE,
    CannotJudgeError,
    NoLabelsError,
    ShortcutFoundError,
    UnbackdoorError,
    printable,
)
from unbackdoor._models import calling, loading
from unbackdoor._registry.detectors import REGISTRY
from unbackdoor._registry.entries import find
from unbackdoor._reports import bom, evidence
from unbackdoor._reports.audit_page import build_audit
from unbackdoor._reports.render import render_audit
from unbackdoor._reports.sarif import as_sarif
from unbackdoor._value import check_seed

Shown = tuple[tuple[evidence.ShownExample, ...], ...]
"""The examples to show of each finding."""

_MARKS = {"sarif": '"name": "unbackdoor"', "bom": '"name": "unbackdoor:audit:'}
"""The side files, and what is only in one of that kind that unbackdoor wrote."""


def audit(source: str, options: AuditOptions, *, command: str | None = None) -> None:
    """The `audit` command; `command` is what was typed, for the record and the page."""
    inputs = (source, options.clean, options.unlabelled, options.base)
    out, earlier = (None, None) if options.out is None else free_place(options.out, inputs, options)
    check_seed(options.seed)
    if options.bom is not None:
        bom.check_installed()
    sides = {
        option: free_file(path, option, inputs, options, mark)
        for option, mark in _MARKS.items()
        if (path := getattr(options, option)) is not None
    }
    _check_apart(sides, out)
    detectors = _detectors(options.tests)
    result = _audited(source, options, detectors)
    content = {
        **_with_options(result.to_json()),
        "source": {
            "model": last_name(source),
            **({"base": last_name(options.base)} if options.base else {}),
            "factory": factory_name(options.factory),
        },
        **({} if command is None else {"command": command}),
    }
    texts = _for_other_tools(source, sides, content)
    try:
        try:
            if out is not None:
                inside = {option: path.resolve() for option, path in sides.items() if _is_in(path, out)}
                names = {option: str(path.relative_to(out.resolve())) for option, path in inside.items()}
                side_files = {name: texts.pop(option) for option, name in names.items()}
                _write(out, earlier, side_files, result, content, lambda name: _repeated(source, options, result, name))
        except UnbackdoorError:  # an alarm is not lost for other tools if its evidence cannot be written
            _write_beside(sides, texts)
            raise
        _write_beside(sides, texts)
    finally:  # the verdict may be the work of hours, and is not lost with a file that cannot be written
        print(json.dumps(content, indent=2) if options.json else _verdict_text(result, content))
    if out is not None and not options.json:
        shown = printable(out, SENTENCE)
        print(f"Wrote {shown} after {content['seconds']:.0f} s; open {shown}/audit.html.")
    if options.fail_on_finding and result.verdict == "shortcut-found":
        raise ShortcutFoundError(f"A shortcut was found in {printable(source)}, as is said above.")
    if options.fail_on_finding and result.verdict == "cannot-judge":
        raise CannotJudgeError(f"The audit of {printable(source)} cannot judge, as is said above.")


def _check_apart(sides: dict[str, Path], out: Path | None) -> None:
    """Refuse --sarif and --bom in the place of each other, of --out, or of what the audit writes itself."""
    if len({path.resolve() for path in sides.values()}) < len(sides):
        raise UnbackdoorError(f"--sarif and --bom must be two files, got {sides['sarif']} for both.")
    outputs = {**sides, **({} if out is None else {"out": out})}
    for option, path in sides.items():
        for other, place in outputs.items():
            if _is_in(place, path) or (other == "out" and place.resolve() == path.resolve()):
                raise UnbackdoorError(f"--{option} must be another name, got {path}: --{other} is in its place.")
        if out is not None and _is_in(path, out):
            first = path.resolve().relative_to(out.resolve()).parts[0]
            if first in ("audit.json", "audit.html", "evidence"):
                raise UnbackdoorError(f"--{option} must be another name, got {path}: the audit writes {first} itself.")


def _detectors(tests: str | None) -> list[Any] | None:
    """Returns the detectors that --tests names; None for all."""
    if tests is None:
        return None
    names = [name.strip() for name in tests.split(",") if name.strip()]
    if not names:
        raise UnbackdoorError(f"--tests must be names of detectors with commas between, got {tests!r}.")
    return [find(name, REGISTRY, "detector", "detectors").resolve()() for name in dict.fromkeys(names)]


def _audited(source: str, options: AuditOptions, detectors: list[Any] | None) -> Audit:
    if options.clean is None and options.unlabelled is None:
        raise UnbackdoorError(
            "audit needs --clean, labelled examples without a trigger, or at least --unlabelled ones."
        )
    suspect = load_model(source, options)
    classes = calling.class_names(suspect.model)
    try:
        clean = None if options.clean is None else load_dataset(options.clean, suspect.encode, options, classes)
    except NoLabelsError as problem:
        raise NoLabelsError(f"{problem} An audit takes examples without labels as --unlabelled.") from None
    unlabelled = options.unlabelled and load_dataset(
        options.unlabelled, suspect.encode, options, classes, labelled=False
    )
    if clean is not None:
        show_first_prompt(clean)
    base = options.base and loading.load_base(
        options.base,
        factory=options.factory,
        modality=suspect.encode.modality,
        trust_remote_code=options.trust_remote_code,
    )
    return audit_model(
        suspect.model,
        clean,
        detectors=detectors,
        unlabelled=unlabelled or None,
        base=base or None,
        seed=options.seed,
        head=options.head,
        device=options.device,
        precision=options.precision,
        progress=True,
    )


def _with_options(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of an `audit.json` with the options in place of the parameters; see `as_options`."""
    return {
        **content,
        "reason": as_options(content["reason"]),
        "notes": [as_options(note) for note in content["notes"]],
        "not_searched": [{**each, "reason": as_options(each["reason"])} for each in content["not_searched"]],
    }


def _is_in(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _path_here(source: str) -> str | None:
    """Returns the path of a model that is below the working folder, with slashes; else None."""
    path, here = Path(os.path.abspath(source)), Path.cwd()
    return path.relative_to(here).as_posix() if here in path.parents and path.exists() else None


def _for_other_tools(source: str, sides: dict[str, Path], content: dict[str, Any]) -> dict[str, str]:
    """Returns the texts for other tools, by the options that name their files."""
    texts = {}
    if "sarif" in sides:
        texts["sarif"] = as_sarif(content, _path_here(source))
    if "bom" in sides:
        texts["bom"] = bom.as_bom(content, bom.weight_files(Path(source)))
    return texts


def _write_beside(sides: dict[str, Path], texts: dict[str, str]) -> None:
    """Writes the files for other tools that are not in the directory of the audit, by option."""
    for option, text in texts.items():
        directories.write_file(sides[option], text, option)


def _write(
    out: Path,
    earlier: directories.Content | None,
    side_files: dict[str, str],
    result: Audit,
    content: dict[str, Any],
    repeated: Callable[[Path], str | None],
) -> None:
    """Writes the directory of an audit, and adds to `content` what stands in its `audit.json` besides.

    Args:
        out: the directory.
        earlier: its present content, which is replaced.
        side_files: texts for other tools in it, by name.
        result: of the audit.
        content: of `audit.json`, without names of files.
        repeated: the command that repeats the strongest evidence, by the name of the directory.
    """

    def described(folder: Path, name: Path) -> dict[str, Any]:
        return _described(folder, result, {**content, "findings": findings, "repeat": repeated(name)}, shown)

    def elsewhere(folder: Path, name: Path) -> None:
        content.update(described(folder, name))

    with directories.directory(out, earlier, elsewhere) as folder:
        for name, text in side_files.items():
            directories.write_file(folder / name, text)
        findings, shown = _evidence(folder, result, content)
        written = described(folder, out)
    content.update(written)


def _evidence(folder: Path, result: Audit, content: dict[str, Any]) -> tuple[list[dict[str, Any]], Shown]:
    """Writes the evidence of an audit; returns its findings with the names of these files, and the examples to show."""
    findings, shown = [], []
    for finding, entry in zip(result.findings, content["findings"], strict=True):
        assert result.held_out is not None
        examples = evidence.shown(finding, result.held_out, content["seed"])
        files = evidence.write_evidence(folder, finding, result.held_out, examples)
        findings.append({**entry, "evidence": files})
        shown.append(examples)
    return findings, tuple(shown)


def _described(folder: Path, result: Audit, content: dict[str, Any], shown: Shown) -> dict[str, Any]:
    """Writes the page and the `audit.json` of an audit whose evidence is written; returns the content of the latter."""
    page = build_audit(result, content, shown)
    (folder / "audit.html").write_text(render_audit(page), encoding="utf-8")
    return write_audit(folder / "audit.json", content)


def _repeated(source: str, options: AuditOptions, result: Audit, out: Path) -> str | None:
    """Returns the command that scores the strongest trigger on its held-out examples; None without one or labels."""
    with_trigger = (each for each in result.findings if each.strongest.candidate.trigger is not None)
    finding = next((each for each in with_trigger if each.strongest.moved and each.strongest.moved.n), None)
    if finding is None or options.clean is None or not result.record["examples"]["labelled"]:
        return None
    place = out / evidence.place_of(finding)
    words = ["unbackdoor", "evaluate", source, "--data", options.clean]
    words += ["--attack", str(place / "attack.json"), "--rows", str(place / "rows.json")]
    if isinstance(result.held_out, HeldOutPrompts):
        words += ["--max-new-tokens", str(TOKENS)]
    if base_of(source, options) is not None:
        words += ["--base", str(options.base)]
    for field in dataclasses.fields(ModelOptions):
        setting = getattr(options, field.name)
        if setting != field.default:
            words += [f"--{field.name.replace('_', '-')}", *([] if setting is True else [str(setting)])]
    return shell_words(words)


def _verdict_text(result: Audit, content: dict[str, Any]) -> str:
    """Returns the verdict and its evidence, for a terminal."""
    lines = [f"{result.verdict}: {content['reason']}", ""]
    if result.findings:
        of_classes = all(finding.targets == "class" for finding in result.findings)
        rows = [_row(finding) for finding in result.findings]
        lines += [*_table(rows, "class" if of_classes else "leads to"), ""]
    if result.calibration is not None:
        lines.append(f"p comes from {result.calibrated_on}.")
    reasons: dict[str, list[str]] = {}
    for each in content["not_searched"]:
        reasons.setdefault(each["reason"], []).append(each["detector"])
    lines += [f"Not searched by {', '.join(names)}: {reason.removesuffix('.')}." for reason, names in reasons.items()]
    point = content["operating_point"]
    if point is None:
        lines.append(f"Operating point: {content['operating_point_note']}.")
    else:
        alarms, detections = (point[key] for key in ("false_alarms", "detections"))
        lines.append(
            f"Operating point, on {point['models']}: false alarms {_share_text(alarms)}, "
            f"detections {_share_text(detections)}."
        )
    if content.get("repeat"):
        lines += ["", "To repeat the strongest evidence:", f"  {content['repeat']}"]
    return "\n".join(lines)


def _row(finding: JudgedFinding) -> tuple[str, ...]:
    """Returns the strongest shortcut of a detector, as cells of the table."""
    best = finding.strongest
    entry = best.to_json(finding.unit, "")
    moved = "-" if entry["moved"] is None else _share_text(entry["moved"])
    random = "-" if entry["random"] is None else f"{entry['random']['value']:.1%}"
    words = "" if best.candidate.trigger is None else evidence.words_of(best.candidate.trigger)
    size = ": ".join(part for part in (finding.size_of(best), words) if part) or "-"
    p_value = "not known" if best.p_value is None else f"{best.p_value:.3f}"
    sources = f" from {', '.join(best.source_names)}" if best.source_names else ""
    natural = " (natural)" if finding.looks_natural else ""
    return finding.detector, f"{best.target_name}{sources}{natural}", moved, random, size, p_value


def _table(rows: list[tuple[str, ...]], where: str) -> list[str]:
    heading = ("detector", where, "moved (95 %)", "random", "size", "p")
    columns = list(zip(heading, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heading, *rows)
    ]


def _share_text(part: dict[str, Any]) -> str:
    return f"{part['value']:.1%} ({100 * part['low']:.0f} to {part['high']:.0%}, n = {part['n']:,})"
