"""`stress`: attack a purified model once more."""

import json
import logging
import sys

from unbackdoor import _reports
from unbackdoor._artifacts import directories
from unbackdoor._artifacts.record import last_name, write_record
from unbackdoor._cli.commands.inputs import (
    base_of,
    free_place,
    load_control,
    load_dataset,
    load_model,
    show_first_prompt,
)
from unbackdoor._cli.options import StressOptions
from unbackdoor._cli.parameters import with_options
from unbackdoor._data.overlap import without
from unbackdoor._errors import SENTENCE, IncompleteError, UnbackdoorError, printable
from unbackdoor._models import calling
from unbackdoor._poisoning.attack_file import load_trigger
from unbackdoor._stress.stress import stress as stress_model

logger = logging.getLogger("unbackdoor")


def stress(source: str, options: StressOptions) -> None:
    """The `stress` command."""
    inputs = (source, options.victim, options.clean, options.attack, options.data, options.control, options.base)
    out, earlier = (None, None) if options.out is None else free_place(options.out, inputs, options)
    if options.base is not None and not any(base_of(each, options) for each in (source, options.victim)):
        raise UnbackdoorError("--base is for adapters of a language model, but MODEL is whole. Leave it out.")
    counts, trigger = _counts(options.k), load_trigger(options.attack)
    model, encode = load_model(source, options)
    victim = load_model(options.victim, options).model
    control = load_control(options.control, options)
    classes = calling.class_names(model)
    clean = load_dataset(options.clean, encode, options, classes, augment=options.augment)
    show_first_prompt(clean)
    test = None if options.data is None else load_dataset(options.data, encode, options, classes)
    result = stress_model(
        model,
        victim=victim,
        clean=clean,
        attack=trigger,
        test=test and without(test, clean),
        control=control and control.model,
        control_encode=control and control.encode,
        parts=tuple(part.strip() for part in options.parts.split(",") if part.strip()),
        counts=counts,
        seed=options.seed,
        seeds=options.seeds,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
        progress=True,
    )
    result.record.update(with_options(result.record, "stress"))
    names = {"model": source, "victim": options.victim, "control": options.control}
    models = {key: name and last_name(name) for key, name in names.items()}
    content = {**models, **result.to_json()}
    if out is not None:
        with directories.directory(out, earlier) as folder:
            page = _reports.build_stress(result, models, clean.classes)
            (folder / "stress.html").write_text(_reports.render_stress(page), encoding="utf-8")
            write_record(folder / "stress.json", content)
    lost = None if result.record["usable"] else result.record["warnings"][0]
    if lost is not None:
        print(lost, file=sys.stderr if options.json else sys.stdout)
    print(json.dumps(content, indent=2) if options.json else result)
    if out is not None and not options.json:
        shown = printable(out, SENTENCE)
        print(f"Wrote {shown} after {content['seconds']:.0f} s; open {shown}/stress.html.")
    if lost is not None:
        raise IncompleteError(f"{printable(source)} is not usable; see the first line above.")


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UnbackdoorError(f"--k must be whole numbers of at least 1 with commas between, got {text}.") from None
