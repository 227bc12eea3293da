"""`fit_guard` and `load_guard`: the one place that splits, seeds, sets the threshold and records."""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._artifacts.guard_record import GuardRecord, read_guard
from unbackdoor._artifacts.machine import versions
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.texts import TextEncoder
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._guarding.deciding import all_scores
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.guard import Guard, owner_of
from unbackdoor._guarding.identity import (
    Identity,
    check_same,
    check_unchanged,
    encoder_hashes,
    model_hash,
    tokenizer_hash,
)
from unbackdoor._guarding.threshold import check_enough, check_rate, threshold_of
from unbackdoor._inputs import reader
from unbackdoor._inversion.search import frozen
from unbackdoor._models.arithmetic import Precision, choose, description
from unbackdoor._models.calling import check_modules
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._progress import bar, silent
from unbackdoor._purification.run import Run
from unbackdoor._registry.entries import Need, entry_of, find, to_json
from unbackdoor._registry.guards import REGISTRY
from unbackdoor._tasks.proportion import proportion_of
from unbackdoor._value import check_seed


def fit_guard(
    model: nn.Module,
    clean: Dataset,
    guard: Guard,
    *,
    false_alarms: float = 0.01,
    reference: "Perplexity | str | Path | None" = None,
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
        model: any classifier whose last layer is linear; it is not changed.
        clean: labelled examples without a trigger, of which no test example is one.
        guard: of `unbackdoor.guards`, or any value like them.
        false_alarms: share of clean inputs that may raise an alarm, in (0, 1).
        reference: a causal language model, for guards that need one: its directory, its Hub name, or a `Perplexity`.
        seed: of all random draws.
        head: name of the last linear layer, if it cannot be found by running the model.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: there are too few clean examples for the share of false alarms (says how many are needed), or
            the model, the data and the guard do not fit each other.
    """
    check_seed(seed)
    check_rate(false_alarms)
    check_modules("fit_guard", model=model)
    rates = _check_guard(guard, clean, reference)
    check_finite(model.state_dict(), type(model).__name__)
    check_enough(len(clean), false_alarms, clean.name)
    start = time.perf_counter()
    arithmetic = choose(model, device, precision)
    run = Run(
        generator=torch.Generator().manual_seed(seed),
        arithmetic=arithmetic,
        head_name=head or "",
        modality=clean.modality,
        progress=bar if progress else silent,
        reference=rates,
    )
    examined = run.task.examined(model, clean, arithmetic, run.warn, head)
    run.head_name = examined.head_name
    fitting, held_out = examined.clean.split(len(clean) // 2, seed=seed)
    before = model_hash(model)
    with torch.random.fork_rng(devices=[arithmetic.device] if arithmetic.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with arithmetic.placed(model) as placed, frozen(placed):
            learnt = guard(placed, fitting.to(arithmetic.device), run)
            learnt = {name: array.detach().cpu().contiguous() for name, array in learnt.items()}
            check_finite(learnt, owner_of(guard))
            scores = all_scores(guard, placed, held_out.to(arithmetic.device), learnt, run)
    check_unchanged(guard, model, before)
    record = {
        **_facts(guard, clean, run),
        "false_alarms": {"asked": false_alarms, "n": len(held_out)},
        "clean": {"n": len(clean), "fitted_on": len(fitting), "threshold_on": len(held_out)},
        "suspect_accuracy_on_clean": proportion_of(examined.outcomes).to_json(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    return FittedGuard(
        guard=guard,
        learnt=learnt,
        threshold=threshold_of(scores, false_alarms, guard.suspicious),
        identity=Identity(before, **encoder_hashes(clean.encode), reference=_reference_hash(rates)),
        encode=clean.encode,
        seen=hashes(clean),
        reference=rates,
        record=record,
    )


@reader("source")
def load_guard(
    source: str | Path, encode: Encoder, *, reference: "Perplexity | str | Path | None" = None
) -> FittedGuard:
    """Load a guard that `FittedGuard.save` or `unbackdoor guard fit` wrote.

    Args:
        source: its directory.
        encode: the encoder of the model that it was fitted to, as `load` returns it.
        reference: the language model that it was fitted with, if it needs one.

    Raises:
        UnbackdoorError: a file is missing or was changed; or the tokenizer, the processor or the reference is another
            one.
    """
    record, arrays = read_guard(Path(source))
    fields = record.guard.parameters
    guard = _guard_class(record, Path(source))(**(fields if isinstance(fields, dict) else {}))
    identity = Identity(**record.identity.model_dump(exclude={"template"}))
    if encode.modality != record.modality:
        raise UnbackdoorError(
            f"The guard was fitted to {record.modality}, and the encoder reads {encode.modality}. Give its own model."
        )
    for part, given in encoder_hashes(encode).items():
        check_same(part, getattr(identity, part), given)
    if identity.reference is not None and reference is None:
        raise UnbackdoorError(f"{owner_of(guard)} needs `reference`, the language model that it was fitted with.")
    rates = None if identity.reference is None else as_reference(reference)
    check_same("reference", identity.reference, _reference_hash(rates))
    seen = arrays.pop("seen", torch.zeros(0, dtype=torch.int64))
    check_finite(arrays, str(source))
    own = ("format", "arrays", "files", "threshold", "identity")
    content = {key: entry for key, entry in record.model_dump(mode="json").items() if key not in own}
    return FittedGuard(guard, arrays, record.threshold, identity, encode, seen, rates, content)


def _facts(guard: Guard, clean: Dataset, run: Run) -> dict[str, Any]:
    """What `guard.json` says about the guard, its kind of data, and the software."""
    return {
        "guard": {**to_json(guard, REGISTRY), "repr": repr(guard)},
        "task": "classification",
        "modality": clean.modality,
        "score": {"measure": guard.measure, "suspicious": guard.suspicious},
        "head": run.head_name,
        "max_length": clean.encode.max_length if isinstance(clean.encode, TextEncoder) else None,
        "seed": run.seed,
        "device": description(run.arithmetic),
        "versions": versions(),
        "notes": run.notes,
        "warnings": run.warnings,
    }


def as_reference(given: "Perplexity | str | Path | None") -> Perplexity | None:
    """Returns a language model that rates texts, from its directory or its Hub name."""
    return Perplexity.load(given) if isinstance(given, str | Path) else given


def hashes(data: Dataset) -> Tensor:
    """Returns a number for each example, (n,), int64, equal for equal examples."""
    plain = [each if isinstance(each, bytes) else repr(each).encode() for each in data.identities()]
    numbers = [int.from_bytes(hashlib.sha256(each).digest()[:8], signed=True) for each in plain]
    return torch.tensor(numbers, dtype=torch.int64)


def _check_guard(guard: Guard, clean: Dataset, reference: "Perplexity | str | Path | None") -> Perplexity | None:
    """Refuse a guard for other data, or without the language model that it needs; returns that model."""
    if not isinstance(clean, Dataset):
        raise UnbackdoorError(
            f"fit_guard takes clean as a Dataset, got {type(clean).__name__}. Load it with unbackdoor.Dataset.load."
        )
    entry = entry_of(guard, REGISTRY)
    if entry is not None and clean.modality not in entry.modality:
        raise UnbackdoorError(
            f"The guard {entry.name} serves {', '.join(entry.modality)}, and {printable(clean.name)} holds "
            f"{clean.modality}. Take another guard (unbackdoor list guards)."
        )
    needs = entry is not None and Need.REFERENCE in entry.needs
    if needs and reference is None:
        raise UnbackdoorError(f"{owner_of(guard)} needs `reference`, a causal language model that rates texts.")
    if entry is not None and not needs and reference is not None:
        raise UnbackdoorError(f"{owner_of(guard)} takes no `reference`. Leave it out.")
    return as_reference(reference)


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
    found = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(found, type) and hasattr(found, "measure") and hasattr(found, "scores")):
        raise UnbackdoorError(
            f"{folder} names the guard {printable(name)}, which is not one of unbackdoor's own and is not imported "
            "here. Load it in Python, after importing its class."
        )
    return found
