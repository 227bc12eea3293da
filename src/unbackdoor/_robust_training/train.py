"""`train`: the one place that checks the data, makes the model, seeds, times and records, so that trainers need not."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._artifacts.machine import peak_memory, versions
from unbackdoor._data.classes import check_labels, in_order_of
from unbackdoor._data.dataset import Dataset, Encoder, check_data
from unbackdoor._data.overlap import others_than
from unbackdoor._errors import NoHeadError, UnbackdoorError
from unbackdoor._models.arithmetic import Precision, description
from unbackdoor._models.recorded import encode_entry
from unbackdoor._modes import in_own_modes
from unbackdoor._progress import bar, silent
from unbackdoor._registry.entries import to_json
from unbackdoor._registry.trainers import REGISTRY
from unbackdoor._robust_training.run import TrainingRun
from unbackdoor._robust_training.suspects import Suspects
from unbackdoor._robust_training.trainer import RobustTrainer, kinds_of, modalities_of, needs_clean
from unbackdoor._tasks.proportion import chance_doubt, proportion_of
from unbackdoor._value import check_seed
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor._victims.training import Trainer

logger = logging.getLogger("unbackdoor")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that was trained on data that may be poisoned.

    Args:
        model: the model, in eval mode.
        encode: encoder that makes its inputs.
        suspects: the rows that the trainer distrusts; None if it distrusts none.
        record: the content of `record.json`, without scores.
    """

    model: nn.Module
    encode: Encoder
    suspects: Suspects | None
    record: dict[str, Any]


@in_own_modes
def train(
    data: Dataset,
    trainer: RobustTrainer,
    recipe: VictimRecipe,
    seed: int = 0,
    *,
    clean: Dataset | None = None,
    poisoned_rows: Tensor | Sequence[int] | Sequence[bool] | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> Trained:
    """Train a model on data that may be poisoned, so that a backdoor does not get in.

    Args:
        data: training data, labelled, pairs as well; for a recipe with a `base`, encoded as that model takes it.
        trainer: one of `unbackdoor.trainers`, or any callable like them.
        recipe: network and training; its `rate` and `clean_epochs` are for victims, and are not used.
        seed: seed of the initial weights, the batches and the trainer; on one CPU the same seed gives the same weights.
        clean: examples without poison, for trainers that need some.
        poisoned_rows: positions of the poisoned rows, or a mask with an entry for each row, if they are known. The
            trainer does not see them: they serve to count how often it is right.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: the data does not fit the trainer or the recipe, or the training diverged.
    """
    check_seed(seed)
    check_data("train", data=data, clean=clean)
    _check_trainer(trainer, data, clean)
    poisoned = None if poisoned_rows is None else _truth(poisoned_rows, data)
    training = Trainer.of(
        data, recipe, seed=seed, device=device, precision=precision, progress=bar if progress else silent
    )
    model = training.fresh()
    arithmetic = training.arithmetic(model)
    run = TrainingRun(
        generator=torch.Generator().manual_seed(seed),
        arithmetic=arithmetic,
        head_name=_head(training, model),
        modality=data.modality,
        task=training.task,
        progress=training.progress,
        training=training,
        clean=None if clean is None else _fitting(clean, training),
    )
    if run.clean is not None and len(others_than(training.data, run.clean)) == 0:
        run.warn(
            f"{run.clean.name} holds every example of {data.name}: if some are poisoned, so are those that are taken "
            "for clean. Give examples that you trust as `clean`."
        )
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trained = training.finished(_checked(trainer(training.data, model, run), trainer))
    seconds = time.perf_counter() - start
    answered = proportion_of(training.task.outcomes(trained, training.data, training.arithmetic(trained)))
    cause = "it has learnt little of them, so raise `epochs` or `learning_rate`, or check the labels"
    doubt = chance_doubt("the trained model", answered, len(training.classes), data.name, cause)
    if doubt is not None:
        run.warn(doubt)
    record = {
        "trainer": {**to_json(trainer, REGISTRY), "repr": repr(trainer)},
        **_record_of(training, run),
        "device": description(arithmetic),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(),
        "examples_seen": training.examples_seen + run.examples_seen,
        "encode": encode_entry(training.data.encode, training.data),
        "accuracy_on_data": answered.to_json(),
        "suspects": None if run.suspects is None else run.suspects.to_json(poisoned),
        "notes": run.notes,
        "warnings": run.warnings,
    }
    return Trained(model=trained, encode=training.data.encode, suspects=run.suspects, record=record)


def _head(training: Trainer, model: nn.Module) -> str:
    """The name of the last linear layer; empty if no linear layer makes the logits, which some trainers need."""
    try:
        return training.task.head(model, training.data).name
    except NoHeadError:
        return ""


def _check_trainer(trainer: RobustTrainer, data: Dataset, clean: Dataset | None) -> None:
    """Refuse a class instead of a value, and data that does not fit the trainer."""
    if isinstance(trainer, type):
        raise UnbackdoorError(
            f"train takes a trainer's value, got the class {trainer.__name__}. Write {trainer.__name__}()."
        )
    if not callable(trainer):
        raise UnbackdoorError(f"train takes a trainer's value, got {trainer!r}. Take one of unbackdoor.trainers.")
    owner = type(trainer).__name__
    if data.modality not in modalities_of(trainer):
        other = "plain" if data.modality == "image-text" else "abl"
        raise UnbackdoorError(f"{owner} trains on {kinds_of(trainer)}, but {data.name} holds other data. Try {other}.")
    if needs_clean(trainer) and clean is None:
        raise UnbackdoorError(f"{owner} needs `clean`: some labelled examples without poison.")
    if clean is not None and not needs_clean(trainer):
        raise UnbackdoorError(f"{owner} uses no clean examples. Leave `clean` out.")
    if clean is not None and len(known := clean.labels.unique().tolist()) == 1:
        raise UnbackdoorError(
            f"`clean` must have examples of two classes at least, and {clean.name} has those of "
            f"{clean.class_name(known[0])} alone. Add others."
        )
    present = data.labels.unique().tolist()
    if len(present) < 2 and data.has_labels:
        only = f"one class only ({data.class_name(present[0])})" if present else "no example"
        raise UnbackdoorError(f"{data.name} holds {only}; a classifier is trained on two classes at least. Add others.")


def _truth(poisoned: Tensor | Sequence[int] | Sequence[bool], data: Dataset) -> Tensor:
    """The positions of the poisoned rows, each once, (m,), int64, on the CPU.

    Raises:
        UnbackdoorError: the data does not have them, or a mask has not one entry for each row.
    """
    rows = torch.as_tensor(poisoned).cpu()
    if rows.dtype == torch.bool:
        if rows.shape != data.labels.shape:
            raise UnbackdoorError(
                f"`poisoned_rows` must have an entry for each of the {len(data):,} rows of {data.name} if it is a "
                f"mask, got one of shape {tuple(rows.shape)}. Give the one of this data."
            )
        return rows.nonzero()[:, 0]
    positions: Tensor = torch.unique(rows.to(torch.int64))
    if len(positions) and not 0 <= int(positions[0]) <= int(positions[-1]) < len(data):
        raise UnbackdoorError(
            f"`poisoned_rows` must be positions 0 to {len(data) - 1:,} of {data.name}, got {positions[0]:,} to "
            f"{positions[-1]:,}. Give those of this data."
        )
    return positions


def _fitting(clean: Dataset, training: Trainer) -> Dataset:
    """The clean examples, numbered and encoded as the data.

    Raises:
        UnbackdoorError: they are of another kind, or of a class that the data lacks.
    """
    if clean.modality != training.data.modality:
        raise UnbackdoorError(f"`clean` must be of the same kind as the data, but {clean.name} is not. Give others.")
    numbered = in_order_of(clean, training.data.classes)
    check_labels(numbered, len(training.classes))
    return numbered.encoded_by(training.data.encode)


def _checked(trained: nn.Module, trainer: RobustTrainer) -> nn.Module:
    """Returns a trained model in eval mode, all of it trainable.

    Raises:
        UnbackdoorError: it is not a model, or has values that are not finite.
    """
    owner = type(trainer).__name__
    if not isinstance(trained, nn.Module):
        raise UnbackdoorError(f"{owner} must return the model, got {type(trained).__name__}. End it in return model.")
    for name, tensor in trained.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnbackdoorError(f"{owner} left non-finite values in {name}. Lower its learning rate.")
    return trained.requires_grad_(True).eval()


def _record_of(training: Trainer, run: TrainingRun) -> dict[str, Any]:
    """Returns the part of `record.json` on the data and the recipe."""
    recipe, schedule, data = training.recipe, training.schedule, training.data
    return {
        "data": {
            "n": len(data),
            "per_class": torch.bincount(data.labels.cpu(), minlength=len(training.classes)).tolist(),
        },
        "clean": None if run.clean is None else len(run.clean),
        "arch": recipe.arch if recipe.base is None else "base",
        "width": recipe.width,
        "epochs": schedule.epochs,
        "learning_rate": schedule.learning_rate,
        "batch_size": schedule.batch_size,
        "seed": training.seed,
        "versions": versions(),
    }
