"""`guard fit`, `guard run` and `guard evaluate`: decisions about single inputs."""

import dataclasses
import json
from collections import Counter
from typing import Any

from torch import nn

from unbackdoor._artifacts import directories
from unbackdoor._artifacts.guard_record import DecisionEntry
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
from unbackdoor._cli.options import GuardEvaluateOptions, GuardFitOptions, GuardRunOptions
from unbackdoor._cli.parameters import with_options
from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import TextEncoder
from unbackdoor._errors import SENTENCE, printable
from unbackdoor._guarding.deciding import Decision
from unbackdoor._guarding.fit import fit_guard, load_guard, takes_no
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.guard import Guard, bound_of
from unbackdoor._guarding.identity import check_unchanged
from unbackdoor._guarding.measuring import evaluate_guard
from unbackdoor._guarding.threshold import check_rate
from unbackdoor._models import calling, loading
from unbackdoor._models.loading import Loaded
from unbackdoor._progress import bar
from unbackdoor._registry.entries import Need, entry_of
from unbackdoor._registry.guards import REGISTRY
from unbackdoor._value import check_seed


def fit(source: str, guard: Guard, options: GuardFitOptions, *, command: str | None = None) -> None:
    """The `guard fit` command; `command` is what was typed, for the record."""
    inputs = (source, options.clean, options.base, options.reference)
    out, earlier = free_place(options.out, inputs, options)
    check_seed(options.seed)
    check_rate(options.false_alarms)
    suspect = load_model(source, options)
    clean = load_dataset(options.clean, suspect.encode, options, calling.class_names(suspect.model))
    show_first_prompt(clean)
    fitted = fit_guard(
        suspect.model,
        clean,
        guard,
        false_alarms=options.false_alarms,
        base=_base(source, guard, options),
        max_new_tokens=options.max_new_tokens,
        reference=options.reference,
        seed=options.seed,
        head=options.head,
        device=options.device,
        precision=options.precision,
        progress=True,
    )
    origin = {} if options.base is None else {"base": last_name(options.base)}
    about: dict[str, Any] = {"source": {"model": last_name(source), **origin, "factory": factory_name(options.factory)}}
    about |= {} if command is None else {"command": command}
    with directories.directory(out, earlier) as folder:
        record = fitted.write(folder, **with_options(fitted.record), **about)
    print(_rule(record, bound_of(guard) is not None))
    print(f"Wrote {printable(out, SENTENCE)} after {record['seconds']:.0f} s.")


def _base(source: str, guard: Guard, options: GuardFitOptions) -> nn.Module | None:
    """Returns the model that --base names; None for an adapter, which lies on it already."""
    if options.base is None or base_of(source, options) is not None:
        return None
    entry = entry_of(guard, REGISTRY)
    if entry is not None and Need.BASE not in entry.needs:
        raise takes_no(guard, "base")
    return loading.load_base(options.base, modality="conversations", trust_remote_code=options.trust_remote_code)


def _rule(record: dict[str, Any], own: bool) -> str:
    """One sentence on what raises an alarm; `own` if the guard sets its threshold itself."""
    halves, measure = record["clean"], record["score"]["measure"]
    if record["threshold"] is None:
        return f"No alarm is raised: every prompt is changed. {halves['fitted_on']:,} clean examples are known to it."
    side = "below" if record["score"]["suspicious"] == "low" else "above"
    rule = f"An alarm is raised if {measure} is {side} {record['threshold']:.4g}"
    if own:
        return f"{rule}. {record['notes'][-1]}"
    return (
        f"{rule}: at most {record['false_alarms']['asked']:.1%} of clean inputs, by {halves['threshold_on']:,} that "
        "the guard was not fitted on."
    )


def run(place: str, options: GuardRunOptions) -> None:
    """The `guard run` command."""
    inputs = (place, options.model, options.data, options.base, options.reference)
    out = free_file(options.out, "out", inputs, options, mark='"action": ')
    loaded, fitted = _loaded(place, options)
    model, encode = loaded
    if isinstance(encode, TextEncoder | ConversationEncoder):
        encode = dataclasses.replace(encode, blank=True)
    unread: dict[int, str] = {}
    data = load_dataset(options.data, encode, options, calling.class_names(model), labelled=False, unread=unread)
    fitted.check(model, data)
    with fitted.at_work(model, options.device, options.precision, bar) as work:
        decisions = work.judged(data, answering=False).decisions
    check_unchanged(fitted.guard, model, fitted.identity.model)
    decisions = _with_unread(decisions, data, unread, fitted.threshold)
    entries = [decision.to_json() for decision in decisions]
    for entry in entries:
        DecisionEntry.model_validate(entry)
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    directories.write_file(out, lines)
    counts = Counter(decision.action for decision in decisions)
    summary = ", ".join(f"{counts[action]:,} {action}" for action in ("pass", "reject", "clean"))
    reference = f" and {fitted.reference.forwards / len(data):.1f} of the reference" if fitted.reference else ""
    print(
        f"Wrote {printable(out, SENTENCE)}: {summary}. {work.forwards.count / len(data):.1f} forward passes"
        f"{reference} per input."
    )
    if unread:
        print(f"{len(unread):,} of {len(decisions):,} inputs could not be read, and are rejected: see their reasons.")


def _with_unread(
    decisions: list[Decision], data: Dataset, unread: dict[int, str], threshold: float | None
) -> list[Decision]:
    """The decisions by their rows in the source, with inputs that could not be read, which are rejected."""
    if not unread or data.rows is None:
        return decisions
    placed = [
        dataclasses.replace(decision, row=row) for decision, row in zip(decisions, data.rows.tolist(), strict=True)
    ]
    rejected = [Decision(row, None, threshold, "reject", reason) for row, reason in unread.items()]
    return sorted([*placed, *rejected], key=lambda decision: decision.row)


def evaluate(place: str, options: GuardEvaluateOptions) -> None:
    """The `guard evaluate` command."""
    loaded, fitted = _loaded(place, options)
    model, encode = loaded
    classes = calling.class_names(model)
    test = load_dataset(options.data, encode, options, classes)
    show_first_prompt(test)
    marked = None if options.triggered is None else load_dataset(options.triggered, encode, options, classes)
    measured = evaluate_guard(
        fitted,
        model,
        test,
        attack=options.attack,
        triggered_data=marked,
        target=options.target,
        trigger=options.trigger,
        behaviour=options.behaviour,
        device=options.device,
        precision=options.precision,
        progress=True,
    )
    print(json.dumps(measured.to_json(), indent=2) if options.json else measured)


def _loaded(place: str, options: GuardRunOptions | GuardEvaluateOptions) -> tuple[Loaded, FittedGuard]:
    """Loads the model that --model names, and the guard with its encoder."""
    loaded = load_model(options.model, options)
    return loaded, load_guard(place, loaded.encode, reference=options.reference)
