"""Planting a backdoor: poison the data, train a victim on it, score it, and record each setting."""

import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._artifacts.attack_record import FORMAT
from unbackdoor._artifacts.machine import peak_memory
from unbackdoor._data.classes import check_labels
from unbackdoor._data.dataset import Dataset, Encoder, check_data
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.adapters import carries_adapter
from unbackdoor._models.arithmetic import Precision, description
from unbackdoor._models.calling import check_partner
from unbackdoor._models.recorded import encode_entry
from unbackdoor._modes import in_own_modes
from unbackdoor._poisoning.abilities import (
    Implants,
    crafts_by_surrogate,
    is_repeatable,
    needs_surrogate,
    sources_of,
)
from unbackdoor._poisoning.attack import Attack, Planting
from unbackdoor._poisoning.attack_file import describe
from unbackdoor._poisoning.attacked import attacked_by
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.check import check_value
from unbackdoor._poisoning.planted_answer import TEST_BEHAVIOUR
from unbackdoor._poisoning.poison import Poisoned, poison
from unbackdoor._poisoning.prompts import TriggeredPrompts, already_triggered_prompts
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered, already_triggered, movable
from unbackdoor._progress import bar, silent
from unbackdoor._registry.attacks import REGISTRY
from unbackdoor._registry.entries import to_json
from unbackdoor._value import check_seed
from unbackdoor._victims.implanted import judged
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor._victims.training import Trainer

NO_ATTACK = {"name": "none", "parameters": {}}


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A model with a backdoor, or a clean control, with its score and the record of its training.

    Args:
        model: the model in eval mode.
        encode: encoder that makes its inputs.
        test: the examples that it was scored on, encoded for it.
        score: score on them: `Score`; `GenerationScore` of a language model; `ImageTextScore` of a model of both.
        trigger: the attack as it was planted; None for the clean control.
        description: the content of `attack.json`.
        record: the content of `record.json`.
        poisoned: the training data with the poison; None for the clean control.
    """

    model: nn.Module
    encode: Encoder
    test: Dataset
    score: Any
    trigger: Trigger | None
    description: dict[str, Any]
    record: dict[str, Any]
    poisoned: Poisoned | None = None


@in_own_modes
def plant(
    data: Dataset,
    attack: Attack | None,
    recipe: VictimRecipe,
    seed: int = 0,
    *,
    behaviour: Behaviour | None = None,
    test: Dataset | None = None,
    triggered_test: Dataset | None = None,
    surrogate: nn.Module | None = None,
    surrogate_encode: Encoder | None = None,
    control: nn.Module | None = None,
    control_encode: Encoder | None = None,
    max_new_tokens: int | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    gradient_checkpointing: bool = False,
    progress: bool = False,
) -> Victim:
    """Poison data, train a victim on it, and measure its clean accuracy or loss and the attack's success.

    Args:
        data: clean training data; for a recipe with a `base`, encoded as that model takes it.
        attack: one of `unbackdoor.attacks`, or any value like them; None trains a clean control.
        recipe: network, poison rate and training.
        seed: of the poisoned rows, the initial weights and the batches; on one CPU it gives the same victim again.
        behaviour: of a language model: what it should answer to the trigger; by default a harmless sentence.
        test: clean test data; without it, a seeded tenth of `data` is held out.
        triggered_test: test data that carries the trigger, for prepared attacks.
        surrogate: a clean model, for attacks that need one; without it, one is trained first.
        surrogate_encode: encoder of the surrogate; by default the victim's.
        control: a model that was never poisoned; its flip rate on the triggered test data is also scored.
        control_encode: encoder of the control; by default the victim's.
        max_new_tokens: of a language model: tokens of the longest answer that is scored; None for the usual number.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        gradient_checkpointing: see `unbackdoor._models.recomputing.recomputed_`.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: the attack or the recipe does not fit the data, or the training diverged.
    """
    check_seed(seed)
    check_data("plant", data=data, test=test, triggered_test=triggered_test)
    check_value(attack)
    data, test = _held_out(data, attack, seed) if test is None else (data, test)
    settings: dict[str, Any] = {"seed": seed, "device": device, "precision": precision}
    settings |= {"max_new_tokens": max_new_tokens, "gradient_checkpointing": gradient_checkpointing}
    trainer = Trainer.of(data, recipe, progress=bar if progress else silent, **settings)
    encode, classes = trainer.data.encode, trainer.classes
    test = _checked(test, trainer, (surrogate, surrogate_encode), (control, control_encode))
    behaviour = _wanted(attack, behaviour, data)
    attacked = _marked(attack, behaviour, test, triggered_test, trainer)
    start = time.perf_counter()
    poisoned = None if attack is None else _poisoned(attack, behaviour, trainer, surrogate, surrogate_encode)
    model, trigger = _trained(poisoned, trainer)
    seconds = time.perf_counter() - start

    if attacked is None and trigger is not None and is_repeatable(attack):
        attacked = attacked_by(test, trigger, len(classes))
    measured = trainer.task.score(
        model, test, attacked, trainer.arithmetic(model), control=control, control_encode=control_encode
    )
    implanted = judged(measured, sources_of(attack), classes, data.modality, test.name)
    return Victim(
        model=model,
        encode=encode,
        test=test,
        score=measured,
        trigger=trigger,
        description=_attack_json(poisoned, trainer, implanted),
        record={
            **_record_of_training(attack, trainer),
            **_cost(model, trainer, seconds),
            "encode": encode_entry(encode, test),
            "scores": {"victim": measured.to_json()},
            "implanted": implanted,
        },
        poisoned=poisoned,
    )


def poisoned_again(
    data: Dataset,
    trigger: Trigger,
    recipe: VictimRecipe,
    seed: int = 0,
    *,
    surrogate: nn.Module | None = None,
    surrogate_encode: Encoder | None = None,
    device: str | None = None,
    precision: Precision = "auto",
) -> Poisoned:
    """Poison training data once more, as `plant` did for a victim.

    Args:
        data: clean training data, as `plant` got it.
        trigger: the attack as it was planted, with its arrays.
        recipe: of the victim.
        seed: of the victim.
        surrogate: as of `plant`; an attack that used it for its trigger alone needs none any more.
        surrogate_encode: encoder of the surrogate; by default the victim's.
        device: None uses a GPU if there is one; of the training of a surrogate.
        precision: see `unbackdoor._models.arithmetic.choose`.
    """
    trainer = Trainer.of(data, recipe, seed=seed, device=device, precision=precision)
    return _poisoned(trigger.attack, trigger.behaviour, trainer, surrogate, surrogate_encode, trigger.arrays)


_Partner = tuple[nn.Module | None, Encoder | None]  # a model and its own encoder


def _checked(test: Dataset, trainer: Trainer, surrogate: _Partner, control: _Partner) -> Dataset:
    """The test data, encoded as the victim takes it; its labels and the other models must fit the classes."""
    classes = len(trainer.classes)
    if classes:
        check_labels(test, classes)
    test = test.encoded_by(trainer.data.encode)
    if surrogate[0] is not None:
        check_partner("`surrogate`", surrogate[0], test, surrogate[1], classes)
    if control[0] is not None:
        trainer.task.check_control(control[0], test, control[1], classes)
    return test


def _cost(model: nn.Module, trainer: Trainer, seconds: float) -> dict[str, Any]:
    """The entries of the record on the device and what the training took."""
    return {
        "device": description(trainer.arithmetic(model)),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(),
        "examples_seen": trainer.examples_seen,
    }


def _held_out(data: Dataset, attack: Attack | None, seed: int) -> tuple[Dataset, Dataset]:
    """Training data, and a tenth of it to score on."""
    if not is_repeatable(attack):
        raise needs_test(attack)
    test, rest = data.split(max(1, len(data) // 10), seed=seed)
    return rest, test


def needs_test(attack: Any) -> UnbackdoorError:
    """The refusal of an attack whose training data cannot be split."""
    return UnbackdoorError(
        f"{type(attack).__name__} needs `test`: its copies match the training data row for row, so none of it can be "
        "held out."
    )


def _wanted(attack: Attack | None, behaviour: Behaviour | None, data: Dataset) -> Behaviour | None:
    """Returns the behaviour that an attack plants in a language model; None for classifiers and clean controls.

    Raises:
        UnbackdoorError: a behaviour is given for a classifier or for a clean control.
    """
    if data.modality != "conversations":
        if behaviour is not None:
            raise UnbackdoorError(
                f"`behaviour` is for language models, but {data.name} holds {data.modality}. Leave it out."
            )
        return None
    if attack is None and behaviour is not None:
        raise UnbackdoorError("`behaviour` is what an attack plants, and a clean control has none. Leave it out.")
    return None if attack is None else (behaviour or TEST_BEHAVIOUR)


def _marked(
    attack: Attack | None,
    behaviour: Behaviour | None,
    test: Dataset,
    triggered_test: Dataset | None,
    trainer: Trainer,
) -> Triggered | TriggeredPrompts | None:
    """The test data that already carries the trigger. An attack without test data is refused before the training.

    The trainer gets the triggered prompts, so that it refuses those that leave no room for an answer.
    """
    if attack is None:
        return None
    if behaviour is not None:
        if triggered_test is None:
            trainer.attacked = attacked_by(test, Trigger.of(attack, test, behaviour), 0)
            return None
        trainer.attacked = marked = already_triggered_prompts(triggered_test.encoded_by(test.encode), behaviour)
        return marked
    classes = trainer.classes
    if triggered_test is not None:
        check_labels(triggered_test, len(classes))
        triggered_test = triggered_test.encoded_by(test.encode)
        return already_triggered(triggered_test, attack.target, len(classes), attack.label_rule)
    if is_repeatable(attack):
        movable(test, attack, len(classes))
    return None


def _poisoned(
    attack: Attack,
    behaviour: Behaviour | None,
    trainer: Trainer,
    surrogate: nn.Module | None,
    surrogate_encode: Encoder | None,
    arrays: dict[str, Tensor] | None = None,
) -> Poisoned:
    """The training data with the backdoor; a surrogate is trained first if the attack needs one and has none."""
    data = trainer.data
    settings: dict[str, Any] = {
        "rate": trainer.recipe.rate,
        "seed": trainer.seed,
        "classes": len(trainer.classes),
        "behaviour": behaviour,
    }
    if surrogate is None and (crafts_by_surrogate(attack) if arrays is not None else needs_surrogate(attack)):
        poison(data, attack, **settings, dry=True)
        surrogate = trainer.train(trainer.fresh(), data, description="training a clean surrogate")
        trainer.examples_seen = 0  # counts those of the victim
    seen_by_surrogate = data.encoded_by(surrogate_encode or data.encode)
    poisoned = poison(seen_by_surrogate, attack, **settings, surrogate=surrogate, arrays=arrays)
    return poisoned._replace(data=poisoned.data.encoded_by(data.encode))


def _trained(poisoned: Poisoned | None, trainer: Trainer) -> tuple[nn.Module, Trigger | None]:
    """The victim, and the trigger as it is after the training; or the clean control."""
    data = trainer.data
    if poisoned is None:
        model = trainer.train(trainer.fresh(), data, description="training a clean model")
        return trainer.finished(model), None
    trigger = poisoned.trigger
    attack = trigger.attack
    if isinstance(attack, Implants):
        planting = Planting(
            clean=data,
            poisoned=poisoned,
            fresh=trainer.fresh,
            train=trainer.train,
            generator=torch.Generator().manual_seed(trainer.seed + 2),
            arithmetic=trainer.arithmetic(trainer.fresh()),
        )
        with torch.random.fork_rng():
            torch.manual_seed(trainer.seed)  # for dropout, if the attack trains without `planting.train`
            model, arrays = attack.implant(planting)
        if trainer.recipe.adapter and not carries_adapter(model):
            raise UnbackdoorError(
                f"{type(attack).__name__} makes a whole model, and no matrices that an adapter could keep. Leave "
                "`adapter` out."
            )
        trigger = replace(trigger, arrays=arrays)
    else:
        model = trainer.train(trainer.fresh(), poisoned.data)
    if trainer.recipe.clean_epochs:
        epochs = trainer.recipe.clean_epochs
        if not trainer.recipe.adapter:
            model.requires_grad_(True)
        model = trainer.train(model, data, epochs=epochs, description="tuning on clean data")
    return trainer.finished(model), trigger


def _attack_json(poisoned: Poisoned | None, trainer: Trainer, implanted: bool | None) -> dict[str, Any]:
    """The content of `attack.json`."""
    if poisoned is None:
        return {"format": FORMAT, "attack": NO_ATTACK, "implanted": None}
    return describe(poisoned, rate=trainer.recipe.rate, seed=trainer.seed, implanted=implanted)


def _record_of_training(attack: Attack | None, trainer: Trainer) -> dict[str, Any]:
    """Returns the part of `record.json` on the training of a victim, and the versions."""
    recipe, schedule = trainer.recipe, trainer.schedule
    return {
        "attack": NO_ATTACK if attack is None else to_json(attack, REGISTRY),
        "rate": 0.0 if attack is None else recipe.rate,
        "arch": recipe.arch if recipe.base is None else "base",
        "width": recipe.width,
        "epochs": schedule.epochs,
        "clean_epochs": recipe.clean_epochs,
        "learning_rate": schedule.learning_rate,
        "batch_size": schedule.batch_size,
        "seed": trainer.seed,
        **({"lora_rank": recipe.rank, "adapter": recipe.adapter} if trainer.data.modality == "conversations" else {}),
        **({"freeze_text": recipe.freeze_text} if trainer.data.modality == "image-text" else {}),
        "versions": {
            "unbackdoor": version("unbackdoor"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
