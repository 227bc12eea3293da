"""Model cards: what was done to a model, for the next person who finds it."""

from typing import Any


def purified(record: dict[str, Any]) -> str:
    """The README.md of a purified model."""
    method, clean = record["method"], record["clean"]
    budget = f"on {clean['n']:,}" if clean else "without"
    lines = [
        "---",
        "library_name: unbackdoor",
        "tags: [unbackdoor, backdoor-purification]",
        "---",
        "",
        "# Purified model",
        "",
        f"`{_plain(record['source']['model'])}` was purified with `{method['repr']}` "
        f"{budget} clean examples in {record['seconds']:.1f} s (seed {record['seed']}). "
        "`record.json` has the method, its settings, the seed, the versions, the device and what was measured.",
        "",
    ]
    if record["scores"] is None:
        lines += [f"Scores: {record['scores_note']}.", ""]
    else:
        lines += [f"Scores {record['scores_note']}, with 95 % Wilson intervals:", "", "| | suspect | purified |"]
        lines += ["| --- | --- | --- |"]
        before, after = record["scores"]["suspect"], record["scores"]["purified"]
        for key in ("clean_accuracy", "attack_success", "recovered_accuracy", "clean_model_flip_rate"):
            if key in before:
                lines.append(f"| {key.replace('_', ' ')} | {_interval(before[key])} | {_interval(after[key])} |")
        lines.append("")
    lines += [f"Warning: {_plain(text)}\n" for text in record["warnings"]]
    lines += [
        "A purified model is not proven clean: a low attack success speaks for the triggers that were tried, and "
        "tuning on poisoned examples may bring a backdoor back.",
    ]
    return "\n".join(lines) + "\n"


def victim(record: dict[str, Any]) -> str:
    """The README.md of a victim."""
    attack = record["attack"]["name"]
    if attack == "none":
        warning = "A clean control for backdoor experiments, trained without an attack."
    else:
        warning = (
            f"**This model carries a backdoor** (`{attack}`, poison rate {record['rate']:g}), planted on purpose for "
            "testing. Do not use it for anything else."
        )
    scores = record["scores"]["victim"]
    lines = [
        "---",
        "library_name: unbackdoor",
        "tags: [unbackdoor, backdoored]",
        "---",
        "",
        "# Victim",
        "",
        warning,
        "",
    ]
    for key in ("clean_accuracy", "attack_success", "clean_model_flip_rate"):
        if key in scores:
            lines.append(f"- {key.replace('_', ' ')}: {_interval(scores[key])}")
    return "\n".join(lines) + "\n"


def _interval(part: dict[str, float]) -> str:
    return f"{part['value']:.1%} ({part['low']:.1%} to {part['high']:.1%}, n = {part['n']:,})"


def _plain(text: str) -> str:
    """Text of others, on one line and without the characters that Markdown and HTML act on."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + letter if letter in "`*[]|#" else letter for letter in escaped)
