"""Model cards: the history of a model, for the next person who finds it."""

from typing import Any

from unbackdoor._artifacts.record import failed, handed_back
from unbackdoor._errors import SENTENCE, printable

MEASURES = (
    *("clean_accuracy", "zero_shot_accuracy", "clean_loss", "attack_success", "false_activation", "empty"),
    *("recovered_accuracy", "clean_model_flip_rate", "image_to_text_recall_at_1", "image_to_text_recall_at_5"),
    *("text_to_image_recall_at_1", "text_to_image_recall_at_5", "contrastive_loss"),
)
"""The entries of scores that a card and the command line show, in order."""

LOSSES = ("clean_loss", "contrastive_loss")
"""Those in nats; the others are shares."""


def purified(record: dict[str, Any]) -> str:
    """The README.md of a purified model."""
    method, clean = record["method"], record["clean"]
    budget = f"on {clean['n']:,}" if clean else "without"
    base, unlabelled = record["source"].get("base"), record.get("unlabelled")
    given = f", {unlabelled:,} without labels" if unlabelled else ""
    given += f" and the base `{_escaped(base)}`" if base else ""
    choice, same = record.get("choice"), handed_back(record)
    done = "not changed by" if same else "purified with"
    title = "Purified model"
    if failed(record):
        title = "Model that was handed back as it was" if same else "Model that did not pass its tests"
    lines = [
        "---",
        "library_name: unbackdoor",
        f"tags: [unbackdoor{'' if same else ', backdoor-purification'}]",
        "---",
        "",
        *([f"**{_escaped(record['warnings'][0])}**", ""] if record["usable"] is False else []),
        f"# {title}",
        "",
        f"`{_escaped(record['source']['model'])}` was {done} `{method['repr']}` {budget} clean examples"
        f"{given} in {record['seconds']:.1f} s (seed {record['seed']}). "
        "`record.json` has the method, its settings, the seed, the versions, the device and what was measured.",
        "",
        *(
            []
            if choice is None
            else [
                f"Methods tried: {len(choice['tried'])}. Kept: {_escaped(choice['kept'] or 'none of them')}. "
                f"Why this result: {_escaped(choice['reason'])}.",
                "",
            ]
        ),
    ]
    if record["scores"] is None:
        lines += [f"Scores: {_escaped(record['scores_note'])}.", ""]
    else:
        lines += [f"Scores {_escaped(record['scores_note'])}, with 95 % Wilson intervals:", ""]
        lines += [f"| | suspect | {'handed back' if same else 'purified'} |", "| --- | --- | --- |"]
        before, after = record["scores"]["suspect"], record["scores"]["purified"]
        for key in MEASURES:
            if key in before:
                lines.append(f"| {key.replace('_', ' ')} | {_interval(before[key])} | {_interval(after[key])} |")
        lines.append("")
    lines += [f"Warning: {_escaped(text)}\n" for text in record["warnings"][record["usable"] is False :]]
    lines += [
        "A backdoor that the suspect has is still there."
        if same
        else "A purified model is not proven clean: a low attack success holds for the triggers that were tried, and "
        "tuning on poisoned examples may bring a backdoor back.",
    ]
    return "\n".join(lines) + "\n"


def victim(record: dict[str, Any]) -> str:
    """The README.md of a victim."""
    attack, scores = record["attack"]["name"], record["scores"]["victim"]
    planted = f"(`{attack}`, poison rate {record['rate']:g})"
    failed = record["implanted"] is False
    if attack == "none":
        warning = "A clean control for backdoor experiments, trained without an attack."
    elif failed:
        warning = (
            f"**A backdoor was planted in this model, but it did not implant** {planted}: attack success is "
            f"{scores['attack_success']['value']:.1%}, {_health(scores)}. It was made on purpose for testing. Do not "
            "use it for anything else."
        )
    elif record["implanted"] is None:  # no test example that could be triggered
        warning = (
            f"**A backdoor was planted in this model** {planted} on purpose for testing; whether it implanted was not "
            "measured. Do not use it for anything else."
        )
    else:
        warning = (
            f"**This model carries a backdoor** {planted}, planted on purpose for testing. Do not use it for anything "
            "else."
        )
    lines = [
        "---",
        "library_name: unbackdoor",
        f"tags: [unbackdoor{'' if failed or attack == 'none' else ', backdoored'}]",
        "---",
        "",
        "# Victim",
        "",
        warning,
        "",
    ]
    for key in (
        *("clean_accuracy", "zero_shot_accuracy", "attack_success", "false_activation", "clean_loss"),
        "clean_model_flip_rate",
    ):
        if key in scores:
            lines.append(f"- {key.replace('_', ' ')}: {_interval(scores[key])}")
    return "\n".join(lines) + "\n"


def trained(record: dict[str, Any]) -> str:
    """The README.md of a model that was trained on data that may be poisoned."""
    suspects = record["suspects"]
    lines = [
        "---",
        "library_name: unbackdoor",
        "tags: [unbackdoor]",
        "---",
        "",
        "# Model trained on data that may be poisoned",
        "",
        f"Trained with `{record['trainer']['repr']}` on {record['data']['n']:,} examples in {record['seconds']:.1f} s "
        f"(seed {record['seed']}). `record.json` has the settings, the versions, the device and what was measured.",
        "",
    ]
    if suspects is not None:
        lines += [f"{suspects['n']:,} rows are distrusted; `suspects.parquet` lists them."]
        for key in ("precision", "recall"):
            if suspects[key] is not None:
                lines.append(f"- {key}: {_interval(suspects[key])}")
        lines.append("")
    scores = {} if record["scores"] is None else record["scores"]["trained"]
    lines += [f"Scores: {_escaped(record['scores_note'])}.", ""]
    for key in ("clean_accuracy", "zero_shot_accuracy", "attack_success", "recovered_accuracy"):
        if key in scores:
            lines.append(f"- {key.replace('_', ' ')}: {_interval(scores[key])}")
    lines += [f"\nWarning: {_escaped(text)}" for text in record["warnings"]]
    lines += ["", "No trainer keeps every backdoor out: `unbackdoor list trainers` says what each cannot see."]
    return "\n".join(lines) + "\n"


def _health(scores: dict[str, Any]) -> str:
    """A victim's score on its task or, of a language model, on answers without the trigger, in words."""
    if "zero_shot_accuracy" in scores:
        return f"zero-shot accuracy {scores['zero_shot_accuracy']['value']:.1%}"
    if "clean_accuracy" in scores:
        return f"clean accuracy {scores['clean_accuracy']['value']:.1%}"
    if "false_activation" in scores:
        return f"false activation {scores['false_activation']['value']:.1%}"
    return "false activation was not measured"


def _interval(part: dict[str, float]) -> str:
    if "tokens" in part or "batch" in part:
        return f"{part['value']:.3f} nats ({part['low']:.3f} to {part['high']:.3f}, n = {part['n']:,})"
    return f"{part['value']:.1%} ({part['low']:.1%} to {part['high']:.1%}, n = {part['n']:,})"


def _escaped(text: str) -> str:
    """Untrusted text on one printable line, with the special characters of Markdown and HTML escaped."""
    escaped = (
        " ".join(printable(text, SENTENCE).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    return "".join("\\" + letter if letter in "`*[]|#" else letter for letter in escaped)
