"""`audit`: the one place that splits, seeds, times, judges and records. Detectors do none of it."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._artifacts.machine import versions
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.overlap import distinct, others_than
from unbackdoor._detection.finding import Detector, Finding
from unbackdoor._detection.judging import HeldOut
from unbackdoor._detection.nulls import Null, null_for, operating_point
from unbackdoor._detection.outliers import LEAST_CLASSES, outlier_p_values
from unbackdoor._detection.prompt_judging import HeldOutPrompts, with_room
from unbackdoor._detection.result import Audit, JudgedCandidate, JudgedFinding, Verdict
from unbackdoor._errors import SENTENCE, UnbackdoorError, listed, out_of_memory, printable
from unbackdoor._models.arithmetic import Precision, choose, description
from unbackdoor._models.calling import (
    check_modules,
    class_names,
    embeddings,
    evaluating,
    logits,
    needing_gradients,
    probe,
)
from unbackdoor._models.linear_heads import exchange_head_
from unbackdoor._models.matching import matched
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._modes import in_own_modes
from unbackdoor._progress import Progress, bar, part, silent
from unbackdoor._purification.form import working_copy
from unbackdoor._purification.run import Run
from unbackdoor._registry.detectors import REGISTRY
from unbackdoor._registry.entries import Entry, Need, entry_of, name_of
from unbackdoor._tasks.choice import answered, task_of
from unbackdoor._tasks.classification import CLASSIFICATION
from unbackdoor._tasks.generation import Generation, answer_loss, chance_loss, chance_sentence
from unbackdoor._tasks.generation_score import AnswerLoss
from unbackdoor._tasks.proportion import Proportion, chance_doubt, proportion_of
from unbackdoor._tasks.task import Task
from unbackdoor._training.lora import factors, merged
from unbackdoor._value import check_seed, fields_of

logger = logging.getLogger("unbackdoor")


@in_own_modes
def audit(
    model: nn.Module,
    clean: Dataset | None = None,
    *,
    detectors: Sequence[Detector] | None = None,
    unlabelled: Dataset | None = None,
    base: nn.Module | None = None,
    seed: int = 0,
    head: str | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> Audit:
    """Search a suspect for shortcuts: triggers that move examples of other classes to one class.

    Each detector searches on one half of the clean examples. Its finding is judged on the other half, and compared
    with what the same search finds in clean models. The model and the global random state are not changed.

    Args:
        model: any classifier whose last layer is linear, a causal language model, or a model of images and texts.
        clean: labelled examples without a trigger, at least 2 of each class; or prompts with their answers. Without
            labelled examples the detectors run that need no labels, on the unlabelled ones. Pairs need no labels.
        detectors: of `unbackdoor.detectors`, or any callables like them; None runs all that fit the data.
        unlabelled: further examples, whose labels are not read; a few may carry a trigger.
        base: the pre-trained model that the suspect came from, for detectors that need it.
        seed: of all random draws; on one CPU the same seed gives the same verdict.
        head: name of the last linear layer, if it cannot be found by running the model.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: model, base and data do not fit each other, or there are too few examples.
    """
    _check_arguments(model, clean, unlabelled, base, seed)
    start = time.perf_counter()
    working = _working(model, base)
    arithmetic = choose(working, device, precision)
    run = Run(
        generator=torch.Generator().manual_seed(seed),
        arithmetic=arithmetic,
        head_name=head or "",
        progress=bar if progress else silent,
        base=base,
        adapter=factors(model),
        unlabelled=unlabelled if unlabelled is None or clean is None else others_than(unlabelled, clean),
        task=_task(clean, unlabelled),
    )
    examples = (_prompts if isinstance(run.task, Generation) else _examples)(working, clean, unlabelled, run, head)
    searching, judging = _halves(examples, seed)
    record = {**_facts(examples, searching, judging, unlabelled), "seed": seed, "device": description(arithmetic)}
    chosen, not_searched = _chosen(detectors, examples, run)
    if examples.doubt is not None:
        skipped = {**{name: "the suspect's answers may be chance" for name, _ in chosen}, **not_searched}
        record |= {"notes": run.notes, "seconds": round(time.perf_counter() - start, 3)}
        return Audit(verdict="cannot-judge", reason=examples.doubt, not_searched=skipped, record=record)
    _foretell(chosen, run.modality, _arch(model), len(examples.per_class))
    with torch.random.fork_rng(devices=[arithmetic.device] if arithmetic.device.type == "cuda" else []):
        torch.manual_seed(seed)
        arithmetic.place(working)
        searches, refused = _searched(chosen, working, searching, run, not_searched, detectors is not None)
        held_out = (HeldOutPrompts if run.modality == "conversations" else HeldOut.of)(working, judging, arithmetic)
        settings = {name: search.settings for name, search in searches.items()}
        null = null_for(run.modality, _arch(model), len(examples.per_class), settings) if searches else None
        findings = [_judged(name, each, held_out, null, run.progress) for name, each in searches.items()]
    findings.sort(key=lambda each: (each.strongest.p_value is None, -each.strongest.score))
    compared = len(examples.per_class) if run.modality == "images" else 0  # classes, with each other
    verdict, reason = _verdict(findings, null, compared, refused)
    point = None if null is None else operating_point(run.modality, {name: settings[name] for name in null.detectors})
    if point is not None:
        record |= {"operating_point": point, "operating_point_note": ""}
    return Audit(
        verdict=verdict,
        reason=reason,
        findings=tuple(findings),
        not_searched=not_searched,
        calibration=null,
        record={**record, "notes": run.notes, "seconds": round(time.perf_counter() - start, 3)},
        held_out=held_out,
    )


def _check_arguments(model: object, clean: object, unlabelled: object, base: object, seed: int) -> None:
    """Refuse what is not a seed, examples, a model with finite weights, or a base of the same kind."""
    check_seed(seed)
    for name, examples in (("clean", clean), ("unlabelled", unlabelled)):
        if examples is not None and not isinstance(examples, Dataset):
            raise UnbackdoorError(
                f"audit takes {name} as a Dataset, got {type(examples).__name__}. Load it with unbackdoor.Dataset.load."
            )
    if clean is None and unlabelled is None:
        raise UnbackdoorError(
            "audit needs `clean`, labelled examples without a trigger, or at least `unlabelled` ones."
        )
    check_modules("audit", model=model, base=base)
    assert isinstance(model, nn.Module)
    check_finite(model.state_dict(), type(model).__name__)


def _working(model: nn.Module, base: nn.Module | None) -> nn.Module:
    """A copy to search in; the matrices of an adapter are added to it. A base of another kind is refused."""
    working = working_copy(model)
    working = (merged(working) if hasattr(working, "peft_config") else working).eval()
    if base is not None:
        ours, theirs = ({name: tensor.shape for name, tensor in each.state_dict().items()} for each in (working, base))
        matched(ours, theirs)
    return working


def _task(clean: Dataset | None, unlabelled: Dataset | None) -> Task:
    """The task of the model, by its examples."""
    data = unlabelled if clean is None else clean
    assert data is not None
    return task_of(data.encode)


class _Examples(NamedTuple):
    """The examples that are searched and judged on.

    Args:
        data: the clean examples; or the unlabelled ones, each with the suspect's answer as its label.
        labelled: whether the labels are true ones.
        accuracy: of the suspect on them; None without true labels.
        per_class: the number of examples of each class; none for prompts.
        doubt: a sentence, if the suspect is near chance, so that nothing can be judged; else None.
        loss: of a language model on the answers; None for classifiers.
    """

    data: Dataset
    labelled: bool
    accuracy: Proportion | None
    per_class: tuple[int, ...]
    doubt: str | None
    loss: AnswerLoss | None = None


def _examples(
    model: nn.Module, clean: Dataset | None, unlabelled: Dataset | None, run: Run, head: str | None
) -> _Examples:
    """The examples of an audit, checked; fills in what the run did not know yet."""
    examples = unlabelled if clean is None else clean
    assert examples is not None
    examples = distinct(examples, run.note)
    if head is None and run.task is CLASSIFICATION:
        exchange_head_(model, examples)
    labelled = clean is not None and (clean.has_labels or clean.modality != "image-text")
    data = examples if labelled else _answered(model, examples, run)
    examined = run.task.examined(model, data, run.arithmetic, lambda _: None, head, headless=True)
    run.head_name, run.modality = examined.head_name, data.modality
    if not labelled:
        run.note(
            "Without labels nothing says how well the model does its task: if its preprocessing is not the one that it "
            "was trained with, the verdict means nothing."
        )
        return _Examples(examined.clean, False, None, examined.per_class, None)
    accuracy = proportion_of(examined.outcomes)
    doubt = chance_doubt("the suspect", accuracy, len(examined.per_class), examples.name)
    return _Examples(examined.clean, True, accuracy, examined.per_class, doubt and _sentence(doubt))


def _answered(model: nn.Module, data: Dataset, run: Run) -> Dataset:
    """Examples without labels, each with the suspect's answer as its label."""
    if data.modality == "image-text":
        run.task.checked(model, data)
        names = class_names(model) or data.classes or tuple(data.pair_encoder.prompts.texts)
        if not names:
            raise UnbackdoorError(
                f"audit sees by prompts which class an image moves to, but {data.name} has no labels and the model no "
                "class names. Give `prompts` as a JSON file with a text for each class, or a column of labels."
            )
        data = replace(data, classes=names)
    answers = answered(model, data, run.arithmetic)
    if len(answers.unique()) == 1:
        raise UnbackdoorError(
            f"audit needs examples of several classes, but the model takes all of {data.name} for "
            f"{data.class_name(int(answers[0]))}. Give other examples, or look at the preprocessing."
        )
    return replace(data, labels=answers.to(data.labels.device))


def _prompts(
    model: nn.Module, clean: Dataset | None, unlabelled: Dataset | None, run: Run, head: str | None
) -> _Examples:
    """The prompts of an audit, checked; fills in what the run did not know yet."""
    if clean is None:
        raise UnbackdoorError("audit needs `clean` for a language model: prompts with their answers.")
    examined = run.task.examined(model, clean, run.arithmetic, lambda _: None, head)
    run.head_name, run.modality = examined.head_name, clean.modality
    loss = answer_loss(examined.outcomes, examined.clean)
    doubt = None
    if loss.value > chance_loss(embeddings(model).num_embeddings):
        doubt = chance_sentence("the suspect", loss, clean.name)
    different = distinct(examined.clean, run.note)
    data = with_room(different)
    if len(data) < 2:
        raise UnbackdoorError(
            f"audit needs at least 2 prompts, one to search on and one to judge on, but {clean.name} has {len(data)}. "
            "Add clean prompts."
        )
    if len(data) < len(different):
        run.note(
            f"{len(different) - len(data):,} of {len(different):,} rows leave no room for a trigger and are not used."
        )
    return _Examples(data, True, None, (), doubt and _sentence(doubt), loss)


def _sentence(text: str) -> str:
    return printable(text[0].upper() + text[1:], SENTENCE)


def _halves(examples: _Examples, seed: int) -> tuple[Dataset, Dataset]:
    """The examples to search on, and those to judge on; each half has its share of each class."""
    clean, per_class = examples.data, examples.per_class
    scarce = min(range(len(per_class)), key=lambda label: per_class[label], default=0)
    if examples.labelled and per_class and per_class[scarce] < 2:
        raise UnbackdoorError(
            f"audit needs at least 2 clean examples of each class, one to search on and one to judge on, but "
            f"{clean.name} has {per_class[scarce]} of class {clean.class_name(scarce)}. Add clean examples."
        )
    return clean.split(len(clean) // 2, seed=seed)


def _facts(examples: _Examples, searching: Dataset, judging: Dataset, unlabelled: Dataset | None) -> dict[str, Any]:
    """The entries of `audit.json` about the examples and the software."""
    numbers = {"n": len(examples.data), "searched_on": len(searching), "judged_on": len(judging)}
    return {
        "examples": {**numbers, "labelled": examples.labelled},
        "unlabelled": None if unlabelled is None else len(unlabelled),
        "classes": len(examples.per_class),
        "suspect_accuracy_on_clean": None if examples.accuracy is None else examples.accuracy.to_json(),
        **({} if examples.loss is None else {"suspect_clean_loss_on_clean": examples.loss.to_json()}),
        "versions": versions(),
    }


def _chosen(
    detectors: Sequence[Detector] | None, examples: _Examples, run: Run
) -> tuple[list[tuple[str, Detector]], dict[str, str]]:
    """The detectors to run, by name, and why the others are not."""
    if detectors is not None:
        _check_detectors(detectors)
        named = [(name_of(detector, REGISTRY), detector) for detector in detectors]
        names = [name for name, _ in named]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UnbackdoorError(
                f"audit takes one value of each detector, got {names.count(twice)} of {twice}. Audit once for each."
            )
        for name, detector in named:
            entry = entry_of(detector, REGISTRY)
            obstacle = None if entry is None else _obstacle(entry, examples, run)
            if obstacle is not None:
                raise UnbackdoorError(f"The detector {name} cannot run: {obstacle}. Leave it out.")
        asked = {name for name, _ in named}
        return named, {entry.name: "it was not asked for" for entry in REGISTRY if entry.name not in asked}
    obstacles = {entry.name: _obstacle(entry, examples, run) for entry in REGISTRY}
    for entry in REGISTRY:
        if entry.on_request and obstacles[entry.name] is None:
            obstacles[entry.name] = "it runs only if it is asked for, since no clean models were measured with it"
    chosen = [(entry.name, entry.resolve()()) for entry in REGISTRY if obstacles[entry.name] is None]
    return chosen, {name: obstacle for name, obstacle in obstacles.items() if obstacle is not None}


def _check_detectors(detectors: object) -> None:
    """Refuse what is no sequence of detectors' values."""
    if isinstance(detectors, str) or not isinstance(detectors, Sequence):
        raise UnbackdoorError(f"audit takes detectors as a list, got {detectors!r}. Write them in brackets.")
    for detector in detectors:
        if isinstance(detector, type):
            raise UnbackdoorError(
                f"audit takes a detector's value, got the class {detector.__name__}. Write {detector.__name__}()."
            )
        if not callable(detector):
            raise UnbackdoorError(
                f"audit takes a detector's value, got {detector!r}. Take one of unbackdoor.detectors."
            )


def _obstacle(entry: Entry, examples: _Examples, run: Run) -> str | None:
    """Why a detector cannot run on these examples; None if it can."""
    data = examples.data
    if data.modality not in entry.modality:
        return f"it searches {', '.join(entry.modality)}, and {printable(data.name)} holds {data.modality}"
    if Need.BASE in entry.needs and run.base is None:
        return "it needs `base`, the pre-trained model that the suspect came from, which was not given"
    if Need.CLEAN in entry.needs and not examples.labelled:
        return "it needs `clean`, labelled examples, and only unlabelled ones were given"
    if Need.ADAPTER in entry.needs and not run.adapter:
        return "it looks at the matrices of a LoRA adapter, and the suspect is a whole model"
    return None


def _settings(detector: Detector) -> dict[str, Any]:
    return fields_of(detector) if hasattr(detector, "__dataclass_fields__") else {}


def _foretell(chosen: list[tuple[str, Detector]], modality: str, arch: str, classes: int) -> None:
    """Say before searches that may take hours that nothing will judge what they find."""
    settings = {name: _settings(detector) for name, detector in chosen}
    if chosen and null_for(modality, arch, classes, settings) is None:
        logger.info(
            "no clean models of this kind were measured with these detectors, so whatever they find, the audit shows "
            "it and cannot judge how unusual it is."
        )


class _Search(NamedTuple):
    """The result of a detector, with all its settings and the seconds that it took."""

    finding: Finding
    settings: dict[str, Any]
    seconds: float


def _check_passes_gradients(model: nn.Module, clean: Dataset) -> None:
    """Refuse a model of images through which no gradient flows: all searches would find nothing.

    Raises:
        UnbackdoorError: says how to change it.
    """
    inputs = probe(model, clean)
    assert isinstance(inputs, Tensor)
    with needing_gradients(model), evaluating(model), torch.enable_grad():
        scores = logits(model, inputs.requires_grad_())
        if torch.autograd.grad(scores.sum(), inputs, allow_unused=True)[0] is None:
            raise RuntimeError("the inputs lead to no score: it does not require grad")


def _searched(
    chosen: list[tuple[str, Detector]],
    model: nn.Module,
    clean: Dataset,
    run: Run,
    not_searched: dict[str, str],
    asked: bool,
) -> tuple[dict[str, _Search], list[str]]:
    """The result of each detector, and the names of those that were asked for and cannot run.

    Raises:
        UnbackdoorError: of those asked for none can run, or the model passes no gradients.
    """
    clean = clean.to(run.arithmetic.device)
    searches: dict[str, _Search] = {}
    refusals: dict[str, UnbackdoorError] = {}
    if clean.modality == "images":
        _check_passes_gradients(model, clean)
    shown = run.progress
    for place, (name, detector) in enumerate(chosen, start=1):
        start = time.perf_counter()
        run.progress = part(shown, f"{name} ({place} of {len(chosen)})")
        # Each detector has its own draws, so that leaving one out does not change the others.
        run.generator = torch.Generator().manual_seed(run.seed)
        try:
            with needing_gradients(model):
                finding = detector(model, clean, run)
        except UnbackdoorError as problem:
            not_searched[name], refusals[name] = str(problem), problem
            continue
        except (MemoryError, RuntimeError) as problem:  # the work of the other detectors may be that of hours
            if not out_of_memory(problem) or len(chosen) == 1:
                raise
            reason = "it ran out of memory; take a smaller `image_size`, or another `device`"
            not_searched[name], refusals[name] = reason, UnbackdoorError(f"{name} cannot run: {reason}.")
            continue
        if not finding.candidates:
            not_searched[name] = finding.note or "it found nothing that could be judged"
            continue
        if finding.note:
            run.note(finding.note)
        searches[name] = _Search(finding, _settings(detector), round(time.perf_counter() - start, 3))
    run.progress = shown
    if asked and refusals and not searches:
        raise next(iter(refusals.values()))
    return searches, list(refusals) if asked else []


def _judged(
    name: str, search: _Search, held_out: HeldOut | HeldOutPrompts, null: Null | None, progress: Progress
) -> JudgedFinding:
    """A detector's finding, judged on the held-out examples and against clean models."""
    candidates = search.finding.candidates
    compared = null if null is not None and name in null.detectors else None
    among_classes = outlier_p_values(torch.tensor([candidate.strength for candidate in candidates]))
    judged = []
    with progress(f"judging {name}", len(candidates)) as advance:
        for place, candidate in enumerate(candidates):
            moved, random = held_out.judged(candidate)
            each = JudgedCandidate(
                candidate=candidate,
                target_name=printable(candidate.name) or held_out.data.class_name(candidate.target),
                source_names=tuple(map(held_out.data.class_name, candidate.sources)),
                moved=moved,
                random=random,
                nominal_p=float(among_classes[place]) if candidate.nominal_p is None else candidate.nominal_p,
                p_value=None,
            )
            judged.append(each if compared is None else replace(each, p_value=compared.p_value(each.score)))
            advance()
    return JudgedFinding(
        detector=name,
        classes=tuple(judged),
        unit=search.finding.unit,
        looks_natural=None,
        settings=search.settings,
        seconds=search.seconds,
        targets=search.finding.targets,
    )


def _verdict(findings: list[JudgedFinding], null: Null | None, classes: int, missing: list[str]) -> tuple[Verdict, str]:
    """The verdict and its reason; `missing` are detectors that were asked for and could not run."""
    alarms = [finding for finding in findings if finding.alarm]
    if alarms:
        # A trigger can be repeated, so one that has it goes before one that only names a class.
        first = next((finding for finding in alarms if finding.strongest.moved is not None), alarms[0])
        strongest = first.strongest
        rare = f"by {first.detector} (p = {strongest.p_value:.3f})"
        if strongest.moved is None:
            return "shortcut-found", (
                f"Signs of a shortcut to class {strongest.target_name} were found {rare}, without a trigger for it."
            )
        return "shortcut-found", (
            f"A shortcut to class {strongest.target_name} that moves {strongest.moved.value:.1%} of unseen examples "
            f"was found {rare}."
        )
    if not findings:
        return "cannot-judge", "No detector could run."
    if null is None:
        few = f" Among {classes} classes none can stand out either." if 0 < classes < LEAST_CLASSES else ""
        return "cannot-judge", (
            f"There are no statistics of clean models for these detectors and this kind of model, so nothing says how "
            f"unusual the shortcuts below are.{few}"
        )
    reason = "No shortcut was found that clean models do not have as well."
    unknown = [finding.detector for finding in findings if finding.strongest.p_value is None]
    if unknown:
        reason += f" How rare those of {', '.join(unknown)} are in clean models is not known, so they do not count."
    if missing:
        return "cannot-judge", f"{reason} But {listed(missing)} could not search, and was asked to."
    return "nothing-found", reason


def _arch(model: nn.Module) -> str:
    """The kind of a network: the `model_type` of its config, or the name of its class."""
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", type(model).__name__))
