"""`purify`: the one place that copies, seeds, checks, times and records, so that methods need not."""

import logging
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._artifacts.machine import peak_memory, versions
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.overlap import others_than
from unbackdoor._errors import NoHeadError, UnbackdoorError, listed
from unbackdoor._models.arithmetic import Arithmetic, Precision, choose, description
from unbackdoor._models.calling import check_modules, class_count
from unbackdoor._models.linear_heads import exchange_head_, put_back_head_
from unbackdoor._models.recomputing import kept_, recomputing
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._modes import in_own_modes
from unbackdoor._progress import bar, silent
from unbackdoor._purification.form import Form, all_trained_, working_copy
from unbackdoor._purification.method import (
    Method,
    applied,
    asking,
    needs_clean,
    needs_head,
    owner_of,
    uses_unlabelled,
)
from unbackdoor._purification.run import Run, positions, without_head
from unbackdoor._registry.entries import entry_of, steps_of, to_json
from unbackdoor._registry.purifiers import REGISTRY
from unbackdoor._tasks.choice import task_of, task_without_data
from unbackdoor._tasks.classification import CLASSIFICATION
from unbackdoor._tasks.task import Examined, Task
from unbackdoor._value import check_seed

logger = logging.getLogger("unbackdoor")


class Purified(NamedTuple):
    """The purified model and its record (the content of `record.json` without the scores)."""

    model: nn.Module
    record: dict[str, Any]


@in_own_modes
def purify(
    model: nn.Module,
    clean: Dataset | None,
    method: Method,
    *,
    seed: int = 0,
    head: str | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    gradient_checkpointing: bool = False,
    base: nn.Module | None = None,
    proxy: nn.Module | None = None,
    unlabelled: Dataset | None = None,
    progress: bool = False,
) -> Purified:
    """Remove a backdoor: a suspect and a few clean examples in, the same kind of model out.

    The model passed in and the global random state are not changed. A model that lost significantly more than 10 points
    of accuracy on clean examples, or most of a class (a language model: 0.5 nats per answer token), is also returned,
    as is one that did not pass the tests of `Auto`: `record["usable"]` is False then, and the first warning says why.

    Args:
        model: any classifier (most methods need a last layer that is linear), or a causal language model.
        clean: labelled examples without a trigger, or prompts with their answers; None for a method that uses none.
        method: one of `unbackdoor.purifiers`, or any callable like them.
        seed: seed of all random draws; on one CPU the same seed gives the same weights.
        head: name of the last linear layer, if it cannot be found by running the model.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        gradient_checkpointing: see `unbackdoor._models.recomputing.recomputed_`; the base is treated likewise.
        base: the pre-trained model that the suspect came from.
        proxy: another model for the same task.
        unlabelled: further examples, whose labels are not read, for methods that use them; a few may carry a trigger.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: model and data do not fit the method or each other, or the result is not finite.
    """
    _check_arguments(model, clean, method, seed=seed, base=base, proxy=proxy)
    _check_unlabelled(unlabelled, clean, method)
    form, working = Form.of(model), working_copy(model)
    run = Run(
        generator=torch.Generator().manual_seed(seed),
        arithmetic=choose(working, device, precision),
        head_name=head or "",
        progress=bar if progress else silent,
        base=base,
        proxy=proxy,
    )
    examined: Examined | None = None
    if clean is not None:
        run.task = task_of(clean.encode)
        _check_serves(method, clean, run.task)
        examined = _examined(working, clean, head, method, run)
    elif needs_clean(method):
        raise UnbackdoorError(f"{asking(method)} needs clean examples, got none.")
    else:
        run.task = task_without_data(working)
    run.unlabelled = _without_labels(unlabelled, clean, working, run)
    measured = _measured(method, working, None if examined is None else examined.clean, run, gradient_checkpointing)
    clean_facts = _NO_CLEAN if examined is None else _compared(measured.purified, examined, method, run)
    clean_facts = {**clean_facts, "usable": _unless_failed(clean_facts["usable"], method, run)}
    replaced = put_back_head_(measured.purified)
    form.restore_(measured.purified, owner_of(method))
    record = {
        "method": {**to_json(method, REGISTRY), "repr": repr(method)},
        "seed": seed,
        "versions": versions(),
        "device": description(run.arithmetic),
        "seconds": round(measured.seconds, 3),
        "peak_memory_bytes": measured.peak_memory,
        "head": replaced or run.head_name or None,
        **clean_facts,
        **({} if run.unlabelled is None else {"unlabelled": len(run.unlabelled)}),
        "examples_seen": run.examples_seen,
        **({} if run.choice is None else {"choice": run.choice}),
        "notes": run.notes,
        "warnings": run.warnings,
    }
    return Purified(measured.purified, record)


def _check_arguments(model: object, clean: object, method: object, *, seed: int, base: object, proxy: object) -> None:
    """Refuse a wrong seed, method or data set, and a model without finite weights."""
    check_seed(seed)
    if isinstance(method, type):
        raise UnbackdoorError(
            f"purify takes a method's value, got the class {method.__name__}. Write {method.__name__}()."
        )
    if not callable(method):
        raise UnbackdoorError(f"purify takes a method's value, got {method!r}. Take one of unbackdoor.purifiers.")
    if clean is not None and not isinstance(clean, Dataset):
        raise UnbackdoorError(
            f"purify takes clean as a Dataset, got {type(clean).__name__}. Load it with unbackdoor.Dataset.load."
        )
    check_modules("purify", model=model, base=base, proxy=proxy)
    assert isinstance(model, nn.Module)
    check_finite(model.state_dict(), type(model).__name__)


def _check_unlabelled(unlabelled: object, clean: Dataset | None, method: Method) -> None:
    """Refuse what are not examples of the kind of the clean ones, or a method that uses none."""
    if unlabelled is None:
        return
    if not isinstance(unlabelled, Dataset):
        raise UnbackdoorError(
            f"purify takes unlabelled as a Dataset, got {type(unlabelled).__name__}. Load it with "
            "unbackdoor.Dataset.load."
        )
    if not uses_unlabelled(method):
        raise UnbackdoorError(
            f"{owner_of(method)} uses no unlabelled examples. Leave `unlabelled` out, or take scale-invariant-fst."
        )
    if clean is not None and clean.modality != unlabelled.modality:
        raise UnbackdoorError(
            f"`unlabelled` must hold {clean.modality} as {clean.name} does, but {unlabelled.name} holds "
            f"{unlabelled.modality}. Give others, or leave it out."
        )


def _without_labels(unlabelled: Dataset | None, clean: Dataset | None, working: nn.Module, run: Run) -> Dataset | None:
    """Returns the unlabelled examples on the run's device, each with the label -1; None if there are none.

    Those that are among the clean ones are left out: a method judges its result on some of these.

    Raises:
        UnbackdoorError: the model cannot take them, or all are clean ones.
    """
    if unlabelled is None:
        return None
    if unlabelled.modality in CLASSIFICATION.modalities:
        class_count(working, unlabelled)
    if clean is not None:
        given, unlabelled = len(unlabelled), others_than(unlabelled, clean)
        if len(unlabelled) == 0:
            raise UnbackdoorError(f"`unlabelled` holds only examples of {clean.name}. Give others, or leave it out.")
        if len(unlabelled) < given:
            run.note(
                f"{given - len(unlabelled):,} of the unlabelled examples are clean ones as well; they are left out."
            )
    hidden = replace(unlabelled, labels=torch.full((len(unlabelled),), -1), groups=None, rows=None)
    return hidden.to(run.arithmetic.device)


def _check_serves(method: Method, clean: Dataset, task: Task) -> None:
    """Refuse a method for models of another task.

    Raises:
        UnbackdoorError: names the kinds of data that the method serves.
    """
    for step in steps_of(method):
        entry = entry_of(step, REGISTRY)
        if entry is not None and not set(entry.modality) & set(task.modalities):
            first = [each.name for each in REGISTRY if set(each.recommended) & set(task.modalities)]
            way_out = (
                f"Begin with {' or '.join(first)}; unbackdoor list methods shows all."
                if first
                else ("See unbackdoor list methods.")
            )
            raise UnbackdoorError(
                f"{entry.name} serves {listed(entry.modality)}, but {clean.name} holds {clean.modality}. {way_out}"
            )


class _Measured(NamedTuple):
    """A purified model, and the time and memory (bytes) that its method took."""

    purified: nn.Module
    seconds: float
    peak_memory: int


def _examined(working: nn.Module, clean: Dataset, head: str | None, method: Method, run: Run) -> Examined:
    """Check that model and clean examples fit each other and the method; see `Task.examined`.

    Fills in what the run did not know yet. If a linear layer can stand in for the model's head, it does from here on.
    """
    if head is None and run.task is CLASSIFICATION:
        exchange_head_(working, clean)
    try:
        examined = run.task.examined(working, clean, run.arithmetic, run.warn, head, headless=not needs_head(method))
    except NoHeadError:
        raise without_head(working, owner_of(method)) from None
    run.head_name, run.modality = examined.head_name, clean.modality
    return examined


def _measured(method: Method, working: nn.Module, clean: Dataset | None, run: Run, again: bool) -> _Measured:
    """Run a method on the device with all parameters trainable, and leave the global random state as it was."""
    device = run.arithmetic.device
    cuda = [device] if device.type == "cuda" else []
    for gpu in cuda:
        torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    recomputed = [each for each in (working, run.base) if each is not None and again]
    with torch.random.fork_rng(devices=cuda), recomputing(*recomputed):
        torch.manual_seed(run.seed)
        all_trained_(working)
        examples: Any = clean if clean is None else clean.to(device)
        purified = applied(method, run.arithmetic.place(working), examples, run)
    seconds = time.perf_counter() - start
    kept_(purified.modules())  # which may be a copy of those that compute their blocks again
    return _Measured(purified, seconds, torch.cuda.max_memory_allocated(device) if cuda else peak_memory())


_NO_CLEAN: dict[str, Any] = dict.fromkeys(
    ("clean", "recipe", "suspect_accuracy_on_clean", "purified_accuracy_on_clean", "usable")
)


def _compared(purified: nn.Module, examined: Examined, method: Method, run: Run) -> dict[str, Any]:
    """Returns the record's entries on the clean examples, what suspect and result make of them, and `usable`.

    If the result is not usable, a sentence is put first among the warnings.
    """
    clean, before = examined.clean, examined.outcomes
    after = run.task.outcomes(purified, clean, run.arithmetic)
    usable = _judge(before, after, clean, method, run)
    return {
        "clean": {**run.task.clean_facts(examined), "held_out": run.held_out},
        "recipe": run.recipe._asdict(),
        **run.task.figures(clean, before, after),
        "usable": usable,
    }


def _unless_failed(usable: bool | None, method: Method, run: Run) -> bool | None:
    """Returns False, with the reason first among the warnings, if the method says that it failed; else `usable`.

    One step among others that failed is a warning, as the others did their work.
    """
    if run.failure is None:
        return usable
    if len(steps_of(method)) > 1:
        run.warn(run.failure)
        return usable
    _warn_first(run.failure, run)
    return False


def _warn_first(text: str, run: Run) -> None:
    """Put a sentence first among the warnings; a command prints it above its results."""
    run.warnings.insert(0, text)
    logger.warning("%s", text, extra={"first_line": True})


def _judge(before: Tensor, after: Tensor, clean: Dataset, method: Method, run: Run) -> bool:
    """Whether the result is usable, by examples that it was not tuned on if there are any; warns if it is not.

    Args:
        before: what the suspect makes of each clean example, (n,).
        after: the same for the result.
        clean: the examples.
        method: the method that made the result.
        run: the run of the method.
    """
    which = "the ones it was tuned on"
    held = None if run.unseen is None else positions(run.unseen, clean)
    if held is not None:
        clean, before, after, which = clean.select(held), before[held], after[held], "which were held out"
    elif run.cross_validated is not None and len(run.cross_validated) == len(before):
        after, which = run.cross_validated, "which were left out in their turn"
    judgement = run.task.judged(clean, before, after, which, method)
    if judgement.unusable is not None:
        _warn_first(judgement.unusable, run)
        return False
    if judgement.doubt is not None:
        run.warn(judgement.doubt)
    return True


def judged(
    purified: Purified, suspect: nn.Module, test: Dataset, method: Method, arithmetic: Arithmetic
) -> dict[str, Any]:
    """Returns `usable` and `warnings` for a method without clean examples, judged by test examples."""
    task = task_of(test.encode)
    before, after = (task.outcomes(model, test, arithmetic) for model in (suspect, purified.model))
    damage = task.judged(test, before, after, "which are scored", method).unusable
    return {"usable": damage is None, "warnings": [*([] if damage is None else [damage]), *purified.record["warnings"]]}
