"""Does a backdoor stay gone? A purified model is attacked again, next to one that was never poisoned.

R. Min, Z. Qin, N. L. Zhang, L. Shen and M. Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense", NeurIPS 2024, https://arxiv.org/abs/2410.09838, showed that most purifiers hide a backdoor rather
than remove it. Their three tests are here, each also run on a clean model: an effect that is as strong on the clean
model is not a sign of a backdoor.
"""

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from unbackdoor._artifacts.machine import versions
from unbackdoor._data.dataset import Dataset, Encoder, check_data
from unbackdoor._models.arithmetic import Precision, choose, description
from unbackdoor._models.calling import check_modules
from unbackdoor._models.recomputing import recomputing
from unbackdoor._modes import in_own_modes
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._progress import bar, silent
from unbackdoor._purification.form import working_copy
from unbackdoor._registry.attacks import REGISTRY
from unbackdoor._registry.entries import to_json
from unbackdoor._registry.purifiers import REGISTRY as PURIFIERS
from unbackdoor._stress import reactivation, remarks
from unbackdoor._stress.lab import PARTS, Lab, Material, check_models, check_options, prepare
from unbackdoor._stress.path import batch_norms, between, recompute_batch_norm_
from unbackdoor._stress.reactivation import BATCH as REACTIVATION_BATCH
from unbackdoor._stress.reactivation import EPOCHS as REACTIVATION_EPOCHS
from unbackdoor._stress.reactivation import EXAMPLES, learn, reach_of
from unbackdoor._stress.reactivation import LEARNING_RATE as REACTIVATION_RATE
from unbackdoor._stress.result import (
    CONTROL,
    EXACT,
    PURIFIED,
    TITLES,
    VICTIM,
    Measured,
    Reactivated,
    Retuned,
    Stress,
    Waypoint,
)
from unbackdoor._stress.retuning import EPOCHS, exactly_purified
from unbackdoor._stress.retuning import EXACT as EXACTLY
from unbackdoor._stress.retuning import settings as retuning_settings
from unbackdoor._tasks.choice import refuse_pairs
from unbackdoor._tasks.generation import Generation
from unbackdoor._training.lora import merged
from unbackdoor._value import fields_of
from unbackdoor._victims.implanted import IMPLANTED

logger = logging.getLogger("unbackdoor")

COUNTS = (1, 2, 5, 10, 20)
TEACHER = 5  # number of triggered examples for the teacher of the reactivation, if it is among the counts
ALPHA = 0.2
POINTS = 11


@in_own_modes
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
    max_new_tokens: int | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    gradient_checkpointing: bool = False,
    progress: bool = False,
) -> Stress:
    """Attack a purified model again, in ways that show whether its backdoor is gone or only hidden.

    The models passed in are not changed.

    Args:
        model: the purified model; the matrices of an adapter are added to its base here.
        victim: the model before purification; its inputs are made as those of `model`.
        clean: labelled examples without a trigger, or prompts with their answers, which the attacker tunes with.
        attack: the one that the victim was poisoned with.
        test: the examples to score on; None keeps a seeded half of `clean` for them.
        control: a model of the same task that was never poisoned.
        control_encode: makes its inputs, if they are not made as the model's.
        parts: some of `retune`, `reactivation`, `path` and `exact`.
        counts: numbers of clean examples that carry the trigger and the attacker's label while retuning.
        seeds: the number of draws of these examples.
        seed: the first of them.
        max_new_tokens: the longest answer of a language model, in tokens; by default 64.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        gradient_checkpointing: see `unbackdoor._models.recomputing.recomputed_`.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: models, data and attack do not fit each other, or an option is out of bounds.
    """
    start = time.perf_counter()
    check_options(parts, counts, seeds, seed)
    check_data("stress", clean=clean, test=test)
    refuse_pairs("stress", clean)
    models = _copies(model, victim, control)
    material = prepare(
        models[PURIFIED],
        clean,
        test,
        attack,
        control=models.get(CONTROL),
        control_encode=control_encode,
        parts=parts,
        counts=counts,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    arithmetic = choose(models[PURIFIED], device, precision)
    data = material.clean, material.test, material.bait, material.attacked
    lab = Lab(material.task, *data, control_encode, arithmetic)
    models = {name: each.to(arithmetic.dtype) for name, each in models.items()}
    draws = range(seed, seed + seeds)
    shown = (bar if progress else silent)("stress", _steps(material.parts, counts, seeds, len(models)))
    with recomputing(*models.values()) if gradient_checkpointing else nullcontext(), shown as lab.advance:
        outcome = _run_parts(models, lab, material.parts, counts, draws)
    remarks_on = _remarks(models, outcome.before, lab, material)
    record = {
        **_subject(material, counts, draws),
        "notes": [*material.notes, *remarks.notes(material.parts, control is not None, models[PURIFIED], seeds)],
        "warnings": remarks_on.warnings,
        "usable": remarks_on.usable,
        "seconds": round(time.perf_counter() - start, 1),
        "device": description(arithmetic),
        "versions": versions(),
    }
    return Stress(**outcome._asdict(), record=record)


def _subject(material: Material, counts: Sequence[int], draws: range) -> dict[str, Any]:
    """Returns the record's entries on the test: attack, parts, data, settings."""
    return {
        "attack": to_json(material.trigger.attack, REGISTRY),
        **_wanted(material),
        "parts": [part for part in PARTS if part in material.parts],
        "counts": sorted(set(counts)),
        "seeds": list(draws),
        "clean": {"n": len(material.clean), "attackable": len(material.bait.data)},
        "scored_on": {
            "n": len(material.test),
            "triggered": len(material.attacked.data),
            "note": material.scored_on,
        },
        "settings": _settings(material.clean.modality),
    }


def _wanted(material: Material) -> dict[str, Any]:
    """The attacker's aim: a class by a rule, or a behaviour of answers of some length."""
    attacked = material.attacked
    if isinstance(attacked, Triggered):
        return {"label_rule": attacked.label_rule, "target": attacked.target}
    assert isinstance(material.task, Generation)
    return {
        "label_rule": None,
        "target": None,
        "behaviour": fields_of(attacked.behaviour),
        "max_new_tokens": material.task.max_new_tokens,
    }


class _Outcome(NamedTuple):
    """The measurements; see `Stress`."""

    before: dict[str, Measured]
    retuned: dict[str, tuple[Retuned, ...]]
    reactivated: Reactivated | None
    paths: dict[str, tuple[Waypoint, ...]]
    ends: dict[str, Measured]


def _run_parts(
    models: dict[str, nn.Module], lab: Lab, parts: Sequence[str], counts: Sequence[int], draws: range
) -> _Outcome:
    """Run the parts; exact purification is added to the models."""
    seed = draws[0]
    if "exact" in parts:
        models[EXACT] = exactly_purified(models[VICTIM], lab.clean, lab.bait, seed=seed, arithmetic=lab.arithmetic)
    before = {name: lab.score(name, models[name]) for name in TITLES if name in models}
    retuned: dict[str, list[Retuned]] = {}
    teacher: nn.Module | None = None
    teacher_count = TEACHER if TEACHER in counts else max(counts)
    for name in (name for name in before if name != VICTIM and "retune" in parts):
        for count, draw in product(sorted(set(counts)), draws):
            tuned = lab.retuned(name, models[name], count, draw)
            retuned.setdefault(name, []).append(Retuned(count, draw, lab.score(name, tuned)))
            if (name, count, draw) == (PURIFIED, teacher_count, seed):
                teacher = tuned
    reactivated = None
    if "reactivation" in parts:
        teacher = lab.retuned(PURIFIED, models[PURIFIED], teacher_count, seed) if teacher is None else teacher
        reactivated = _reactivated(models, teacher, teacher_count, lab, seed)
    paths, ends = _paths(models, before, lab, seed) if "path" in parts else ({}, {})
    return _Outcome(before, {name: tuple(runs) for name, runs in retuned.items()}, reactivated, paths, ends)


def _steps(parts: Sequence[str], counts: Sequence[int], seeds: int, models: int) -> int:
    """The number of steps that the progress shows."""
    contenders = models - 1 + ("exact" in parts)
    steps = EPOCHS * len(counts) * seeds * contenders * ("retune" in parts)
    steps += POINTS * (1 + ("exact" in parts)) * ("path" in parts)
    return steps + REACTIVATION_EPOCHS * ("reactivation" in parts)


class _Remarks(NamedTuple):
    warnings: list[str]
    usable: bool


def _remarks(models: dict[str, nn.Module], before: dict[str, Measured], lab: Lab, material: Material) -> _Remarks:
    """Logs and returns the warnings; the first says so if the purified model is not usable."""
    first, last = (lab.task.outcomes(models[name], lab.test, lab.arithmetic) for name in (VICTIM, PURIFIED))
    damage = lab.task.judged(lab.test, first, last, "which are scored", None).unusable
    sentences = remarks.warnings(
        before, models, classes=material.classes, weak=IMPLANTED[lab.clean.modality], test=lab.test.name
    )
    for text in sentences:
        logger.warning("%s", text)
    if damage is not None:
        sentences.insert(0, damage)
        logger.warning("%s", damage, extra={"first_line": True})
    return _Remarks(sentences, damage is None)


def _copies(model: nn.Module, victim: nn.Module, control: nn.Module | None) -> dict[str, nn.Module]:
    """The models of a stress test to work with, by their names; those that do not fit each other are refused."""
    check_modules("stress", model=model, victim=victim, control=control)
    models = {VICTIM: _own(victim), PURIFIED: _own(model), **({} if control is None else {CONTROL: _own(control)})}
    check_models(models[PURIFIED], models[VICTIM], models.get(CONTROL))
    return models


def _own(model: nn.Module) -> nn.Module:
    """A copy to work with, with adapters added to its weights: on these the path between two models is straight."""
    own = working_copy(model)
    return (merged(own) if hasattr(own, "peft_config") else own).requires_grad_(True).eval()


def _reactivated(
    models: dict[str, nn.Module], teacher: nn.Module, count: int, lab: Lab, seed: int
) -> Reactivated:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    clean, bait = (
        data.select(torch.randperm(len(data), generator=generator)[:EXAMPLES]) for data in (lab.clean, lab.bait.data)
    )
    perturbation = learn(
        models[PURIFIED],
        teacher,
        clean.joined(bait),
        control=models.get(CONTROL),
        control_encode=lab.control_encode,
        alpha=ALPHA,
        seed=seed,
        arithmetic=lab.arithmetic,
        advance=lab.advance,
        epochs=REACTIVATION_EPOCHS,
    )
    assert isinstance(lab.attacked, Triggered)
    assert lab.attacked.data.rows is not None
    moved = lab.test.select(lab.attacked.data.rows)
    shares = {
        name: reach_of(
            models[name],
            moved,
            lab.attacked,
            perturbation,
            lab.arithmetic,
            lab.control_encode if name == CONTROL else None,
        )
        for name in (PURIFIED, CONTROL)
        if name in models
    }
    return Reactivated(count, lab.score(PURIFIED, teacher), shares)


def _paths(
    models: dict[str, nn.Module], before: dict[str, Measured], lab: Lab, seed: int
) -> tuple[dict[str, tuple[Waypoint, ...]], dict[str, Measured]]:
    """The scores along the paths, and those of both ends with recomputed statistics."""
    victim = lab.arithmetic.place(models[VICTIM])
    paths = {}
    for name in (PURIFIED, EXACT):
        if name not in models:
            continue
        end = lab.arithmetic.place(models[name])
        points = []
        for place in range(POINTS):
            t = place / (POINTS - 1)
            if t in (0, 1):  # these two are measured already
                points.append(Waypoint(t, before[name if t else VICTIM]))
            else:
                middle = between(victim, end, t)
                recompute_batch_norm_(middle, lab.clean, lab.arithmetic, seed=seed)
                points.append(Waypoint(t, lab.score(name, middle)))
            lab.advance()
        paths[name] = tuple(points)
    ends = {}
    for name in (VICTIM, PURIFIED) if batch_norms(victim) else ():
        end = copy.deepcopy(models[name])
        recompute_batch_norm_(end, lab.clean, lab.arithmetic, seed=seed)
        ends[name] = lab.score(name, end)
    return paths, ends


def _settings(modality: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "retuning": retuning_settings(modality),
        EXACT: {"oracle": True, **to_json(EXACTLY, PURIFIERS)},
    }
    if modality in reactivation.MODALITY:
        settings["reactivation"] = {
            "alpha": ALPHA,
            "bound": 16 / 255,
            "examples": EXAMPLES,
            "epochs": REACTIVATION_EPOCHS,
            "learning_rate": REACTIVATION_RATE,
            "batch_size": REACTIVATION_BATCH,
        }
    return settings
