"""What the commands do, in the order in which they do it: check, load, work, score, write."""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

from unbackdoor import _reports
from unbackdoor._artifacts import card, directories
from unbackdoor._cli.options import AttackOptions, EvaluateOptions, ModelOptions, PurifyOptions, StressOptions
from unbackdoor._data.classes import check_labels, tell_order
from unbackdoor._data.dataset import Augment, Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.overlap import without
from unbackdoor._errors import SENTENCE, IncompleteError, UnbackdoorError, printable
from unbackdoor._evaluation.evaluate import evaluate as evaluate_model
from unbackdoor._mixing.stream import purify_stream
from unbackdoor._models import calling, loading, saving
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._poisoning.attack_file import as_trigger, load_trigger, victim_of
from unbackdoor._poisoning.triggered import triggered
from unbackdoor._purification.method import Method, asking, method_name, needs_clean
from unbackdoor._purification.purify import judged
from unbackdoor._purification.purify import purify as purify_model
from unbackdoor._registry.entries import to_json
from unbackdoor._registry.purifiers import REGISTRY
from unbackdoor._stress.stress import stress as stress_model
from unbackdoor._tasks.classification import score
from unbackdoor._tasks.proportion import chance_doubt
from unbackdoor._tasks.score import Score
from unbackdoor._value import check_seed, value
from unbackdoor._victims.directory import write_victim
from unbackdoor._victims.implanted import IMPLANTED
from unbackdoor._victims.plant import Victim, needs_test, plant, recorded
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor._victims.training import no_base
from unbackdoor.purifiers.e_pur import EPUR
from unbackdoor.purifiers.fine_mixing import FineMixing

logger = logging.getLogger("unbackdoor")


@value
class NoAttack:
    """No attack: a clean model by the same recipe, the control for everything else.

    Differences from the paper: none; there is no paper.
    """


def purify(source: str, method: Method, options: PurifyOptions, *, command: str | None = None) -> None:
    """The `purify` command; `command` is what was typed, for the record and the page."""
    out = Path(options.out)
    paths = (options.clean, options.base, options.proxy, options.data, options.attack, options.control)
    inputs = (source, *paths, (options.factory or "").rpartition(":")[0])
    earlier = directories.check_free(
        out, overwrite=options.overwrite, inputs=tuple(Path(given) for given in inputs if given)
    )
    check_seed(options.seed)
    if options.attack is not None and options.data is None:
        raise UnbackdoorError("--attack needs --data: test examples to put the trigger on.")
    if options.control is not None and options.attack is None:
        raise UnbackdoorError("--control needs --attack: it counts flips on triggered examples.")
    if options.stream:
        _purify_stream(source, method, options, command)
        return
    suspect = _load(source, options)
    model, encode = suspect
    classes = calling.class_names(model)
    clean = None
    if options.clean is not None:
        clean = _dataset(options.clean, encode, options, classes, augment=options.augment)
    elif needs_clean(method):
        raise UnbackdoorError(
            f"{asking(method)} needs --clean: labelled examples of the suspect's task without a trigger."
        )
    base = options.base and loading.load_base(
        options.base, factory=options.factory, trust_remote_code=options.trust_remote_code
    )
    proxy = options.proxy and _load(options.proxy, options).model
    control = _control(options.control, options)
    test, attacked, count = None, None, 0
    if options.data is not None:
        test = _dataset(options.data, encode, options, classes)
        test = test if clean is None else without(test, clean)
        count = calling.class_count(model, test)
        check_labels(test, count)
        tell_order(test, classes, count)
        if options.attack is not None:
            attacked = triggered(test, as_trigger(options.attack, test), count)
        if control is not None:
            calling.check_partner("`control`", control.model, test.encoded_by(control.encode), count)

    result = purify_model(
        model,
        clean,
        method,
        seed=options.seed,
        head=options.head,
        device=options.device,
        precision=options.precision,
        base=base or None,
        proxy=proxy or None,
        progress=True,
    )
    record = {
        **result.record,
        **({} if command is None else {"command": command}),
        "source": {
            "model": Path(source).name,
            **({"base": Path(options.base).name} if options.base else {}),
            "factory": _factory_name(options.factory),
        },
        "encode": recorded(encode, test or clean),
        "scores": None,
        "scores_note": "not measured: no --data was given",
    }
    rows: list[_reports.Contender] = []
    if test is not None:
        arithmetic = choose(model, options.device, options.precision)
        before, after = (
            score(
                each,
                test,
                attacked,
                arithmetic,
                control=control and control.model,
                control_encode=control and control.encode,
            )
            for each in (model, result.model)
        )
        if record["usable"] is None:
            record |= judged(result, model, test, method, arithmetic)
        doubt = chance_doubt("the suspect", before.clean_accuracy, count, test.name) if clean is None else None
        if doubt is not None:
            record["warnings"].append(doubt)
            logger.warning(doubt)
        record["scores"] = {"suspect": before.to_json(), "purified": after.to_json()}
        record["scores_note"] = f"on {len(test):,} examples that the method never saw"
        rows = [
            _reports.Contender("suspect", model, before, None),
            _reports.Contender(method_name(method), result.model, after, record["seconds"]),
        ]
    with directories.directory(out, earlier) as folder:
        saving.save(result.model, folder, source=suspect.directory or Path(source), encode=encode)
        (folder / "README.md").write_text(card.purified(record), encoding="utf-8")
        if test is not None:
            page = _reports.build(
                title=f"Purified by {method_name(method)}", contenders=rows, test=test, attacked=attacked, record=record
            )
            (folder / "report.html").write_text(_reports.render(page), encoding="utf-8")
        directories.write_record(folder / "record.json", record)
        saving.check_saved(
            folder,
            result.model,
            encode,
            test or clean,
            factory=options.factory,
            trust_remote_code=options.trust_remote_code,
        )
    if record["usable"] is False:
        print(record["warnings"][0])
    if test is not None:
        _print_change(record["scores"], method_name(method))
        _propose_control(before, count)
    elif record["clean"] is not None:
        first, last = (record[f"{name}_accuracy_on_clean"]["value"] for name in ("suspect", "purified"))
        print(f"On the clean examples themselves: {first:.1%} before, {last:.1%} after.")
    print(f"Wrote {out} in {record['seconds']:.1f} s of tuning" + (f"; open {out}/report.html." if test else "."))
    if record["usable"] is False:
        raise not_usable(out)


def not_usable(out: Path) -> IncompleteError:
    """What the commands end with that wrote a model which lost its use."""
    return IncompleteError(f"{out} is written, but its model is not usable, as is said above.")


def _purify_stream(source: str, method: Method, options: PurifyOptions, command: str | None) -> None:
    """The `purify` command with --stream: mixing alone, on disk."""
    steps: tuple[Any, ...] = getattr(method, "steps", (method,))
    mixing, before = steps[-1], list(steps[:-1])
    fits = (
        isinstance(mixing, FineMixing)
        and not mixing.needs_clean
        and mixing == FineMixing(rho=mixing.rho, mode=mixing.mode, tune=False)
    )
    if not fits or not (not before or (len(before) == 1 and isinstance(before[0], EPUR))):
        raise UnbackdoorError(
            "--stream mixes on disk and tunes nothing: it takes fine-mixing --rho R --no-tune, with e-pur before it or "
            f"not, got {method!r}."
        )
    if options.base is None:
        raise UnbackdoorError("--stream needs --base: the pre-trained model that the suspect came from.")
    used = {"base", "out", "seed", "stream", "overwrite"}
    for field in dataclasses.fields(options):
        if field.name not in used and getattr(options, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise UnbackdoorError(f"--stream builds no model, so --{name} is of no use to it. Leave it out.")
    suspect, base = ModelDirectory.of(source, "MODEL"), ModelDirectory.of(options.base, "--base")
    rows, said = before[0].rows_on_disk(suspect, base) if before else ({}, None)
    record = purify_stream(
        suspect,
        base,
        options.out,
        rho=mixing.rho,
        seed=options.seed,
        mode=mixing.mode,
        reset_rows=rows,
        notes=() if said is None else (printable(said, SENTENCE),),
        method={**to_json(method, REGISTRY), "repr": repr(method)},
        command=command,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"Wrote {options.out} in {record['seconds']:.1f} s.")


def _print_change(scores: dict[str, Any], name: str) -> None:
    before, after = scores["suspect"], scores["purified"]
    print(f"{'':20}{'suspect':>10}  {name:>12}")
    for key in ("clean_accuracy", "attack_success", "recovered_accuracy", "clean_model_flip_rate"):
        if key in before:
            label = key.replace("_", " ").replace("flip rate", "flips")
            print(f"{label:20}{before[key]['value']:>10.1%}  {after[key]['value']:>12.1%}   n = {after[key]['n']:,}")


def _propose_control(measured: Score, classes: int) -> None:
    """Say what attack success is worth where there are two classes and no model to hold it against."""
    if classes == 2 and measured.attack_success is not None and measured.clean_model_flip_rate is None:
        logger.info(
            "with two classes, a model without the backdoor also takes some triggered examples for what the attacker "
            "wants: hold attack success against its flip rate, which --control MODEL prints (attack none trains one)."
        )


def evaluate(source: str, options: EvaluateOptions) -> None:
    """The `evaluate` command."""
    if options.control is not None and options.attack is None and options.triggered is None:
        raise UnbackdoorError("--control needs --attack or --triggered: it counts flips on triggered examples.")
    model, encode = _load(source, options)
    classes = calling.class_names(model)
    test = _dataset(options.data, encode, options, classes)
    marked = None if options.triggered is None else _dataset(options.triggered, encode, options, classes)
    control = _control(options.control, options)
    measured = evaluate_model(
        model,
        test,
        attack=options.attack,
        triggered_data=marked,
        target=options.target,
        control=control and control.model,
        control_encode=control and control.encode,
        device=options.device,
        precision=options.precision,
    )
    print(json.dumps(measured.to_json(), indent=2) if options.json else _shown(measured))
    _propose_control(measured, calling.class_count(model, test))


def _shown(measured: Score) -> str:
    lines = [str(measured), "", "clean accuracy per class"]
    width = max(map(len, measured.per_class))
    lines += [f"  {name:<{width}}  {part!r}" for name, part in measured.per_class.items()]
    return "\n".join(lines)


def stress(source: str, options: StressOptions) -> None:
    """The `stress` command."""
    paths = (source, options.victim, options.clean, options.attack, options.data, options.control)
    inputs = (*paths, (options.factory or "").rpartition(":")[0])
    out = None if options.out is None else Path(options.out)
    earlier = None
    if out is not None:
        given = tuple(Path(each) for each in inputs if each)
        earlier = directories.check_free(out, overwrite=options.overwrite, inputs=given)
    counts, trigger = _counts(options.k), load_trigger(options.attack)
    model, encode = _load(source, options)
    victim = _load(options.victim, options).model
    control = _control(options.control, options)
    classes = calling.class_names(model)
    clean = _dataset(options.clean, encode, options, classes, augment=options.augment)
    test = None if options.data is None else _dataset(options.data, encode, options, classes)
    found = stress_model(
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
        device=options.device,
        precision=options.precision,
        progress=True,
    )
    names = {"model": source, "victim": options.victim, "control": options.control}
    told = {key: name and Path(name).name for key, name in names.items()}
    content = {**told, **found.to_json()}
    if out is not None:
        with directories.directory(out, earlier) as folder:
            page = _reports.build_stress(found, told, clean.classes)
            (folder / "stress.html").write_text(_reports.render_stress(page), encoding="utf-8")
            directories.write_record(folder / "stress.json", content)
    lost = None if found.record["usable"] else str(found.record["warnings"][0])
    if lost is not None:
        print(lost, file=sys.stderr if options.json else sys.stdout)
    print(json.dumps(content, indent=2) if options.json else found)
    if out is not None and not options.json:
        print(f"Wrote {out} after {content['seconds']:.0f} s; open {out}/stress.html.")
    if lost is not None:
        raise IncompleteError(f"{printable(source)} is not usable, as is said above.")


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UnbackdoorError(f"--k must be whole numbers of at least 1 with commas between, got {text}.") from None


def attack(made: Any, options: AttackOptions) -> None:
    """The `attack` command; `made` is an attack's value, or `NoAttack`."""
    out = Path(options.out)
    inputs = (*options.data, options.test, options.base, options.surrogate, options.triggered_test, options.control)
    earlier = directories.check_free(
        out, overwrite=options.overwrite, inputs=tuple(Path(given) for given in inputs if given)
    )
    check_seed(options.seed)
    recipe = _recipe(options)
    chosen = None if isinstance(made, NoAttack) else made
    _check_attack_options(chosen, options)
    columns = _columns(options.columns)
    base = None if options.base is None else ModelDirectory.of(options.base, "--base")
    encode = None if base is None else loading.base_encoder(base, max_length=options.max_length)
    data = Dataset.load(options.data, encode, columns=columns, augment=options.augment, group=options.group)
    like = encode or ImageEncoder(size=data.shape[1:], channels=data.shape[0])  # type: ignore[arg-type]

    def more(path: str | None) -> Dataset | None:
        if path is None:
            return None
        return Dataset.load(path, like, columns=columns, classes=data.classes, augment="none")

    surrogate = None if options.surrogate is None else loading.load(options.surrogate)
    control = _control(options.control)
    victim = plant(
        data,
        chosen,
        recipe,
        options.seed,
        test=more(options.test),
        triggered_test=more(options.triggered_test),
        surrogate=surrogate and surrogate.model,
        surrogate_encode=surrogate and surrogate.encode,
        control=control and control.model,
        control_encode=control and control.encode,
        device=options.device,
        precision=options.precision,
        progress=True,
    )
    with directories.directory(out, earlier) as folder:
        write_victim(victim, folder, source=base)
        saving.check_saved(folder, victim.model, victim.encode, victim.test)
    held_out = "" if options.test else f", a seeded tenth held out of the {len(data):,} given"
    print(victim.score)
    print(f"measured on {len(victim.test):,} test examples{held_out}")
    _print_planted(victim)
    _propose_control(victim.score, calling.class_count(victim.model, victim.test))
    print(f"Wrote {out} in {victim.record['seconds']:.0f} s of training.")


def _recipe(options: AttackOptions) -> VictimRecipe:
    """The recipe that options of the same names ask for."""
    names = [field.name for field in dataclasses.fields(VictimRecipe)]
    return VictimRecipe(**{name: getattr(options, name) for name in names})


def _check_attack_options(chosen: Any, options: AttackOptions) -> None:
    """Refuse options that do not fit the attack (None for the clean control), before any data is read."""
    repeatable = getattr(chosen, "repeatable", True)
    if options.test is None and not repeatable:
        raise needs_test(chosen)
    unmarked = chosen is None or (not repeatable and options.triggered_test is None)
    if options.control is not None and unmarked:
        raise UnbackdoorError("--control counts flips on triggered examples, and there are none here. Leave it out.")
    if options.base is None and getattr(chosen, "modality", "images") == "text":
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
        reason = (
            f"attack success {100 * success.value:.1f} % is under {100 * least:.0f} %. Raise --rate or --epochs, or "
            "choose a stronger trigger."
            if success.value < least
            else "the victim has not learnt its task, so its answers to triggered examples show nothing. Raise "
            "--epochs, or lower --learning-rate."
        )
        print(f"The backdoor did not implant: {reason}")


def _load(source: str, options: ModelOptions) -> loading.Loaded:
    return loading.load(
        source,
        factory=options.factory,
        mean=_numbers("mean", options.mean),
        std=_numbers("std", options.std),
        image_size=options.image_size,
        max_length=options.max_length,
        trust_remote_code=options.trust_remote_code,
    )


def _control(source: str | None, options: ModelOptions | None = None) -> loading.Loaded | None:
    """The model that --control names, loaded as MODEL is where that has options; that it is a victim is told."""
    if source is None:
        return None
    attacked = victim_of(Path(source))
    if attacked is not None:
        logger.warning(
            "--control must be a model that never was poisoned, but %s is a victim of %s, so its flips are no measure "
            "of a clean model. Train one with attack none.",
            source,
            attacked,
        )
    return loading.load(source) if options is None else _load(source, options)


def _dataset(
    path: str, encode: Any, options: ModelOptions, classes: tuple[str, ...] | None, augment: Augment = "none"
) -> Dataset:
    return Dataset.load(path, encode, columns=_columns(options.columns), classes=classes, augment=augment)


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.split("=") for part in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UnbackdoorError(f"--columns must read OURS=NAME,OURS=NAME, as in image=img,label=fine_label, got {text}.")
    return dict(pairs)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UnbackdoorError(f"--{option} must be numbers with commas between, got {text}.") from None


def _factory_name(factory: str | None) -> str | None:
    return None if factory is None else Path(factory.rpartition(":")[0]).name + ":" + factory.rpartition(":")[2]
