"""`purify`: remove a backdoor with a few clean examples."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from torch import nn

from unbackdoor import _reports
from unbackdoor._artifacts import card, directories
from unbackdoor._artifacts.card import LOSSES, MEASURES
from unbackdoor._artifacts.record import failed, handed_back, last_name, write_record
from unbackdoor._cli.commands.inputs import (
    base_of,
    factory_name,
    free_place,
    load_control,
    load_dataset,
    load_model,
    show_first_prompt,
)
from unbackdoor._cli.commands.outcome import not_usable, propose_control
from unbackdoor._cli.commands.stream import purify_on_disk
from unbackdoor._cli.options import PurifyOptions
from unbackdoor._cli.parameters import with_options
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.overlap import without
from unbackdoor._errors import SENTENCE, UnbackdoorError, printable
from unbackdoor._models import calling, loading, saving
from unbackdoor._models.adapters import carries_adapter
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.recorded import encode_entry
from unbackdoor._progress import bar
from unbackdoor._purification.method import Method, asking, method_name, needs_clean, uses_unlabelled
from unbackdoor._purification.purify import Purified, judged
from unbackdoor._purification.purify import purify as purify_model
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.generation_score import GenerationScore
from unbackdoor._tasks.image_text_score import ImageTextScore
from unbackdoor._tasks.score import Score
from unbackdoor._tasks.task import Asked, Task
from unbackdoor._value import check_seed

logger = logging.getLogger("unbackdoor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """The data and the control that suspect and result are scored with.

    Args:
        test: examples without a trigger that the method does not see.
        attacked: the same examples with the trigger; None without --attack and --trigger.
        classes: number of classes; of a language model, that of its tokens.
        control: a model that was never poisoned, or None.
        task: task of the models.
    """

    test: Dataset
    attacked: Any
    classes: int
    control: loading.Loaded | None
    task: Task

    def of(self, model: nn.Module, options: PurifyOptions) -> Any:
        """The score of a model."""
        return self.task.score(
            model,
            self.test,
            self.attacked,
            choose(model, options.device, options.precision),
            control=self.control and self.control.model,
            control_encode=self.control and self.control.encode,
        )


def purify(source: str, method: Method, options: PurifyOptions, *, command: str | None = None) -> None:
    """The `purify` command; `command` is the typed line, for the record and the page."""
    paths = (
        *(options.clean, options.unlabelled, options.base, options.proxy),
        *(options.data, options.attack, options.control),
    )
    out, earlier = free_place(options.out, (source, *paths), options)
    check_seed(options.seed)
    for name in ("attack", "trigger"):
        if getattr(options, name) is not None and options.data is None:
            raise UnbackdoorError(f"--{name} needs --data: test examples to put the trigger on.")
    if options.control is not None and options.attack is None and options.trigger is None:
        raise UnbackdoorError("--control needs --attack: it counts flips on triggered examples.")
    if options.stream:
        if options.merge:
            raise UnbackdoorError("--stream mixes whole models on disk, and does not take --merge. Leave one out.")
        purify_on_disk(source, method, options, command)
        return
    suspect = load_model(source, options, merge=options.merge)
    if carries_adapter(suspect.model) and suspect.encode.modality == "text":
        raise UnbackdoorError(
            f"{printable(source)} is an adapter of a classifier, whose head would not be purified with it. Add it to "
            "its base first, with --merge."
        )
    clean = _clean(suspect, method, options)
    unlabelled = _unlabelled(suspect, method, options)
    base = options.base and loading.load_base(
        options.base,
        factory=options.factory,
        modality=suspect.encode.modality,
        trust_remote_code=options.trust_remote_code,
    )
    proxy = options.proxy and load_model(options.proxy, options).model
    scoring = _scoring(suspect, [data for data in (clean, unlabelled) if data is not None], options)
    result = purify_model(
        suspect.model,
        clean,
        method,
        seed=options.seed,
        head=options.head,
        device=options.device,
        precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
        base=base or None,
        proxy=proxy or None,
        unlabelled=unlabelled,
        progress=True,
    )
    example = clean if scoring is None else scoring.test
    record = _record(result, source, options, command) | {"encode": encode_entry(suspect.encode, example)}
    scores = None if scoring is None else _measure(scoring, suspect.model, result, method, options, record)
    record |= with_options(record, "purify")
    page = None
    if scoring is not None and scores is not None:
        page = _page(scoring, scores, suspect.model, result, method, record)
    with directories.directory(out, earlier) as folder:
        saving.save(result.model, folder, source=suspect.directory or Path(source), encode=suspect.encode)
        (folder / "README.md").write_text(card.purified(record), encoding="utf-8")
        if page is not None:
            (folder / "report.html").write_text(page, encoding="utf-8")
        write_record(folder / "record.json", record)
        saving.check_saved(
            folder,
            result.model,
            suspect.encode,
            example,
            factory=options.factory,
            base=None if options.merge else base_of(source, options),
            trust_remote_code=options.trust_remote_code,
        )
    _print_result(record, out, method_name(method), has_page=page is not None)


def _record(result: Purified, source: str, options: PurifyOptions, command: str | None) -> dict[str, Any]:
    """The record as far as it is known without scores."""
    return {
        **result.record,
        **({} if command is None else {"command": command}),
        "source": {
            "model": last_name(source),
            **({"base": last_name(options.base)} if options.base else {}),
            **({"merged": True} if options.merge else {}),
            "factory": factory_name(options.factory),
        },
        "scores": None,
        "scores_note": "not measured: no --data was given",
    }


def _clean(suspect: loading.Loaded, method: Method, options: PurifyOptions) -> Dataset | None:
    if options.clean is not None:
        classes = calling.class_names(suspect.model)
        clean = load_dataset(options.clean, suspect.encode, options, classes, augment=options.augment)
        show_first_prompt(clean)
        return clean
    if needs_clean(method):
        besides = "" if options.unlabelled is None else " Those of --unlabelled come on top of these."
        raise UnbackdoorError(
            f"{asking(method)} needs --clean: labelled examples of the suspect's task without a trigger.{besides}"
        )
    return None


def _unlabelled(suspect: loading.Loaded, method: Method, options: PurifyOptions) -> Dataset | None:
    if options.unlabelled is None:
        return None
    if not uses_unlabelled(method):
        raise UnbackdoorError(
            f"{method_name(method)} uses no --unlabelled examples. Leave them out, or take scale-invariant-fst."
        )
    return load_dataset(options.unlabelled, suspect.encode, options, calling.class_names(suspect.model), labelled=False)


def _scoring(suspect: loading.Loaded, used: list[Dataset], options: PurifyOptions) -> Scoring | None:
    """Reads what is scored; examples that the method uses are left out."""
    control = load_control(options.control, options)
    task = task_of(suspect.encode, max_new_tokens=options.max_new_tokens, progress=bar)
    asked = Asked(attack=options.attack, trigger=options.trigger, behaviour=options.behaviour)
    task.check_asked(asked)
    if options.data is None:
        return None
    test = load_dataset(options.data, suspect.encode, options, calling.class_names(suspect.model))
    for examples in used:
        test = without(test, examples)
    fitting = task.checked(suspect.model, test)
    attacked = task.attacked(fitting, asked)
    task.check_room(suspect.model, attacked)
    if control is not None:
        task.check_control(control.model, fitting.test, control.encode, fitting.classes)
        task.check_room(control.model, attacked, control.encode)
    return Scoring(test=fitting.test, attacked=attacked, classes=fitting.classes, control=control, task=task)


def _measure(
    scoring: Scoring,
    suspect: nn.Module,
    result: Purified,
    method: Method,
    options: PurifyOptions,
    record: dict[str, Any],
) -> tuple[Any, Any]:
    """Score suspect and result, and add that to the record."""
    before, after = (scoring.of(model, options) for model in (suspect, result.model))
    if record["usable"] is None:
        arithmetic = choose(suspect, options.device, options.precision)
        record |= judged(result, suspect, scoring.test, method, arithmetic)
    if options.clean is None or not isinstance(before, Score):
        doubt = scoring.task.doubt("the suspect", before, scoring.classes, scoring.test.name)
        if doubt is not None:
            record["warnings"].append(doubt)
            logger.warning(doubt)
    record["scores"] = {"suspect": before.to_json(), "purified": after.to_json()}
    record["scores_note"] = f"on {len(scoring.test):,} examples that the method never saw"
    if isinstance(before, Score):
        propose_control(before, scoring.classes)
    return before, after


def _page(
    scoring: Scoring,
    scores: tuple[Any, Any],
    suspect: nn.Module,
    result: Purified,
    method: Method,
    record: dict[str, Any],
) -> str | None:
    """Returns report.html; None for a model of images and texts, whose numbers are in the record and the card."""
    before, after = scores
    if isinstance(before, ImageTextScore):
        return None
    name = method_name(method)
    if isinstance(before, GenerationScore):
        return _reports.render_answers(
            _reports.build_answers(
                f"Purified by {name}",
                [_reports.Answering("suspect", suspect, before), _reports.Answering(name, result.model, after)],
                scoring.test,
                scoring.attacked,
                record,
            )
        )
    done = "Purified"
    if failed(record):
        done = "Handed back" if handed_back(record) else "Not purified"
    page = _reports.build(
        title=f"{done} by {name}",
        contenders=[
            _reports.Contender("suspect", suspect, before, None),
            _reports.Contender(name, result.model, after, record["seconds"]),
        ],
        test=scoring.test,
        attacked=scoring.attacked,
        record=record,
    )
    return _reports.render(page)


def _print_result(record: dict[str, Any], out: Path, name: str, *, has_page: bool) -> None:
    """Print the outcome.

    Raises:
        IncompleteError: the model is not usable, is the suspect as it was, or did not pass its tests.
    """
    scores = record["scores"]
    if record["usable"] is False:
        print(record["warnings"][0])
    if scores is not None:
        _print_change(scores, name)
    elif record["clean"] is not None:
        figure, form = ("accuracy", ".1%") if "suspect_accuracy_on_clean" in record else ("clean_loss", ".3f")
        first, last = (record[f"{each}_{figure}_on_clean"]["value"] for each in ("suspect", "purified"))
        loss = "loss " * (figure == "clean_loss")
        print(f"On the clean examples themselves: {loss}{first:{form}} before, {last:{form}} after.")
    shown = printable(out, SENTENCE)
    page = f"; open {shown}/report.html." if has_page else "."
    print(f"Wrote {shown} in {record['seconds']:.1f} s of tuning{page}")
    if record["usable"] is False:
        raise not_usable(out, record)


def _print_change(scores: dict[str, Any], name: str) -> None:
    before, after = scores["suspect"], scores["purified"]
    labels = {key: key.replace("_", " ").replace("flip rate", "flips") for key in MEASURES if key in before}
    width = max(20, *(len(label) + 2 for label in labels.values()))
    print(f"{'':{width}}{'suspect':>10}  {name:>12}")
    for key, label in labels.items():
        form = ".3f" if key in LOSSES else ".1%"
        values = f"{before[key]['value']:>10{form}}  {after[key]['value']:>12{form}}"
        print(f"{label:{width}}{values}   n = {after[key]['n']:,}")
