"""The result of an audit as SARIF 2.1.0, for tools that collect findings of security checks.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html

Each detector is a rule. A result is something to act on, because GitHub shows every result as an alert, whatever its
kind (PSRule's issue 955): an alarm has one (`fail`), and so has an audit that cannot judge (`open`). What was searched
without an alarm, and what was not searched, are notifications of the run.
"""

import hashlib
import json
from typing import Any
from urllib.parse import quote

from unbackdoor._errors import SENTENCE, printable

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
CANNOT_JUDGE = "cannot-judge"  # the rule of an audit without a verdict


def as_sarif(content: dict[str, Any], path: str | None = None) -> str:
    """Returns the log of one run, as text.

    Args:
        content: of `audit.json`, with its `source`.
        path: of the model in the working folder; None names it as `source` does.
    """
    blind = {entry["detector"]: entry["cannot_see"] for entry in content["searched"]}
    reasons = {entry["detector"]: entry["reason"] for entry in content["not_searched"]}
    names = [*blind, *reasons]
    findings = {finding["detector"]: finding for finding in content["findings"]}
    uri = quote(path or content["source"]["model"], errors="replace")
    location = {
        "physicalLocation": {
            "artifactLocation": {"uri": uri, "index": 0},
            "region": {"startLine": 1},  # GitHub asks for a line, also in what has none
        }
    }
    rules = [_rule(name, blind.get(name)) for name in names]
    results, notifications = [], []
    for place, name in enumerate(names):
        finding = findings.get(name)
        if finding is not None and finding["alarm"]:
            results.append(_result(name, place, "fail", _sentences(finding), location, uri, finding))
            continue
        text = f"Not searched: {reasons[name]}." if finding is None else f"No alarm. {_sentences(finding)}"
        notifications.append(_notification(name, place, text, finding))
    if content["verdict"] == CANNOT_JUDGE:
        rules.append(_rule_of_cannot_judge())
        results.append(_result(CANNOT_JUDGE, len(names), "open", content["reason"], location, uri, None))
    driver = {"name": "unbackdoor", "version": content["versions"]["unbackdoor"], "rules": rules}
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"unbackdoor/{uri}/"},  # else GitHub takes a second model for the first one
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notifications}],
        "artifacts": [{"location": {"uri": uri}, "roles": ["analysisTarget"]}],
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
    limits = "It did not run." if blind is None else f"It cannot see: {blind}."
    return {
        "id": name,
        "shortDescription": {"text": _one_line(f"The detector {name} searches a model for shortcuts to a class.")},
        "fullDescription": {"text": _one_line(limits)},
        "help": {
            "text": _one_line(
                "A shortcut is a trigger that moves examples of other classes to one class. It is a reason not to "
                "trust the model, and not proof of an attack. Repeat it with unbackdoor evaluate, or purify the model. "
                f"{limits}"
            )
        },
        "properties": {"tags": ["security"]},
    }


def _rule_of_cannot_judge() -> dict[str, Any]:
    text = "An audit must be able to judge the model."
    advice = "Look at the preprocessing and the labels of the clean examples, and read the evidence in audit.html."
    return {
        "id": CANNOT_JUDGE,
        "shortDescription": {"text": text},
        "fullDescription": {"text": f"{text} That it cannot is neither a good nor a bad sign."},
        "help": {"text": advice},
        "properties": {"tags": ["security"]},
    }


def _sentences(finding: dict[str, Any]) -> str:
    """Returns what is to be said of the strongest shortcut that a detector found."""
    abnormality, moved = finding["abnormality"], finding["moved"]
    targets = finding.get("targets", "class")
    text = f"The strongest shortcut is to {targets} {finding['target']['name']}"
    if moved is not None:
        # An answer may be found by its first token, without a trigger.
        whose = "its trigger moves {} of other classes" if targets == "class" else "it is the answer to {}"
        count = f"{moved['value']:.1%} of {moved['n']:,} held-out {'examples' if targets == 'class' else 'prompts'}"
        text += f"; {whose.format(count)}"
    if abnormality["p_value"] is None:
        text += f". How unusual that is cannot be said: {abnormality['calibration']}."
    else:
        text += f" (p = {abnormality['p_value']:.3f} among {abnormality['calibration']})."
    return f"{text} It looks like a feature of its class." if finding["looks_natural"] else text


def _result(
    name: str, place: int, kind: str, text: str, location: dict[str, Any], uri: str, finding: dict[str, Any] | None
) -> dict[str, Any]:
    target = "" if finding is None else finding["target"]["number"]
    identity = hashlib.sha256(f"{uri}\n{name}\n{target}".encode()).hexdigest()
    return {
        "ruleId": name,
        "ruleIndex": place,
        "kind": kind,
        "level": "warning" if kind == "fail" else "none",
        "message": {"text": _one_line(text)},
        "locations": [location],
        # By this name GitHub knows the alert of an earlier upload again.
        "partialFingerprints": {"primaryLocationLineHash": f"{identity}:1"},
        **_properties(finding),
    }


def _notification(name: str, place: int, text: str, finding: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "level": "note",
        "message": {"text": _one_line(text)},
        "associatedRule": {"id": name, "index": place},
        **_properties(finding),
    }


def _properties(finding: dict[str, Any] | None) -> dict[str, Any]:
    if finding is None:
        return {}
    return {"properties": {key: entry for key, entry in finding.items() if key not in ("classes", "evidence")}}


def _one_line(text: str) -> str:
    """Returns text on one line, without what SARIF reads as a link or as the place of an argument."""
    line = printable(text, SENTENCE).replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    return line.replace("{", "{{").replace("}", "}}")
