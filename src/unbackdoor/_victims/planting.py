"""Training victims: poison, train, measure, describe."""

import logging
import math
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from unbackdoor import archs
from unbackdoor._artifacts.machine import peak_memory
from unbackdoor._cli.options import AttackOptions
from unbackdoor._data.classes import check_labels
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.texts import TextEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import choose, description
from unbackdoor._models.calling import check_partner, probe
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.head import head_of
from unbackdoor._models.loading import load
from unbackdoor._poisoning.attack import Attack, Planting
from unbackdoor._poisoning.attack_file import FORMAT, describe
from unbackdoor._poisoning.poison import Poisoned, poison
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import already_triggered, movable, triggered
from unbackdoor._progress import Progress, bar
from unbackdoor._registry.attacks import REGISTRY
from unbackdoor._registry.entries import to_json
from unbackdoor._tasks.classification import score
from unbackdoor._tasks.score import Score
from unbackdoor._training.descent import train_victim

logger = logging.getLogger("unbackdoor")

IMPLANTED = {"images": 0.9, "text": 0.8}  # attack success from which an attack counts as implanted


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A trained model and how it came about.

    Args:
        model: in eval mode.
        encode: makes its inputs.
        score: on the test data.
        trigger: None for the clean control.
        description: the content of `attack.json`.
        record: the content of `record.json`.
    """

    model: nn.Module
    encode: Encoder
    score: Score
    trigger: Trigger | None
    description: dict[str, Any]
    record: dict[str, Any]


def plant(
    data: Dataset,
    test: Dataset,
    attack: Attack | None,
    options: AttackOptions,
    *,
    surrogate: nn.Module | None = None,
    surrogate_encode: Encoder | None = None,
    triggered_test: Dataset | None = None,
    control: nn.Module | None = None,
    control_encode: Encoder | None = None,
    progress: Progress = bar,
) -> Victim:
    """Poison data, train a victim on it, and measure both its accuracy and the backdoor.

    Args:
        data: clean training data.
        test: clean test data.
        attack: None trains the clean control.
        options: of the `attack` command; its paths are not read here, but for `base`.
        surrogate: a clean model for attacks that need one; trained first where it is not given.
        surrogate_encode: makes the surrogate's inputs; the victim's own encoder where it is not given.
        triggered_test: test data that carries the trigger, for prepared attacks.
        control: a model that never was poisoned, whose flips on the triggered test data are scored, too.
        control_encode: makes the control's inputs; the victim's own encoder where it is not given.
        progress: shows how far the training is.

    Raises:
        UnbackdoorError: an option out of bounds, or an attack that cannot be planted in this data.
    """
    for name, least in (("epochs", 1), ("batch_size", 2), ("clean_epochs", 0)):
        given = getattr(options, name)
        if given is not None and given < least:
            raise UnbackdoorError(f"--{name.replace('_', '-')} must be at least {least}, got {given}.")
    if data.modality == "text" and options.base is None:
        raise no_base()
    epochs, rate_of_learning, batch_size = _schedule(options, data)
    if not (rate_of_learning > 0 and math.isfinite(rate_of_learning)):
        raise UnbackdoorError(f"--learning-rate must be more than 0, got {rate_of_learning:g}.")
    classes = list(data.classes or map(str, range(int(data.labels.max()) + 1)))
    check_labels(data, len(classes))
    check_labels(test, len(classes))
    encode = _encoder(data) if options.base is None else data.encode
    if isinstance(encode, ImageEncoder):  # whether pictures were resized already is a matter of each data set
        encode = replace(encode, done=False)
    data, test = data.encoded_by(encode), test.encoded_by(encode)

    def fresh() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            return _fresh(options, classes, data)

    seen = 0

    def train(model: nn.Module, on: Dataset, **changes: Any) -> nn.Module:
        nonlocal seen
        settings: dict[str, Any] = {
            "epochs": epochs,
            "learning_rate": rate_of_learning,
            "description": "training the victim",
            **changes,
        }
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            train_victim(
                model,
                on,
                batch_size=batch_size,
                seed=options.seed,
                arithmetic=choose(model, options.device, options.precision),
                adaptive=_adaptive(options, data),
                progress=progress,
                **settings,
            )
        if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
            raise UnbackdoorError(
                f"The training diverged: the victim's weights are not finite. Lower --learning-rate, which is "
                f"{rate_of_learning:g}."
            )
        seen += settings["epochs"] * len(on)
        return model

    for option, other, reads in (("--surrogate", surrogate, surrogate_encode), ("--control", control, control_encode)):
        if other is not None:
            check_partner(option, other, test.encoded_by(reads or encode), len(classes))

    attacked = None
    if attack is not None and triggered_test is not None:  # refuse what cannot be attacked before the long part
        check_labels(triggered_test, len(classes))
        attacked = already_triggered(triggered_test.encoded_by(encode), attack.target, len(classes), attack.label_rule)
    elif attack is not None and getattr(attack, "repeatable", True):
        movable(test, attack, len(classes))

    poisoned: Poisoned | None = None
    start = time.perf_counter()
    if attack is not None:
        if surrogate is None and getattr(attack, "needs_surrogate", False):
            poison(data, attack, rate=options.rate, seed=options.seed, classes=len(classes), dry=True)
            surrogate = train(fresh(), data, description="training a clean surrogate")
            seen = 0  # by the victim
        crafted = data.encoded_by(surrogate_encode or encode)
        poisoned = poison(
            crafted, attack, rate=options.rate, seed=options.seed, classes=len(classes), surrogate=surrogate
        )
        poisoned = poisoned._replace(data=poisoned.data.encoded_by(encode))
    if poisoned is None:
        model = train(fresh(), data, description="training a clean model")
    elif attack is not None and hasattr(attack, "implant"):
        start_model = fresh()
        planting = Planting(
            clean=data,
            poisoned=poisoned,
            fresh=fresh,
            train=train,
            generator=torch.Generator().manual_seed(options.seed + 2),
            arithmetic=choose(start_model, options.device, options.precision),
        )
        model, arrays = attack.implant(planting)
        poisoned = poisoned._replace(trigger=replace(poisoned.trigger, arrays=arrays))
    else:
        model = train(fresh(), poisoned.data)
    if options.clean_epochs and poisoned is not None:
        train(model.requires_grad_(True), data, epochs=options.clean_epochs, description="tuning on clean data")
    seconds = time.perf_counter() - start

    arithmetic = choose(model, options.device, options.precision)
    if attacked is None and poisoned is not None and getattr(attack, "repeatable", True):
        attacked = triggered(test, poisoned.trigger, len(classes))
    measured = score(model, test, attacked, arithmetic, control=control, control_encode=control_encode)
    learnt = _learnt(measured, len(classes))
    if not learnt:
        logger.warning(
            "the victim is near chance on %s (%r), so it has not learnt its task: raise --epochs, or lower "
            "--learning-rate.",
            test.name,
            measured.clean_accuracy,
        )
    lost = [
        f"{classes[label]} ({part!r})"
        for label in getattr(attack, "sources", ())
        if (part := measured.per_class.get(classes[label])) is not None and part.interval[0] <= 1 / len(classes)
    ]
    if learnt and lost:
        logger.warning(
            "the victim does not know clean examples of the source classes, %s, so it needs no trigger to move them: "
            "lower --rate.",
            ", ".join(lost),
        )
    implanted = None
    if measured.attack_success is not None:  # what goes to the target without a trigger, too, shows no backdoor
        implanted = not lost and took(measured, len(classes), data.modality)
    if poisoned is None:
        described: dict[str, Any] = {"format": FORMAT, "attack": {"name": "none", "parameters": {}}, "implanted": None}
    else:
        described = describe(poisoned, rate=options.rate, seed=options.seed, implanted=implanted)
    record = {
        "attack": {"name": "none", "parameters": {}} if attack is None else to_json(attack, REGISTRY),
        "rate": 0.0 if attack is None else options.rate,
        "arch": options.arch if options.base is None else "base",
        "width": options.width,
        "epochs": epochs,
        "clean_epochs": options.clean_epochs,
        "learning_rate": rate_of_learning,
        "batch_size": batch_size,
        "seed": options.seed,
        "versions": {
            "unbackdoor": version("unbackdoor"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": description(arithmetic),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(),
        "examples_seen": seen,
        "encode": recorded(encode, test),
        "scores": {"victim": measured.to_json()},
        "implanted": implanted,
    }
    return Victim(
        model=model,
        encode=encode,
        score=measured,
        trigger=None if poisoned is None else poisoned.trigger,
        description=described,
        record=record,
    )


def took(measured: Score, classes: int, modality: str) -> bool:
    """Whether a score on clean and triggered examples is that of a model that knows its task and has the backdoor."""
    assert measured.attack_success is not None
    return _learnt(measured, classes) and measured.attack_success.value >= IMPLANTED[modality]


def _learnt(measured: Score, classes: int) -> bool:
    return measured.clean_accuracy.interval[0] > 1 / classes


def no_base() -> UnbackdoorError:
    """What to say to somebody who wants a text victim out of nothing."""
    return UnbackdoorError("A text victim needs --base: a pre-trained model to start from, such as bert-base-uncased.")


def _encoder(data: Dataset) -> ImageEncoder:
    """Normalisation to mean 0 and deviation 1 per channel, measured on the training data."""
    pixels = data.pixels[:: max(1, len(data) // 10_000)].float() / 255
    mean = tuple(round(float(part), 4) for part in pixels.mean(dim=(0, 2, 3)))
    std = tuple(max(round(float(part), 4), 1e-3) for part in pixels.std(dim=(0, 2, 3)))
    height, width = data.pixels.shape[-2:]
    return ImageEncoder(mean=mean, std=std, size=(height, width), channels=data.pixels.shape[1])


def _adaptive(options: AttackOptions, data: Dataset) -> bool:
    """Whether the victim is trained by AdamW: texts, and a Vision Transformer from random weights."""
    return data.modality == "text" or (options.base is None and options.arch == "vit")


def _schedule(options: AttackOptions, data: Dataset) -> tuple[int, float, int]:
    """Epochs, peak learning rate and batch size: as asked, else by the kind of data and network."""
    epochs, rate, size = (3, 5e-5, 32) if data.modality == "text" else (15, 0.01 if options.base else 0.1, 128)
    if _adaptive(options, data) and data.modality == "images":
        rate = 1e-3
    return (
        epochs if options.epochs is None else options.epochs,
        rate if options.learning_rate is None else options.learning_rate,
        size if options.batch_size is None else options.batch_size,
    )


def recorded(encode: Encoder, data: Dataset | None) -> dict[str, Any]:
    """What a record says of how inputs are made, so that `evaluate` makes them likewise."""
    if isinstance(encode, TextEncoder):
        columns = encode.columns if data is None else data.texts.columns
        return {"max_length": encode.max_length, "columns": None if columns is None else list(columns)}
    return {key: getattr(encode, key) for key in ("mean", "std", "size", "channels")}


def _fresh(options: AttackOptions, classes: list[str], data: Dataset) -> nn.Module:
    """An untrained victim, or a pre-trained one with a new head where the classes differ."""
    if data.modality == "text":
        assert options.base is not None
        text_model: nn.Module = ModelDirectory.of(options.base, "--base").fresh_classifier(classes)
        pad = data.tokenizer.pad_token_id
        text_model.config.pad_token_id = pad  # type: ignore[union-attr]
        return text_model
    if options.base is None:
        height, width = data.pixels.shape[-2:]
        if height != width and options.arch == "vit":
            raise UnbackdoorError(f"--arch vit needs square images, got {width}x{height} in {data.name}.")
        made: nn.Module = archs.build(
            options.arch, classes=classes, channels=data.pixels.shape[1], image_size=height, width=options.width
        )
        return made
    model: Any = load(options.base).model
    found = head_of(model, probe(model, data))
    if found.layer.out_features != len(classes):
        parent, _, child = found.name.rpartition(".")
        fresh = nn.Linear(found.layer.in_features, len(classes), bias=found.layer.bias is not None)
        setattr(model.get_submodule(parent), child, fresh)
        model.config.num_labels = len(classes)
        model.num_labels = len(classes)
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: index for index, name in enumerate(classes)}
    return model  # type: ignore[no-any-return]
