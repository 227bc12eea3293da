"""`fit_guard` and `load_guard`: the one place that splits, seeds, sets the threshold and records."""

import hashlib
import math
import sys
import time
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._artifacts.guard_record import GuardRecord, read_guard
from unbackdoor._artifacts.machine import versions
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.overlap import distinct
from unbackdoor._data.pair_encoder import PairEncoder
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._guarding.deciding import all_scores
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.guard import Guard, bound_of, owner_of
from unbackdoor._guarding.identity import (
    Identity,
    check_reading,
    check_same,
    check_unchanged,
    encoder_hashes,
    model_hash,
    tokenizer_hash,
)
from unbackdoor._guarding.threshold import alarms, check_enough, check_rate, threshold_of
from unbackdoor._guarding.turns import turn
from unbackdoor._guarding.work import StoredArrays
from unbackdoor._inputs import reader
from unbackdoor._inversion.search import frozen
from unbackdoor._models.adapters import carries_adapter
from unbackdoor._models.arithmetic import Precision, choose, description
from unbackdoor._models.calling import check_modules
from unbackdoor._models.decoding import check_room
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._modes import in_own_modes
from unbackdoor._progress import bar, silent
from unbackdoor._purification.run import Run
from unbackdoor._registry.entries import Need, entry_of, find, to_json
from unbackdoor._registry.guards import REGISTRY
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.generation import Generation, refuse_head
from unbackdoor._tasks.proportion import Proportion, proportion_of
from unbackdoor._value import check_seed


@in_own_modes
def fit_guard(
    model: nn.Module,
    clean: Dataset,
    guard: Guard,
    *,
    false_alarms: float = 0.01,
    base: nn.Module | None = None,
    reference: "Perplexity | str | Path | None" = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    head: str | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> FittedGuard:
    """Fit a guard to a model: it then decides about single inputs, and leaves the model as it is.

    One half of the clean examples fits the guard; the other half sets the threshold, so that another clean input
    raises an alarm with a probability of at most `false_alarms`. The global random state is not changed.

    Args:
        model: any classifier whose last layer is linear, or a causal language model; it is not changed.
        clean: labelled examples, or prompts, without a trigger, of which no test example is one; equal ones count once.
        guard: of `unbackdoor.guards`, or any value like them.
        false_alarms: share of clean inputs that may raise an alarm, in (0, 1). A guard that changes every input has no
            threshold: it is fitted on all clean examples.
        base: the language model that the suspect was tuned from, for guards that need it. An adapter needs none.
        reference: a second causal language model, for guards that need one: directory, Hub name, or `Perplexity`.
        max_new_tokens: the longest answer of a language model, in tokens; by default 64.
        seed: of all random draws.
        head: name of the last linear layer, if it cannot be found by running the model.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: there are too few clean examples for the share of false alarms (says how many), or model, data
            and guard do not fit each other.
    """
    check_seed(seed)
    check_rate(false_alarms)
    check_modules("fit_guard", model=model, base=base)
    _check_guard(guard, clean, model, base, reference)
    check_finite(model.state_dict(), type(model).__name__)
    start = time.perf_counter()
    run = Run(
        generator=torch.Generator().manual_seed(seed),
        arithmetic=choose(model, device, precision),
        head_name=head or "",
        modality=clean.modality,
        task=task_of(clean.encode, max_new_tokens=max_new_tokens),
        progress=bar if progress else silent,
        base=base,
        reference=as_reference(reference),
    )
    decides = guard.suspicious != "all"
    clean, accuracy = _examined(model, _enough(clean, false_alarms, run) if decides else clean, run, head)
    fitting, held_out = clean.split(len(clean) // 2, seed=seed) if decides else (clean, clean.select([]))
    before = model_hash(model)
    learnt, scores, threshold = _learnt(guard, model, fitting, held_out, run, false_alarms)
    check_unchanged(guard, model, before)
    record = {
        **_facts(guard, clean, run),
        "false_alarms": {"asked": false_alarms, "n": len(held_out)} if decides else None,
        "clean": {"n": len(clean), "fitted_on": len(fitting), "threshold_on": len(held_out)},
        "suspect_accuracy_on_clean": None if accuracy is None else accuracy.to_json(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    return FittedGuard(
        guard=guard,
        learnt=learnt,
        threshold=threshold,
        identity=Identity(before, **encoder_hashes(clean.encode), reference=_reference_hash(run.reference)),
        encode=clean.encode,
        seen=hashes(clean),
        reference=run.reference,
        record=record,
        held_out=scores,
    )


@reader("source")
def load_guard(
    source: str | Path, encode: Encoder, *, reference: "Perplexity | str | Path | None" = None
) -> FittedGuard:
    """Load a guard that `FittedGuard.save` or `unbackdoor guard fit` wrote.

    Args:
        source: its directory.
        encode: the encoder of the model that it was fitted to, as `load` returns it.
        reference: the second language model that it was fitted with, if it needs one.

    Raises:
        UnbackdoorError: a file is missing or was changed; or the tokenizer, the template, the processor or the
            reference is another one.
    """
    if not isinstance(source, str | Path):
        raise UnbackdoorError(f"`source` must be the directory of a guard, got {type(source).__name__}.")
    if not isinstance(encode, Encoder):
        raise UnbackdoorError(
            f"load_guard takes the encoder of the model, got {type(encode).__name__}. Give "
            "unbackdoor.load(PATH).encode."
        )
    record, arrays = read_guard(Path(source))
    fields = record.guard.parameters
    guard = _guard_class(record, Path(source))(**(fields if isinstance(fields, dict) else {}))
    _check_recorded(record, guard, Path(source))
    check_seed(record.seed)
    identity = Identity(**record.identity.model_dump())
    if encode.modality != record.modality:
        raise UnbackdoorError(
            f"The guard was fitted to {record.modality}, and the encoder reads {encode.modality}. Give its own model."
        )
    check_reading(encode, record.max_length, record.template)
    for part, digest in encoder_hashes(encode).items():
        check_same(part, getattr(identity, part), digest)
    if identity.reference is not None and reference is None:
        raise UnbackdoorError(f"{owner_of(guard)} needs `reference`, the language model that it was fitted with.")
    if identity.reference is None and reference is not None:
        raise takes_no(guard, "reference")
    rates = as_reference(reference)
    check_same("reference", identity.reference, _reference_hash(rates))
    seen = arrays.pop("seen", torch.zeros(0, dtype=torch.int64))
    check_finite(arrays, str(source))
    own = ("format", "arrays", "files", "threshold", "identity")
    content = {key: entry for key, entry in record.model_dump(mode="json").items() if key not in own}
    return FittedGuard(guard, StoredArrays(arrays), record.threshold, identity, encode, seen, rates, content)


def _check_recorded(record: GuardRecord, guard: Guard, folder: Path) -> None:
    """Refuse what no fitted guard of this name has: the file may come from anybody.

    That is another kind of data, a reference that it does not use, or a threshold that no or every input is beyond.
    """
    entry = entry_of(guard, REGISTRY)
    if entry is not None and record.modality not in entry.modality:
        raise UnbackdoorError(
            f"{folder / 'guard.json'} has the guard {entry.name} for {record.modality}, which it does not serve. Fit "
            "the guard again."
        )
    if entry is not None and (Need.REFERENCE in entry.needs) != (record.identity.reference is not None):
        how = "without" if record.identity.reference is None else "with"
        raise UnbackdoorError(
            f"{folder / 'guard.json'} has the guard {entry.name} {how} a reference. Fit the guard again."
        )
    if record.max_new_tokens == 0:
        raise UnbackdoorError(
            f"{folder / 'guard.json'} must have `max_new_tokens` of at least 1, got 0. Fit the guard again."
        )
    none = guard.suspicious == "all"
    if none != (record.threshold is None) or not math.isfinite(record.threshold or 0.0):
        allowed = "no threshold, since it changes every input" if none else "a finite threshold"
        raise UnbackdoorError(
            f"{folder / 'guard.json'} must have {allowed}, got {record.threshold}. Fit the guard again."
        )


def _enough(clean: Dataset, false_alarms: float, run: Run) -> Dataset:
    """The clean examples that differ: of one that is in both halves, a copy would be judged as unseen.

    Raises:
        UnbackdoorError: there are too few for the share of false alarms.
    """
    differing = distinct(clean, run.note)
    check_enough(len(differing), false_alarms, clean.name)
    return differing


def _facts(guard: Guard, clean: Dataset, run: Run) -> dict[str, Any]:
    """The entries of `guard.json` about the guard, its kind of data, and the software."""
    return {
        "guard": {**to_json(guard, REGISTRY), "repr": repr(guard)},
        "task": "generation" if isinstance(run.task, Generation) else "classification",
        "modality": clean.modality,
        "score": {"measure": guard.measure, "suspicious": guard.suspicious},
        "head": run.head_name,
        "max_length": None if isinstance(clean.encode, ImageEncoder | PairEncoder) else clean.encode.max_length,
        **({"texts": len(clean.texts.columns)} if clean.modality == "text" else {}),
        **_on_answers(clean, run),
        "seed": run.seed,
        "device": description(run.arithmetic),
        "versions": versions(),
        "notes": run.notes,
        "warnings": run.warnings,
    }


def _on_answers(clean: Dataset, run: Run) -> dict[str, Any]:
    """The entries that only a guard of a language model has: the longest answer, and the name of the template."""
    if not isinstance(run.task, Generation):
        return {}
    return {"max_new_tokens": run.task.max_new_tokens, "template": clean.conversation_encoder.template}


def _examined(model: nn.Module, clean: Dataset, run: Run, head: str | None) -> tuple[Dataset, Proportion | None]:
    """Check that model and clean examples fit each other, and find the head; returns a classifier's accuracy as well.

    Prompts need no answers here.
    """
    if not isinstance(run.task, Generation):
        examined = run.task.examined(model, clean, run.arithmetic, run.warn, head, headless=True)
        run.head_name = examined.head_name
        return examined.clean, proportion_of(examined.outcomes)
    refuse_head(head)
    clean = run.task.checked(model, clean).test
    run.head_name = run.task.head(model, clean).name
    return clean, None


def _learnt(
    guard: Guard, model: nn.Module, fitting: Dataset, held_out: Dataset, run: Run, false_alarms: float
) -> tuple[dict[str, Tensor], Tensor | None, float | None]:
    """The arrays that a guard fits on one half of the clean examples, scores of the other half, and the threshold.

    A guard that changes every input has neither of the last two.
    """
    device = run.arithmetic.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(run.seed)
        with turn(model), run.arithmetic.placed(model) as placed, frozen(placed):
            learnt = guard(placed, fitting.to(device), run)
            if not isinstance(learnt, dict) or not all(isinstance(array, Tensor) for array in learnt.values()):
                raise UnbackdoorError(f"{owner_of(guard)} must return a dict of tensors by name, got {learnt!r}.")
            learnt = {name: array.detach().cpu().contiguous() for name, array in learnt.items()}
            check_finite(learnt, owner_of(guard))
            if guard.suspicious == "all":
                if isinstance(run.task, Generation):  # nothing was answered yet, so nobody saw that there is no room
                    check_room(placed, fitting, run.task.max_new_tokens)
                return learnt, None, None
            scores = all_scores(guard, placed, held_out.to(device), learnt, run)
    return learnt, scores, _threshold(guard, scores, false_alarms, run)


def _threshold(guard: Guard, scores: Tensor, false_alarms: float, run: Run) -> float:
    """The threshold for a share of false alarms, unless the guard sets its own; then the share that it has is noted."""
    assert guard.suspicious != "all"
    bound = bound_of(guard)
    if bound is None:
        threshold = threshold_of(scores, false_alarms, guard.suspicious)
        alike = int((scores == threshold).sum())
        if alike > false_alarms * (len(scores) + 1) and not bool(alarms(scores, threshold, guard.suspicious).any()):
            run.warn(
                f"{owner_of(guard)} gives {alike:,} of {len(scores):,} held-out clean inputs the same score, "
                f"{threshold:.4g}, and none a more suspicious one: it may never raise an alarm. Evaluate it."
            )
        return threshold
    raised = proportion_of(alarms(scores, bound, guard.suspicious))
    run.note(f"{owner_of(guard)} sets its own threshold; of the held-out clean inputs {raised!r} raise an alarm.")
    return bound


def as_reference(reference: "Perplexity | str | Path | None") -> Perplexity | None:
    """Returns a language model that rates texts, from its directory or its Hub name.

    Raises:
        UnbackdoorError: the reference is none of these; or it cannot be loaded.
    """
    if isinstance(reference, str | Path):
        return Perplexity.load(reference)
    if reference is not None and not isinstance(reference, Perplexity):
        raise UnbackdoorError(
            f"`reference` must be a directory or Hub name, since its tokenizer is needed too, got "
            f"{type(reference).__name__}."
        )
    return reference


def hashes(data: Dataset) -> Tensor:
    """Returns a number for each example, (n,), int64, equal for equal examples."""
    conversations: Iterable[Hashable] = data.identities()
    if data.modality == "conversations":  # an input is the prompt, whether or not an answer is known
        conversations = [entry.messages for entry in data.conversations.entries]
    plain = [each if isinstance(each, bytes) else repr(each).encode() for each in conversations]
    numbers = [int.from_bytes(hashlib.sha256(each).digest()[:8], signed=True) for each in plain]
    return torch.tensor(numbers, dtype=torch.int64)


def _check_guard(
    guard: Guard,
    clean: Dataset,
    model: nn.Module,
    base: nn.Module | None,
    reference: "Perplexity | str | Path | None",
) -> None:
    """Refuse what is no guard, a guard for other data, or one without the models that it needs."""
    if isinstance(guard, type):
        raise UnbackdoorError(
            f"fit_guard takes a guard's value, got the class {guard.__name__}. Write {guard.__name__}()."
        )
    if not callable(guard) or not all(hasattr(guard, name) for name in ("scores", "measure", "suspicious")):
        raise UnbackdoorError(f"fit_guard takes a guard's value, got {guard!r}. Take one of unbackdoor.guards.")
    if guard.suspicious not in ("low", "high", "all"):
        raise UnbackdoorError(f"{owner_of(guard)}.suspicious must be low, high or all, got {guard.suspicious!r}.")
    if not isinstance(clean, Dataset):
        raise UnbackdoorError(
            f"fit_guard takes clean as a Dataset, got {type(clean).__name__}. Load it with unbackdoor.Dataset.load."
        )
    if not any(clean.modality in each.modality for each in REGISTRY):
        raise UnbackdoorError(
            f"No guard serves {clean.modality}, which {printable(clean.name)} holds. Take an audit of the model, or "
            "purify it."
        )
    entry = entry_of(guard, REGISTRY)
    if entry is None:
        return
    if clean.modality not in entry.modality:
        raise UnbackdoorError(
            f"The guard {entry.name} serves {', '.join(entry.modality)}, and {printable(clean.name)} holds "
            f"{clean.modality}. Take another guard (unbackdoor list guards)."
        )
    helpers = {"base": base, "reference": reference}
    needs = {"base": Need.BASE, "reference": Need.REFERENCE}
    means = {
        "base": "the language model that the suspect was tuned from",
        "reference": "a causal language model that rates texts",
    }
    for name, need in needs.items():
        spared = need is Need.BASE and carries_adapter(model)  # its matrices are the change already
        if need in entry.needs and helpers[name] is None and not spared:
            raise UnbackdoorError(f"{owner_of(guard)} needs `{name}`, {means[name]}.")
        if need not in entry.needs and helpers[name] is not None:
            raise takes_no(guard, name)


def takes_no(guard: Guard, name: str) -> UnbackdoorError:
    """Returns the refusal of a second model for a guard that needs none."""
    return UnbackdoorError(f"{owner_of(guard)} takes no `{name}`. Leave it out.")


def _reference_hash(reference: Perplexity | None) -> str | None:
    if reference is None:
        return None
    parts = model_hash(reference.model) + tokenizer_hash(reference.tokenizer, reference.max_length)
    return hashlib.sha256(parts.encode()).hexdigest()


def _guard_class(record: GuardRecord, folder: Path) -> Any:
    """Returns the class of a recorded guard. The file may come from anybody, so it never imports anything."""
    name = record.guard.name
    if ":" not in name:
        return find(name, REGISTRY, "guard", "guards").resolve()
    module, _, attribute = name.partition(":")
    cls = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(cls, type) and hasattr(cls, "measure") and hasattr(cls, "scores")):
        raise UnbackdoorError(
            f"{folder} names the guard {printable(name)}, which is not one of unbackdoor's own and is not imported "
            "here. Load it in Python, after importing its class."
        )
    return cls
