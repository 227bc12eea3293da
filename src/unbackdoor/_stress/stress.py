"""Does a backdoor stay gone? A purified model under attack once more, beside one that never was poisoned.

R. Min, Z. Qin, N. L. Zhang, L. Shen and M. Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense", NeurIPS 2024, https://arxiv.org/abs/2410.09838, showed that most purifiers hide a backdoor more than
they remove it. Their three tests are here, each beside a clean model: what that model does as well says nothing about a
backdoor.
"""

import copy
import logging
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.classes import check_labels, in_order_of, tell_order
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._evaluation.damage import unusable
from unbackdoor._models import calling
from unbackdoor._models.arithmetic import Arithmetic, Precision, choose, description
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.attack_file import as_trigger
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered, triggered
from unbackdoor._progress import Advance, bar, silent
from unbackdoor._registry.attacks import REGISTRY
from unbackdoor._registry.entries import to_json
from unbackdoor._registry.purifiers import REGISTRY as PURIFIERS
from unbackdoor._stress.path import batch_norms, between, recompute_batch_norm_
from unbackdoor._stress.reactivation import BATCH as REACTIVATION_BATCH
from unbackdoor._stress.reactivation import EPOCHS as REACTIVATION_EPOCHS
from unbackdoor._stress.reactivation import EXAMPLES, learn, reached
from unbackdoor._stress.reactivation import LEARNING_RATE as REACTIVATION_RATE
from unbackdoor._stress.result import CONTROL, EXACT, PURIFIED, TITLES, VICTIM, Reactivated, Retuned, Stress, Waypoint
from unbackdoor._stress.retuning import EPOCHS, exactly_purified, joined, retune, retuning_set
from unbackdoor._stress.retuning import EXACT as EXACTLY
from unbackdoor._stress.retuning import settings as retuning_settings
from unbackdoor._tasks.classification import predict, score
from unbackdoor._tasks.score import Score
from unbackdoor._value import check_seed
from unbackdoor._victims.implanted import IMPLANTED

logger = logging.getLogger("unbackdoor")

PARTS = ("retune", "reactivation", "path", "exact")
COUNTS = (1, 2, 5, 10, 20)
TEACHER = 5  # triggered examples that the teacher of the reactivation is retuned with, where they are among the counts
ALPHA = 0.2
POINTS = 11


def stress(
    model: nn.Module,
    *,
    victim: nn.Module,
    clean: Dataset,
    attack: "Attack | Trigger | str | Path",
    test: Dataset | None = None,
    control: nn.Module | None = None,
    control_encode: Encoder | None = None,
    parts: Sequence[str] = PARTS,
    counts: Sequence[int] = COUNTS,
    seeds: int = 1,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> Stress:
    """Attack a purified model once more, in the ways that show whether its backdoor is gone or only hidden.

    All given models are left as they were.

    Args:
        model: the purified model.
        victim: the model before purification; it gets its inputs as `model` does.
        clean: labelled examples without trigger, which the attacker tunes with.
        attack: the one that the victim was poisoned with.
        test: what is scored; None keeps a seeded half of `clean` for it.
        control: a model of the same task that never was poisoned.
        control_encode: makes its inputs, where they are not made as the model's.
        parts: of `retune`, `reactivation`, `path` and `exact`.
        counts: how many of the clean examples carry the trigger and the attacker's label while retuning.
        seeds: how many draws of these examples are tried.
        seed: the first of them.
        device: None takes a GPU where there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a bar on stderr.

    Raises:
        UnbackdoorError: models, data and attack do not fit each other, or an option is out of bounds.
    """
    start = time.perf_counter()
    _check_options(parts, counts, seeds, seed)
    calling.check_modules("stress", model=model, victim=victim, control=control)
    _check_alike(model, victim)
    for name, each in (("MODEL", model), ("--victim", victim), ("--control", control)):
        if each is not None:
            check_finite(each.state_dict(), name)
    classes, names = calling.class_count(model, clean), calling.class_names(model)
    clean, test = in_order_of(clean, names), test and in_order_of(test, names)
    check_labels(clean, classes)
    for data in (clean, *([test] if test is not None else [])):
        tell_order(data, names, classes)
    if control is not None:
        seen_by_control = clean if control_encode is None else clean.encoded_by(control_encode)
        calling.check_partner("--control", control, seen_by_control, classes)
    notes, warnings = [], []
    if clean.modality == "text" and "reactivation" in parts:
        reason = "the perturbation of query-based reactivation is added to pixels, and texts have none"
        if tuple(parts) == ("reactivation",):
            raise UnbackdoorError(f"--parts reactivation is for images: {reason}. Take retune, path or exact.")
        parts = [part for part in parts if part != "reactivation"]
        notes.append(f"Reactivation was skipped: {reason}.")
    trigger = as_trigger(attack, clean)
    halved = test is None
    if test is None:
        clean, test = clean.split(len(clean) // 2, seed=seed)
    check_labels(test, classes)
    clean, test = _numbered(clean), _numbered(test)
    bait, attacked = triggered(clean, trigger, classes), triggered(test, trigger, classes)
    if {"retune", "reactivation"} & set(parts) and max(counts) > len(bait.data):
        raise UnbackdoorError(
            f"--k {max(counts)} wants {max(counts)} clean examples to put the trigger on, but {clean.name} has "
            f"{len(bait.data)} that the attack moves{' (half of it is kept for scoring)' if halved else ''}. Lower "
            "--k, or give more."
        )

    working = {VICTIM: _own(victim), PURIFIED: _own(model), **({} if control is None else {CONTROL: _own(control)})}
    lab = _Lab(clean, test, bait, attacked, control_encode, choose(working[PURIFIED], device, precision))
    for each in working.values():
        each.to(lab.arithmetic.dtype)
    runs = range(seed, seed + seeds)
    contenders = len(working) - 1 + ("exact" in parts)
    steps = EPOCHS * len(counts) * seeds * contenders * ("retune" in parts)
    steps += POINTS * (1 + ("exact" in parts)) * ("path" in parts)
    steps += REACTIVATION_EPOCHS * ("reactivation" in parts)
    with ExitStack() as stack:
        lab.advance = stack.enter_context((bar if progress else silent)("stress", steps))
        if "exact" in parts:
            working[EXACT] = exactly_purified(
                working[VICTIM], lab.clean, lab.bait, seed=seed, arithmetic=lab.arithmetic
            )
        before = {name: lab.score(name, working[name]) for name in TITLES if name in working}
        retuned: dict[str, list[Retuned]] = {}
        teacher: nn.Module | None = None
        teacher_count = TEACHER if TEACHER in counts else max(counts)
        for name in (name for name in before if name != VICTIM and "retune" in parts):
            for count in sorted(set(counts)):
                for draw in runs:
                    tuned = lab.retuned(name, working[name], count, draw)
                    retuned.setdefault(name, []).append(Retuned(count, draw, lab.score(name, tuned)))
                    if (name, count, draw) == (PURIFIED, teacher_count, seed):
                        teacher = tuned
        reactivated = None
        if "reactivation" in parts:
            teacher = lab.retuned(PURIFIED, working[PURIFIED], teacher_count, seed) if teacher is None else teacher
            reactivated = _reactivated(working, teacher, teacher_count, lab, seed)
        paths, ends = _paths(working, before, lab, seed) if "path" in parts else ({}, {})

    weak = IMPLANTED[clean.modality]
    for name, low, text in (
        (VICTIM, True, "the backdoor was not firmly in it, so what follows says little"),
        (CONTROL, False, "it is not clean, or the trigger acts by itself, so it controls nothing"),
    ):
        found = before[name].attack_success if name in before else None
        if found is not None and (found.value < weak) == low:
            warnings.append(
                f"The {name} sends {found.value:.1%} of triggered examples where the attacker wants: {text}."
            )
    answered, purified = (
        predict(working[name], lab.test, lab.arithmetic) == lab.test.labels.cpu() for name in (VICTIM, PURIFIED)
    )
    damage = unusable(answered, purified, "which are scored", None)
    lost = {name for name in before if before[name].clean_accuracy.interval[0] <= 1 / classes}
    for name in (PURIFIED, CONTROL):
        if name in lost:
            why = "labels or preprocessing probably do not fit it"
            if name == PURIFIED and VICTIM not in lost:
                why = "the victim is not, so the purification destroyed it, and what follows says nothing"
            warnings.append(f"The {name} model is near chance on {test.name}: {why}.")
    oracle = before[EXACT].attack_success if EXACT in before else None
    if oracle is not None and (oracle.value >= weak or EXACT in lost):
        accuracy = before[EXACT].clean_accuracy.value
        warnings.append(
            f"Exact purification left {oracle.value:.1%} attack success and {accuracy:.1%} clean accuracy, so it is no "
            "reference here. Give more --clean."
        )
    if all(torch.equal(one, other) for one, other in _pairs(working[VICTIM], working[PURIFIED])):
        warnings.append("MODEL and --victim have the same weights, so nothing was purified.")
    for text in warnings:
        logger.warning("%s", text)
    if damage is not None:
        warnings.insert(0, damage)
        logger.warning("%s", damage, extra={"first_line": True})
    notes += _notes(parts, control is not None, working[PURIFIED], seeds)
    kept = f"a seeded half of {clean.name}, which nothing was tuned on" if halved else f"of {test.name}"
    record = {
        "attack": to_json(trigger.attack, REGISTRY),
        "label_rule": attacked.label_rule,
        "target": attacked.target,
        "parts": [part for part in PARTS if part in parts],
        "counts": sorted(set(counts)),
        "seeds": list(runs),
        "clean": {"n": len(clean), "attackable": len(bait.data)},
        "scored_on": {"n": len(test), "triggered": len(attacked.data), "note": kept},
        "settings": _settings(clean.modality),
        "notes": notes,
        "warnings": warnings,
        "usable": damage is None,
        "seconds": round(time.perf_counter() - start, 1),
        "device": description(lab.arithmetic),
        "versions": {
            "unbackdoor": version("unbackdoor"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    return Stress(
        before=before,
        retuned={name: tuple(each) for name, each in retuned.items()},
        reactivated=reactivated,
        paths=paths,
        ends=ends,
        record=record,
    )


@dataclass
class _Lab:
    """What all parts work with: the data, the arithmetic, the progress."""

    clean: Dataset
    test: Dataset
    bait: Triggered  # the clean examples that the attack moves, with the trigger; their rows are those of `clean`
    attacked: Triggered
    control_encode: Encoder | None
    arithmetic: Arithmetic
    advance: Advance = lambda: None

    def __post_init__(self) -> None:
        """Texts are tokenised for the control once."""
        shown = self.test, self.attacked
        if self.control_encode is not None:
            encode = self.control_encode
            shown = (
                self.test.encoded_by(encode),
                self.attacked._replace(data=self.attacked.data.encoded_by(encode)),
            )
        self._shown = {CONTROL: shown}

    def seen(self, name: str, data: Dataset) -> Dataset:
        """A data set as the model of that name takes it."""
        return data if name != CONTROL or self.control_encode is None else data.encoded_by(self.control_encode)

    def score(self, name: str, model: nn.Module) -> Score:
        test, attacked = self._shown.get(name, (self.test, self.attacked))
        return score(model, test, attacked, self.arithmetic)

    def retuned(self, name: str, model: nn.Module, count: int, seed: int) -> nn.Module:
        data = self.seen(name, retuning_set(self.clean, self.bait, count, seed))
        tuned = retune(model, data, seed=seed, arithmetic=self.arithmetic)
        odd = next((key for key, tensor in tuned.state_dict().items() if not torch.isfinite(tensor).all()), None)
        if odd is not None:
            raise UnbackdoorError(
                f"Retuning the {name} model with {count} triggered examples left non-finite values in {odd}. Try "
                "--precision fp32."
            )
        for _ in range(EPOCHS):
            self.advance()
        return tuned


def _own(model: nn.Module) -> nn.Module:
    """A copy to work with; half precision is too coarse for small steps, and for a path."""
    working = copy.deepcopy(model)
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in working.state_dict().values()):
        working.float()
    return working.requires_grad_(True).eval()


def _numbered(data: Dataset) -> Dataset:
    return replace(data, rows=torch.arange(len(data)))


def _reactivated(
    working: dict[str, nn.Module], teacher: nn.Module, count: int, lab: _Lab, seed: int
) -> Reactivated:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    parts = [
        data.select(torch.randperm(len(data), generator=generator)[:EXAMPLES]) for data in (lab.clean, lab.bait.data)
    ]
    perturbation = learn(
        working[PURIFIED],
        teacher,
        joined(*parts),
        control=working.get(CONTROL),
        control_encode=lab.control_encode,
        alpha=ALPHA,
        seed=seed,
        arithmetic=lab.arithmetic,
        advance=lab.advance,
        epochs=REACTIVATION_EPOCHS,
    )
    assert lab.attacked.data.rows is not None
    moved = lab.test.select(lab.attacked.data.rows)
    models = {
        name: reached(
            working[name],
            moved,
            lab.attacked,
            perturbation,
            lab.arithmetic,
            lab.control_encode if name == CONTROL else None,
        )
        for name in (PURIFIED, CONTROL)
        if name in working
    }
    return Reactivated(count, lab.score(PURIFIED, teacher), models)


def _paths(
    working: dict[str, nn.Module], before: dict[str, Score], lab: _Lab, seed: int
) -> tuple[dict[str, tuple[Waypoint, ...]], dict[str, Score]]:
    """The scores along the paths, and those of both ends with recomputed statistics."""
    victim = lab.arithmetic.place(working[VICTIM])
    paths = {}
    for name in (PURIFIED, EXACT):
        if name not in working:
            continue
        end = lab.arithmetic.place(working[name])
        points = []
        for place in range(POINTS):
            t = place / (POINTS - 1)
            if t in (0, 1):  # these two are measured already
                points.append(Waypoint(t, before[name if t else VICTIM]))
            else:
                made = between(victim, end, t)
                recompute_batch_norm_(made, lab.clean, lab.arithmetic, seed=seed)
                points.append(Waypoint(t, lab.score(name, made)))
            lab.advance()
        paths[name] = tuple(points)
    ends = {}
    for name in (VICTIM, PURIFIED) if batch_norms(victim) else ():
        made = copy.deepcopy(working[name])
        recompute_batch_norm_(made, lab.clean, lab.arithmetic, seed=seed)
        ends[name] = lab.score(name, made)
    return paths, ends


def _settings(modality: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "retuning": retuning_settings(modality),
        EXACT: {"oracle": True, **to_json(EXACTLY, PURIFIERS)},
    }
    if modality == "images":
        made["reactivation"] = {
            "alpha": ALPHA,
            "bound": 16 / 255,
            "examples": EXAMPLES,
            "epochs": REACTIVATION_EPOCHS,
            "learning_rate": REACTIVATION_RATE,
            "batch_size": REACTIVATION_BATCH,
        }
    return made


def _notes(parts: Sequence[str], controlled: bool, model: nn.Module, seeds: int) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    notes = []
    if not controlled:
        text = "No control: how fast a model that never was poisoned would learn the trigger is not known"
        if "reactivation" in parts:
            text += (
                ", and the loss of the perturbation had only its first half, so it may be an ordinary adversarial "
                "example and its success says little about a backdoor"
            )
        notes.append(f"{text}. Give --control.")
    if "exact" in parts:
        notes.append(
            "Exact purification knows the trigger, as only an oracle can: it is a reference for the others, no method."
        )
    if "path" in parts:
        notes.append(
            "Both ends of the path are the models as they are; between them BatchNorm statistics are recomputed on the "
            "clean examples, without augmentation."
            if batch_norms(model)
            else "The model has no BatchNorm statistics to recompute along the path."
        )
    if seeds > 1 and "retune" in parts:
        notes.append(f"After retuning, the mean over {seeds} draws of the triggered examples is shown.")
    return notes


def _check_options(parts: Sequence[str], counts: Sequence[int], seeds: int, seed: int) -> None:
    odd = next((part for part in parts if part not in PARTS), None)
    if odd is not None or not parts:
        raise UnbackdoorError(f"--parts must name some of {', '.join(PARTS)}, got {odd or 'none'}.")
    if not counts or min(counts) < 1:
        came = min(counts) if counts else "none"
        raise UnbackdoorError(f"--k must be whole numbers of at least 1 with commas between, got {came}.")
    if seeds < 1:
        raise UnbackdoorError(f"--seeds must be at least 1, got {seeds}.")
    check_seed(seed)


def _pairs(first: nn.Module, second: nn.Module) -> list[tuple[Tensor, Tensor]]:
    other = second.state_dict()
    return [(tensor.cpu(), other[name].cpu()) for name, tensor in first.state_dict().items()]


def _check_alike(model: nn.Module, victim: nn.Module) -> None:
    """Refuse a victim of another architecture than the purified model's: there is no path between the two."""
    ours, theirs = ({key: tuple(t.shape) for key, t in each.state_dict().items()} for each in (model, victim))
    odd = next((key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key)), None)
    if odd is not None:
        there = "x".join(map(str, theirs[odd])) if odd in theirs else "absent"
        here = "x".join(map(str, ours[odd])) if odd in ours else "absent"
        raise UnbackdoorError(
            f"--victim must have the architecture of MODEL, but {odd} is {there} in it and {here} in MODEL. Give the "
            "model that was purified."
        )
