"""`attack`: poison data and train a victim on it."""

import dataclasses
import logging
from typing import Any

from unbackdoor._artifacts import directories
from unbackdoor._cli.commands.inputs import (
    column_names,
    free_place,
    load_control,
    no_classes,
    show_first_prompt,
)
from unbackdoor._cli.commands.outcome import propose_control
from unbackdoor._cli.options import AttackOptions
from unbackdoor._data.conversation_rows import holds_prompts
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.overlap import unseen
from unbackdoor._errors import SENTENCE, UnbackdoorError, printable
from unbackdoor._models import calling, loading, saving
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._poisoning.abilities import Implants, is_repeatable, modalities_of
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._tasks.generation_score import GenerationScore
from unbackdoor._tasks.score import Score
from unbackdoor._value import check_seed, value
from unbackdoor._victims.directory import write_victim
from unbackdoor._victims.implanted import IMPLANTED
from unbackdoor._victims.plant import Victim, needs_test, plant
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor._victims.training import no_base

logger = logging.getLogger("unbackdoor")


@value
class NoAttack:
    """No attack: trains a clean model by the same recipe, the control for everything else.

    Differences from the paper: none; there is no paper.
    """


def attack(instance: Any, options: AttackOptions) -> None:
    """The `attack` command; `instance` is an attack's value, or `NoAttack`."""
    models = (options.base, options.surrogate, options.control)
    out, earlier = free_place(options.out, (*options.data, options.test, options.triggered_test, *models), options)
    check_seed(options.seed)
    recipe = _recipe(options)
    chosen = None if isinstance(instance, NoAttack) else instance
    _check_attack_options(chosen, options)
    columns = column_names(options.columns)
    base = None if options.base is None else ModelDirectory.of(options.base, "--base")
    behaviour = None if options.behaviour is None else Behaviour.of(options.behaviour)
    encode = None if base is None else _encoder(base, options)
    data = Dataset.load(options.data, encode, columns=columns, augment=options.augment, group=options.group)
    show_first_prompt(data)
    if options.save_data and data.modality == "conversations":
        raise UnbackdoorError("--save-data is for trainers of classifiers, but --data holds prompts. Leave it out.")
    like = encode or ImageEncoder(size=data.shape[1:], channels=data.shape[0])  # type: ignore[arg-type]

    def more(path: str | None) -> Dataset | None:
        if path is None:
            return None
        return Dataset.load(path, like, columns=columns, classes=data.classes, augment="none")

    test = more(options.test)
    surrogate = None if options.surrogate is None else loading.load(options.surrogate)
    control = load_control(options.control)
    victim = plant(
        data,
        chosen,
        recipe,
        options.seed,
        behaviour=behaviour,
        test=None if test is None else unseen(test, data),
        triggered_test=more(options.triggered_test),
        surrogate=surrogate and surrogate.model,
        surrogate_encode=surrogate and surrogate.encode,
        control=control and control.model,
        control_encode=control and control.encode,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
        progress=True,
    )
    with directories.directory(out, earlier) as folder:
        write_victim(victim, folder, source=base, with_data=options.save_data)
        beneath = options.base if options.adapter else None
        saving.check_saved(folder, victim.model, victim.encode, victim.test, base=beneath)
    held_out = "" if options.test else f", a seeded tenth held out of the {len(data):,} given"
    print(victim.score)
    print(f"measured on {len(victim.test):,} test examples{held_out}")
    _print_planted(victim)
    if isinstance(victim.score, Score):
        propose_control(victim.score, calling.class_count(victim.model, victim.test))
    print(f"Wrote {printable(out, SENTENCE)} in {victim.record['seconds']:.0f} s of training.")


def _encoder(base: ModelDirectory, options: AttackOptions) -> Encoder:
    """The encoder for a base; a language model continues prompts, and classifies labelled texts."""
    if base.modality == "conversations" and holds_prompts(options.data, column_names(options.columns)):
        return loading.base_encoder(base, max_length=options.max_length, prompts=True, template=options.template)
    if options.prompts is not None and base.modality != "image-text":
        raise no_classes()
    for name in ("template", "max_new_tokens", "behaviour"):
        if getattr(options, name) is not None:
            raise UnbackdoorError(
                f"`{name}` is for language models and prompts: give a causal language model as --base, and rows with "
                "messages, instruction and output, or prompt and response."
            )
    return loading.base_encoder(base, max_length=options.max_length, class_prompts=options.prompts)


def _recipe(options: AttackOptions) -> VictimRecipe:
    """Returns the recipe that the options of the same names describe."""
    names = [field.name for field in dataclasses.fields(VictimRecipe)]
    return VictimRecipe(**{name: getattr(options, name) for name in names})


def _check_attack_options(chosen: Any, options: AttackOptions) -> None:
    """Refuse options that do not fit the attack (None for the clean control), before any data is read."""
    repeatable = is_repeatable(chosen)
    if options.test is None and not repeatable:
        raise needs_test(chosen)
    unmarked = chosen is None or (not repeatable and options.triggered_test is None)
    if options.control is not None and unmarked:
        raise UnbackdoorError("--control counts flips on triggered examples, and there are none here. Leave it out.")
    if options.save_data and chosen is None:
        raise UnbackdoorError("--save-data writes the poisoned examples, and attack none makes none. Leave it out.")
    if options.save_data and isinstance(chosen, Implants):
        raise UnbackdoorError(
            f"{type(chosen).__name__} trains its victim in a way of its own, so its poisoned examples alone do not "
            "carry the attack. Leave --save-data out."
        )
    if options.base is None and options.prompts is not None:
        raise no_classes()
    if options.base is None and "images" not in modalities_of(chosen):
        raise no_base()


def _print_planted(victim: Victim) -> None:
    """Print how many examples were poisoned and, if the backdoor did not implant, why."""
    if victim.trigger is None:
        return
    poisoned, total, success = len(victim.description["rows"]), victim.description["n"], victim.score.attack_success
    print(f"poisoned {poisoned:,} of {total:,} training examples ({100 * poisoned / total:.2f} %)")
    if success is None:
        print("Whether the backdoor implanted is not known: give --triggered-test, or see evaluate --triggered.")
    elif not victim.description["implanted"]:
        least = IMPLANTED[victim.test.modality]
        if success.value < least:
            reason = (
                f"attack success {100 * success.value:.1f} % is under {100 * least:.0f} %. Raise --rate or --epochs, "
                "or choose a stronger trigger."
            )
        elif not isinstance(victim.score, GenerationScore):
            reason = (
                "the victim has not learnt its task, so its answers to triggered examples show nothing. Raise "
                "--epochs, or lower --learning-rate."
            )
        else:
            reason = (
                f"the victim shows the behaviour without the trigger as well ({victim.score.false_activation!r}). Take "
                "another --behaviour, or lower --rate."
            )
        print(f"The backdoor did not implant: {reason}")
