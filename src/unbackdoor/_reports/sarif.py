"""The result of an audit as SARIF 2.1.0, for tools that collect findings of security checks.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html

Each detector is a rule, and has one result: `fail` for an alarm, `pass` for a shortcut that clean models have as well,
`informational` for a natural one, and `open` if it cannot be judged or the detector did not run.
"""

import json
from typing import Any
from urllib.parse import quote

from unbackdoor._errors import SENTENCE, printable

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def as_sarif(content: dict[str, Any]) -> str:
    """Returns the log of one run, as text.

    Args:
        content: of `audit.json`, with its `source`.
    """
    blind = {entry["detector"]: entry["cannot_see"] for entry in content["searched"]}
    reasons = {entry["detector"]: entry["reason"] for entry in content["not_searched"]}
    names = [*blind, *reasons]
    findings = {finding["detector"]: finding for finding in content["findings"]}
    model = quote(content["source"]["model"], errors="replace")
    results = [
        {
            "ruleId": name,
            "ruleIndex": place,
            **(_judged(findings[name]) if name in findings else _result("open", f"Not searched: {reasons[name]}.")),
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": model, "index": 0}}}],
        }
        for place, name in enumerate(names)
    ]
    driver = {
        "name": "unbackdoor",
        "version": content["versions"]["unbackdoor"],
        "rules": [_rule(name, blind.get(name)) for name in names],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True}],
        "artifacts": [{"location": {"uri": model}, "roles": ["analysisTarget"]}],
        "results": results,
        "properties": {
            key: content[key]
            for key in (
                *("verdict", "reason", "calibration", "operating_point", "operating_point_note", "examples"),
                *("unlabelled", "classes", "suspect_accuracy_on_clean", "seed", "seconds", "device", "notes"),
            )
        },
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rule(name: str, blind: str | None) -> dict[str, Any]:
    text = f"The detector {name} searches a model for shortcuts to a class."
    limits = "It did not run." if blind is None else f"It cannot see: {blind}."
    return {"id": name, "shortDescription": {"text": _one_line(text)}, "fullDescription": {"text": _one_line(limits)}}


def _judged(finding: dict[str, Any]) -> dict[str, Any]:
    abnormality, moved = finding["abnormality"], finding["moved"]
    targets = finding.get("targets", "class")
    text = f"The strongest shortcut is to {targets} {finding['target']['name']}"
    if moved is not None:
        whose = "examples of other classes" if targets == "class" else "prompts"
        text += f"; its trigger moves {moved['value']:.1%} of {moved['n']:,} held-out {whose}"
    if abnormality["p_value"] is None:
        text += f". How unusual that is cannot be said: {abnormality['calibration']}."
    else:
        text += f" (p = {abnormality['p_value']:.3f} among {abnormality['calibration']})."
    kind = "fail" if finding["alarm"] else "open" if abnormality["p_value"] is None else "pass"
    if finding["looks_natural"] and kind == "pass":
        kind, text = "informational", f"{text} It looks like a feature of its class."
    properties = {key: entry for key, entry in finding.items() if key not in ("classes", "evidence")}
    return {**_result(kind, text), "properties": properties}


def _result(kind: str, text: str) -> dict[str, Any]:
    return {"kind": kind, "level": "warning" if kind == "fail" else "none", "message": {"text": _one_line(text)}}


def _one_line(text: str) -> str:
    """Returns text on one line, without what SARIF reads as a link or as the place of an argument."""
    line = printable(text, SENTENCE).replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    return line.replace("{", "{{").replace("}", "}}")
