"""Sentences that explain the numbers of a stress test to a reader."""

from collections.abc import Sequence

import torch
from torch import nn

from unbackdoor._stress.path import batch_norms
from unbackdoor._stress.result import CONTROL, EXACT, PURIFIED, VICTIM, Measured
from unbackdoor._tasks.generation import chance_loss
from unbackdoor._tasks.generation_score import GenerationScore


def warnings(
    before: dict[str, Measured], models: dict[str, nn.Module], *, classes: int, weak: float, test: str
) -> list[str]:
    """Doubts about the models.

    Args:
        before: the score of each model before any test.
        models: models by the same names.
        classes: number of their classes.
        weak: attack success below which a backdoor is not firmly in a model.
        test: the name of the data that were scored.
    """
    return [
        *_of_the_backdoor(before, weak),
        *_near_chance(before, classes, test),
        *_of_the_oracle(before, classes, weak),
        *_of_equal_weights(models),
    ]


def lost(before: dict[str, Measured], classes: int) -> set[str]:
    """The models whose clean accuracy, or loss, may be that of a guess."""
    return {name for name, score in before.items() if _guesses(score, classes)}


def _guesses(score: Measured, classes: int) -> bool:
    if isinstance(score, GenerationScore):
        return score.clean_loss is not None and score.clean_loss.value > chance_loss(classes)
    return score.clean_accuracy.interval[0] <= 1 / classes


def _of_the_backdoor(before: dict[str, Measured], weak: float) -> list[str]:
    sentences = []
    for name, low, text in (
        (VICTIM, True, "the backdoor was not firmly in it, so the following numbers show little"),
        (CONTROL, False, "it is not clean, or the trigger acts by itself, so it controls nothing"),
    ):
        success = before[name].attack_success if name in before else None
        if success is not None and (success.value < weak) == low:
            sentences.append(
                f"The {name} sends {success.value:.1%} of triggered examples where the attacker wants: {text}."
            )
    return sentences


def _near_chance(before: dict[str, Measured], classes: int, test: str) -> list[str]:
    guessing = lost(before, classes)
    sentences = []
    for name in (PURIFIED, CONTROL):
        if name in guessing:
            why = "labels or preprocessing probably do not fit it"
            if name == PURIFIED and VICTIM not in guessing:
                why = "the victim is not, so the purification destroyed it, and the following numbers show nothing"
            sentences.append(f"The {name} model is near chance on {test}: {why}.")
    return sentences


def _of_the_oracle(before: dict[str, Measured], classes: int, weak: float) -> list[str]:
    success = before[EXACT].attack_success if EXACT in before else None
    if success is None or (success.value < weak and EXACT not in lost(before, classes)):
        return []
    oracle = before[EXACT]
    if isinstance(oracle, GenerationScore):
        clean = "" if oracle.clean_loss is None else f"a clean loss of {oracle.clean_loss.value:.2f} nats"
    else:
        clean = f"{oracle.clean_accuracy.value:.1%} clean accuracy"
    return [
        f"Exact purification left {success.value:.1%} attack success and {clean}, so it is not a reference here. Give "
        "more `clean`."
    ]


def _of_equal_weights(models: dict[str, nn.Module]) -> list[str]:
    victim, purified = models[VICTIM].state_dict(), models[PURIFIED].state_dict()
    if not all(torch.equal(tensor.cpu(), purified[name].cpu()) for name, tensor in victim.items()):
        return []
    return ["`model` and `victim` have the same weights, so nothing was purified."]


def notes(parts: Sequence[str], controlled: bool, model: nn.Module, seeds: int) -> list[str]:
    """The conditions of the comparison: no control, exact purification, BatchNorm, several draws."""
    sentences = []
    if not controlled:
        text = "No control: the speed at which a model that was never poisoned would learn the trigger is not known"
        if "reactivation" in parts:
            text += (
                ", and the loss of the perturbation had only its first half, so it may be an ordinary adversarial "
                "example and its success says little about a backdoor"
            )
        sentences.append(f"{text}. Give `control`.")
    if "exact" in parts:
        sentences.append(
            "Exact purification knows the trigger, as only an oracle can: it is a reference for the others, not a "
            "method."
        )
    if "path" in parts:
        sentences.append(
            "Both ends of the path are the models as they are; between them BatchNorm statistics are recomputed on the "
            "clean examples, without augmentation."
            if batch_norms(model)
            else "The model has no BatchNorm statistics to recompute along the path."
        )
    if seeds > 1 and "retune" in parts:
        sentences.append(f"After retuning, the mean over {seeds} draws of the triggered examples is shown.")
    return sentences
