"""The common part of the demos: purify in two ways, score, show the numbers, write everything."""

import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unbackdoor import _reports
from unbackdoor._artifacts import card, directories
from unbackdoor._artifacts.record import write_record
from unbackdoor._cli.commands.outcome import not_usable
from unbackdoor._cli.parameters import with_options
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.writing import write_examples
from unbackdoor._models import saving
from unbackdoor._models.arithmetic import Precision, choose
from unbackdoor._poisoning.prompts import TriggeredPrompts
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._progress import bar
from unbackdoor._purification.method import Method, method_name
from unbackdoor._purification.purify import Purified, purify
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.proportion import near_chance
from unbackdoor._tasks.score import Score
from unbackdoor._victims.directory import write_victim
from unbackdoor._victims.plant import Victim


@dataclass(frozen=True, kw_only=True)
class Story:
    """The texts and settings of one demo.

    Args:
        kind: as in `demo image`.
        title: title of the page.
        facts: facts for the page, as label and text.
        command: the command that repeats the demo.
        device: device to purify and to score on.
        precision: precision of both.
        next_method: method that the last lines propose.
        next_options: options that this method needs.
        max_new_tokens: of a language model: tokens of the longest answer that is scored.
    """

    kind: str
    title: str
    facts: dict[str, str]
    command: str
    device: str | None
    precision: Precision
    next_method: str
    next_options: str = ""
    max_new_tokens: int | None = None


def finish(
    story: Story,
    folder: Path,
    victim: Victim,
    control: nn.Module | None,
    methods: tuple[Method, ...],
    clean: Dataset,
    test: Dataset,
    attacked: Triggered | TriggeredPrompts,
    *,
    seed: int,
    base: nn.Module | None = None,
    before: directories.Content | None = None,
) -> None:
    """Purify victim and clean model, if there is one, with each method, score both, print a table, write the page."""

    def purified(model: nn.Module, method: Method) -> Purified:
        return purify(
            model, clean, method, seed=seed, device=story.device, precision=story.precision, base=base, progress=True
        )

    results = [purified(victim.model, method) for method in methods]
    controls: list[nn.Module | None] = [None] * (1 + len(methods))
    if control is not None:
        controls = [control, *(purified(control, method).model for method in methods)]
    models = [victim.model, *(result.model for result in results)]
    task = task_of(test.encode, max_new_tokens=story.max_new_tokens, progress=bar)
    arithmetic = choose(victim.model, story.device, story.precision)
    scores = [
        task.score(model, test, attacked, arithmetic, control=other)
        for model, other in zip(models, controls, strict=True)
    ]
    names = ["suspect", *map(method_name, methods)]
    for result in results:
        result.record.update(with_options(result.record, "purify"))
        if not result.record["usable"]:
            print(result.record["warnings"][0] + "\n")
    print(_table(names, scores) + "\n")

    record = {
        "demo": story.kind,
        "attack": victim.record["attack"],
        "rate": victim.record["rate"],
        "methods": [result.record["method"] for result in results],
        "seed": seed,
        "versions": victim.record["versions"],
        "device": victim.record["device"],
        "scores": {name: part.to_json() for name, part in zip(names, scores, strict=True)},
        "notes": results[-1].record["notes"],
        "warnings": results[-1].record["warnings"],
        "usable": results[-1].record["usable"],
        "command": story.command,
    }
    seconds = [None, *(result.record["seconds"] for result in results)]
    contenders = list(zip(names, models, scores, seconds, strict=True))
    content = {**record, "clean": results[-1].record["clean"], "facts": _facts(story, methods, control)}
    page = _page(story.title, contenders, test, attacked, content)
    with directories.directory(folder, before) as partial:
        _write(partial, victim, results[-1], (scores[0], scores[-1]), test)
        write_examples(partial, "clean", clean)
        file = write_examples(partial, "test", test)
        (partial / "report.html").write_text(page, encoding="utf-8")
        write_record(partial / "record.json", record)
    print(_farewell(folder, story.next_method, story.next_options, Path(file).suffix))
    if not results[-1].record["usable"]:
        raise not_usable(folder / "purified", results[-1].record)


def _facts(story: Story, methods: tuple[Method, ...], control: nn.Module | None) -> dict[str, str]:
    """The facts for the page: those of the demo, the methods, and what the clean model is if there is one."""
    facts = {**story.facts, **{method_name(method): repr(method) for method in methods}}
    if control is not None:
        facts["Clean model"] = "trained by the same recipe without the attack, then put through the same method"
    return facts


def _page(
    title: str,
    contenders: list[tuple[str, nn.Module, Any, float | None]],
    test: Dataset,
    attacked: Triggered | TriggeredPrompts,
    record: dict[str, Any],
) -> str:
    """The page, as HTML: of pictures or texts, or of prompts and answers."""
    if isinstance(attacked, TriggeredPrompts):
        answering = [_reports.Answering(name, model, measured) for name, model, measured, _ in contenders]
        return _reports.render_answers(_reports.build_answers(title, answering, test, attacked, record))
    shown = [_reports.Contender(*each) for each in contenders]
    return _reports.render(_reports.build(title=title, contenders=shown, test=test, attacked=attacked, record=record))


def say(text: str) -> None:
    """Print a paragraph, and flush it if output is a pipe: the next step takes a while."""
    print(textwrap.fill(text, 96, subsequent_indent="   ") + "\n", flush=True)


def percent(measured: Any, name: str) -> str:
    """Returns a share of a score, as text."""
    return f"{100 * getattr(measured, name).value:.1f} %"


def health(measured: Score, classes: int) -> str:
    """Returns a clause on the clean accuracy of a victim, for the middle of a sentence."""
    accuracy = percent(measured, "clean_accuracy")
    if near_chance(measured.clean_accuracy, classes):
        return f"has not learnt its task (clean accuracy {accuracy}, near chance);"
    return f"looks healthy (clean accuracy {accuracy}), but"


def _table(names: list[str], scores: list[Any]) -> str:
    width = max(14, 2 + max(map(len, names)))
    lines = [f"   {'':24}" + "".join(f"{name:>{width}}" for name in names)]
    for key, label in (
        ("clean_accuracy", "clean accuracy"),
        ("clean_loss", "clean loss"),
        ("attack_success", "attack success"),
        ("false_activation", "false activation"),
        ("empty", "empty answers"),
        ("recovered_accuracy", "recovered accuracy"),
        ("clean_model_flip_rate", "clean model's flip rate"),
    ):
        if getattr(scores[0], key, None) is not None:
            cells = [f"{part.clean_loss.value:.3f}" if key == "clean_loss" else percent(part, key) for part in scores]
            lines.append(f"   {label:24}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _write(folder: Path, victim: Victim, purified: Purified, scores: tuple[Any, Any], test: Dataset) -> None:
    """The victim's and the purified model's directories, as `attack` and `purify` write them."""
    (folder / "victim").mkdir()
    write_victim(victim, folder / "victim")
    record: dict[str, Any] = {
        **purified.record,
        "source": {"model": "victim", "factory": None},
        "scores": {"suspect": scores[0].to_json(), "purified": scores[1].to_json()},
        "scores_note": f"on {len(test):,} examples that the method never saw",
    }
    (folder / "purified").mkdir()
    saving.save(purified.model, folder / "purified", encode=victim.encode)
    (folder / "purified" / "README.md").write_text(card.purified(record), encoding="utf-8")
    write_record(folder / "purified" / "record.json", record)
    for name, model in (("victim", victim.model), ("purified", purified.model)):
        saving.check_saved(folder / name, model, victim.encode, test)


def _farewell(folder: Path, method: str = "ft-init", options: str = "", suffix: str = ".parquet") -> str:
    place = shlex.quote(str(folder))
    program = "unbackdoor"
    if shutil.which(program) is None:  # as after `make demo`, which installs into .venv
        python = Path(sys.executable)
        here = python.is_relative_to(Path.cwd())
        program = shlex.quote(str(python.relative_to(Path.cwd()) if here else python)) + " -m unbackdoor"
    return (
        f"4. Look. Open {folder / 'report.html'}\n\n"
        "Next steps:\n"
        f"   {program} evaluate {place}/purified --data {place}/test{suffix} --attack {place}/victim/attack.json\n"
        f"   {program} purify {method} {place}/victim {options}--clean {place}/clean{suffix} "
        f"--data {place}/test{suffix} --attack {place}/victim/attack.json --out {place}-{method}"
    )
