"""`purify`: the one place that copies, seeds, checks, times and records. Methods do none of it."""

import copy
import logging
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._artifacts.machine import peak_memory
from unbackdoor._data.classes import check_labels, in_order_of, tell_order
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._evaluation.damage import ALLOWED, unusable
from unbackdoor._models import calling
from unbackdoor._models.arithmetic import Arithmetic, Precision, choose, description, relayout_
from unbackdoor._models.head import head_of
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._progress import bar, silent
from unbackdoor._purification.method import Method, applied, asking, needs_clean, owner_of
from unbackdoor._purification.run import Run, positions
from unbackdoor._registry.entries import to_json
from unbackdoor._registry.purifiers import REGISTRY
from unbackdoor._tasks.classification import hits
from unbackdoor._tasks.proportion import Proportion, chance_doubt
from unbackdoor._value import check_seed

logger = logging.getLogger("unbackdoor")


class Purified(NamedTuple):
    """The purified model, and how it came about (the content of `record.json` but for the scores)."""

    model: nn.Module
    record: dict[str, Any]


def purify(
    model: nn.Module,
    clean: Dataset | None,
    method: Method,
    *,
    seed: int = 0,
    head: str | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    base: nn.Module | None = None,
    proxy: nn.Module | None = None,
    progress: bool = False,
) -> Purified:
    """Remove a backdoor: a suspect and a few clean examples in, the same kind of model out.

    The given model and the global random state are left as they were. A model that lost significantly more than 10
    points of accuracy on clean examples comes back all the same: then `record["usable"]` is False, and the first of
    `record["warnings"]` says why.

    Args:
        model: any classifier whose last layer is linear.
        clean: labelled examples without trigger; None for a method that uses none.
        method: of `unbackdoor.purifiers`, or any callable like them.
        seed: of everything random; on one CPU the same seed gives the same weights.
        head: name of the last linear layer, where it cannot be found by running the model.
        device: None takes a GPU where there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        base: the pre-trained model that the suspect came from.
        proxy: another model for the same task.
        progress: show a bar on stderr.

    Raises:
        UnbackdoorError: model and data do not fit the method or each other, or the result is not finite.
    """
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
    calling.check_modules("purify", model=model, base=base, proxy=proxy)
    check_finite(model.state_dict(), type(model).__name__)
    training = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    unsaved = {name: buffer.dtype for name, buffer in model.named_buffers() if name not in types}
    home = calling.device_of(model)

    working = copy.deepcopy(model)
    if any(dtype in (torch.float16, torch.bfloat16) for dtype in types.values()):
        working.float()  # half precision is too coarse for small steps
    arithmetic = choose(working, device, precision)
    run = Run(
        generator=torch.Generator().manual_seed(seed),
        arithmetic=arithmetic,
        head_name=head or "",
        progress=bar if progress else silent,
        base=base,
        proxy=proxy,
    )
    names = ("clean", "recipe", "suspect_accuracy_on_clean", "purified_accuracy_on_clean", "usable")
    facts: dict[str, Any] = dict.fromkeys(names)
    before = torch.empty(0)
    if clean is not None:
        clean = in_order_of(clean, calling.class_names(model))
        before = _look(working, clean, head, run, facts)
    if clean is None and needs_clean(method):
        raise UnbackdoorError(f"{asking(method)} needs clean examples, got none.")
    cuda = [arithmetic.device] if arithmetic.device.type == "cuda" else []
    for gpu in cuda:
        torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for parameter in working.parameters():
            parameter.requires_grad_(True)
        examples: Any = clean if clean is None else clean.to(arithmetic.device)
        purified = applied(method, arithmetic.place(working), examples, run)
    seconds = time.perf_counter() - start

    if clean is not None:
        _look_again(purified, clean, method, before, run, facts)
    relayout_(purified.to(home), torch.contiguous_format)
    _restore(purified, types, unsaved, training, trainable, owner_of(method))
    record = {
        "method": {**to_json(method, REGISTRY), "repr": repr(method)},
        "seed": seed,
        "versions": {
            "unbackdoor": version("unbackdoor"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": description(arithmetic),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(cuda[0]) if cuda else peak_memory(),
        "head": run.head_name or None,
        **facts,
        "examples_seen": run.examples_seen,
        "notes": run.notes,
        "warnings": run.warnings,
    }
    if record["clean"] is not None:
        record["clean"]["held_out"] = run.held_out
    return Purified(purified, record)


def judged(
    purified: Purified, suspect: nn.Module, test: Dataset, method: Method, arithmetic: Arithmetic
) -> dict[str, Any]:
    """What test examples say of a result whose method took no clean ones: `usable` and `warnings` of its record."""
    before, after = (hits(model, test, arithmetic) for model in (suspect, purified.model))
    found = unusable(before, after, "which are scored", method)
    return {"usable": found is None, "warnings": [*([] if found is None else [found]), *purified.record["warnings"]]}


def _look(model: nn.Module, clean: Dataset, head: str | None, run: Run, facts: dict[str, Any]) -> Tensor:
    """Check that model and clean examples fit each other, tell `run` the head and the recipe, and record both.

    Returns:
        which examples the model classifies as labelled, (n,), bool.
    """
    if len(clean) == 0:
        raise UnbackdoorError(f"{clean.name} is empty; at least one labelled clean example per class is needed.")
    found = head_of(model, calling.probe(model, clean), head)
    run.head_name, run.modality = found.name, clean.modality
    classes = found.layer.out_features
    check_labels(clean, classes)
    right = hits(model, clean, run.arithmetic)
    before = Proportion(int(right.sum()), len(right))
    _check_clean(clean, classes, before, run)
    tell_order(clean, calling.class_names(model), classes, run.warn)
    facts |= {
        "clean": {
            "n": len(clean),
            "per_class": torch.bincount(clean.labels.cpu(), minlength=classes).tolist(),
            "augment": asdict(clean.augment),
        },
        "recipe": run.recipe._asdict(),
        "suspect_accuracy_on_clean": before.to_json(),
    }
    return right


def _look_again(
    model: nn.Module, clean: Dataset, method: Method, before: Tensor, run: Run, facts: dict[str, Any]
) -> None:
    """Record the result's accuracy on the examples that it was made with, and whether it is of use after all."""
    after = hits(model, clean, run.arithmetic)
    facts["purified_accuracy_on_clean"] = Proportion(int(after.sum()), len(after)).to_json()
    which = "which it was made with"
    held = None if run.unseen is None else positions(run.unseen, clean)
    if held is not None:
        before, after, which = before[held], after[held], "which were held out"
    elif run.cross_validated is not None and len(run.cross_validated) == len(before):
        after, which = run.cross_validated, "which were left out in their turn"
    found = unusable(before, after, which, method)
    facts["usable"] = found is None
    if found is not None:
        run.warnings.insert(0, found)
        logger.warning("%s", found, extra={"first_line": True})
        return
    lost = float(before.double().mean() - after.double().mean())
    if lost > ALLOWED:
        run.warn(
            f"the purified model answers {len(before):,} clean examples, {which}, {100 * lost:.1f} points worse than "
            f"the suspect; they are too few to tell whether more than {100 * ALLOWED:.0f} points are lost. Score it on "
            "others by --data, or give more."
        )


def _check_clean(clean: Dataset, classes: int, accuracy: Proportion, run: Run) -> None:
    """Refuse too few examples; warn of classes without one and of a suspect near chance."""
    if len(clean) < classes:
        raise UnbackdoorError(
            f"{clean.name} must hold at least one example for each of the {classes} classes, got {len(clean)} in all. "
            "Add clean examples."
        )
    counts = torch.bincount(clean.labels.cpu(), minlength=classes)
    absent = torch.nonzero(counts == 0).flatten().tolist()
    if len(absent) == classes - 1:
        only = int(counts.argmax())
        raise UnbackdoorError(
            f"{clean.name} holds one class only ({clean.class_name(only)}): whatever is tuned "
            f"on it learns to answer nothing else. Add clean examples of the other class{'es' * (classes > 2)}."
        )
    if absent:
        known = dict(enumerate(clean.classes or ()))
        names = [known.get(label, str(label)) for label in absent[:5]]
        more = ", ..." if len(absent) > 5 else ""
        run.warn(
            f"{clean.name} has no example of {len(absent)} class(es) ({', '.join(names)}{more}): the purified model "
            "will probably lose them."
        )
    doubt = chance_doubt("the suspect", accuracy, classes, clean.name)
    if doubt is not None:
        run.warn(doubt)


def _restore(
    model: nn.Module,
    types: dict[str, torch.dtype],
    unsaved: dict[str, torch.dtype],
    training: dict[str, bool],
    trainable: dict[str, bool],
    owner: str,
) -> None:
    """Give the result the suspect's types (those of its unsaved buffers, too) and modes; check keys and range."""
    state: dict[str, Tensor] = model.state_dict()
    if state.keys() != types.keys():
        odd = sorted(state.keys() ^ types.keys())
        raise UnbackdoorError(f"{owner} must keep the model's weights, but changed the keys {', '.join(odd[:3])}.")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(types[name])).all():
            raise UnbackdoorError(
                f"{owner} left values in {name} that are too large for the model's {str(types[name])[6:]}. Take a base "
                "of that type, or give the model in float32."
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(types[name])
            parameter.requires_grad_(trainable[name])
            parameter.grad = None
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to((types | unsaved)[name])
    for name, module in model.named_modules():
        module.training = training[name]
