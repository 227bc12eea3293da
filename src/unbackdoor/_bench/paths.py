"""The files that a grid names: their absolute paths, and hashes of their content."""

import hashlib
import os
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from unbackdoor import archs
from unbackdoor._bench.lines import Location
from unbackdoor._bench.schema import ASKED, RECIPE, GridTask
from unbackdoor._bench.store import digests
from unbackdoor._data.class_prompts import PLACE, ClassPrompts
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import exists, open_file
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._registry.entries import find

HUB = ("base", "proxy", "reference")  # entries of a task that may be names on the Hub


class Noted(Protocol):
    """Takes the problems of a grid."""

    def add(self, location: Location, message: object) -> None:
        """Note a problem of an entry."""


def local(parameter: Any, folder: Path) -> Any:
    """Returns a parameter that names a file next to the grid as an absolute path; others unchanged."""
    if isinstance(parameter, str) and ("/" in parameter or "." in parameter):
        path = folder / os.path.expandvars(parameter)
        return str(path.absolute()) if path.is_file() else parameter
    return parameter


def check_task(name: str, task: GridTask, folder: Path, problems: Noted) -> GridTask:
    """The task with absolute paths; notes files that are missing and entries that do not belong together."""
    where: Location = ("tasks", name)
    changed = _absolute(name, task, folder, problems)
    if task.model is None:
        _check_trained(name, task, problems)
    else:
        _check_existing(name, task, Path(changed["model"]), problems)
        _check_trigger(name, task, Path(changed.get("attack", Path(changed["model"]) / "attack.json")), problems)
        _check_normalisation(name, task, problems)
    if task.clean is not None and task.held_out:
        problems.add((*where, "held_out"), f"tasks.{name} must have clean or held_out, got both. Leave one out.")
    return task.model_copy(update=changed)


def _absolute(name: str, task: GridTask, folder: Path, problems: Noted) -> dict[str, Any]:
    """All entries that name files, as absolute paths; notes those that are missing."""
    changed: dict[str, Any] = {}
    for key in ("train", "test", "second_test", "clean", "triggered", "unlabelled"):
        files = getattr(task, key)
        if files is not None:
            changed[key] = tuple(_path_or_name((name, key), file, folder, problems) for file in files)
    for key in ("model", "attack", "control", "base", "proxy", "reference"):
        path = getattr(task, key)
        if isinstance(path, str):
            changed[key] = _path_or_name((name, key), path, folder, problems, hub=key in HUB)
    if task.factory is not None:
        file, colon, function = task.factory.rpartition(":")
        if not file or not function.isidentifier():
            problems.add(
                ("tasks", name, "factory"), f"tasks.{name}.factory must be FILE.py:FUNCTION, got {task.factory}."
            )
        else:
            changed["factory"] = _path_or_name((name, "factory"), file, folder, problems) + colon + function
    if task.prompts is not None:
        changed["prompts"] = _prompts(name, task.prompts, folder, problems)
    return changed


def _prompts(name: str, prompts: str, folder: Path, problems: Noted) -> str:
    """A template as it is, or the absolute path of a file of prompts; notes what is neither, or cannot be read."""
    if PLACE not in prompts:
        prompts = str((folder / os.path.expandvars(os.path.expanduser(prompts))).absolute())
    try:
        ClassPrompts.of(prompts)
    except UnbackdoorError as problem:
        problems.add(("tasks", name, "prompts"), f"tasks.{name}: {problem}")
    return prompts


def _path_or_name(entry: tuple[str, str], place: str, folder: Path, problems: Noted, *, hub: bool = False) -> str:
    """The absolute path of a task's entry; itself if it may be a name on the Hub, or was noted as missing."""
    where, label = ("tasks", *entry), ".".join(("tasks", *entry))
    text = os.path.expandvars(os.path.expanduser(place))
    if "$" in text:
        variable = text[text.index("$") :].split("/")[0]
        problems.add(where, f"{label} needs {variable} in the environment, which is not set.")
        return place
    path = (folder / text).absolute()
    if exists(path) or glob(str(path), recursive=True):
        return str(path)
    if not (hub and not text.startswith((".", "/")) and text.count("/") <= 1):
        problems.add(where, f"{label}: {path} does not exist.")
    return text


def _check_trained(name: str, task: GridTask, problems: Noted) -> None:
    """Note missing entries of a task whose victims are trained, and entries that go with an existing model."""
    where: Location = ("tasks", name)
    if task.train is None:
        problems.add(where, f"tasks.{name} must have train, to make victims, or model, which is one.")
    alone = ["attack", "behaviour", "factory", "mean", "std", "image_size"]
    if not task.poisoned_by_others:
        alone += ["target", "control"]
    elif task.target is None:
        problems.add(
            (*where, "triggered"),
            f"tasks.{name}.triggered and tasks.{name}.target go together: if train is poisoned already, the examples "
            "with its trigger, and the class that the attacker wants.",
        )
    for key in alone:
        if key in task.model_fields_set:
            problems.add((*where, key), f"tasks.{name}.{key} goes with an existing model. Leave it out.")
    if task.control is True:
        problems.add((*where, "control"), f"tasks.{name}.control must be a clean model, since the task trains its own.")
    try:
        find(task.arch, archs.REGISTRY, "architecture", "archs")
    except UnbackdoorError as problem:
        problems.add((*where, "arch"), problem)


def _check_existing(name: str, task: GridTask, model: Path, problems: Noted) -> None:
    """Note entries that go with victims that are trained, and weights without a module."""
    where: Location = ("tasks", name)
    trained = {"arch", "width", "epochs", "clean_epochs", "learning_rate", "batch_size", "lora_rank", "adapter"}
    trained |= {"freeze_text"}
    for key in sorted(task.model_fields_set & trained):
        problems.add((*where, key), f"tasks.{name}.{key} is for victims that are trained; model is one. Leave it out.")
    if model.is_file() and task.factory is None:
        problems.add(
            (*where, "model"),
            f'tasks.{name}.model is a file of weights. Name what makes its module by factory = "FILE.py:FUNCTION".',
        )


def _check_normalisation(name: str, task: GridTask, problems: Noted) -> None:
    for key in ("mean", "std"):
        numbers = getattr(task, key)
        if numbers is not None and (len(numbers) not in (1, 3) or (key == "std" and min(numbers) <= 0)):
            allowed = "1 or 3 numbers" + " above 0" * (key == "std")
            text = ", ".join(f"{number:g}" for number in numbers)
            problems.add(("tasks", name, key), f"tasks.{name}.{key} must be {allowed}, got {text}.")


def _check_trigger(name: str, task: GridTask, attack: Path, problems: Noted) -> None:
    """Note entries that an existing model lacks to be scored with its trigger, and those given twice."""
    where: Location = ("tasks", name)
    if task.triggered is not None and task.attack is not None:
        problems.add((*where, "triggered"), f"tasks.{name} must have attack or triggered, got both. Leave one out.")
    _check_behaviour(name, task, problems)
    wanted = "target" if task.behaviour is None else "behaviour"
    if (task.triggered is None) != (getattr(task, wanted) is None):
        problems.add(
            (*where, wanted if task.triggered is None else "triggered"),
            f"tasks.{name}.triggered and tasks.{name}.{wanted} go together: the examples, and the "
            f"{'class' if wanted == 'target' else 'answer'} that the attacker wants.",
        )
    elif task.triggered is None and task.control is not True and attack.parent.exists() and not attack.is_file():
        problems.add(
            (*where, "model"),
            f"tasks.{name}.model has no attack.json to score it with. Name it by attack = PATH, or give triggered and "
            "target.",
        )


def _check_behaviour(name: str, task: GridTask, problems: Noted) -> None:
    """Note a behaviour that is none, or that stands next to a class."""
    if task.behaviour is None:
        return
    where: Location = ("tasks", name, "behaviour")
    if task.target is not None:
        problems.add(
            where, f"tasks.{name} must have target, for a classifier, or behaviour, for a language model, got both."
        )
    try:
        Behaviour.of(task.behaviour)
    except UnbackdoorError as problem:
        problems.add(where, f"tasks.{name}: {problem}")


def file_hashes(task: GridTask) -> dict[str, str]:
    """The hashes of the files of a task, by entry; a name on the Hub stands for itself."""
    files = {
        key: getattr(task, key) for key in ("train", "test", "clean", "unlabelled") if getattr(task, key) is not None
    }
    hashes = {key: content_hash(paths) for key, paths in files.items()}
    for key in HUB:
        path = getattr(task, key)
        if path is not None:
            hashes[key] = content_hash((path,)) if Path(path).exists() else path
    return hashes


def task_spec(name: str, task: GridTask, files: dict[str, str]) -> dict[str, Any]:
    """Returns what determines a task's victims: name, content of its files, settings that differ from the defaults."""
    spec: dict[str, Any] = {"name": name, **{key: files[key] for key in ("train", "test", "base") if key in files}}
    if task.held_out:
        spec["held_out"] = task.held_out
    if task.columns:
        spec["columns"] = dict(sorted(task.columns.items()))
    for key in (*RECIPE, *ASKED):
        if getattr(task, key) != GridTask.model_fields[key].default:
            spec[key] = getattr(task, key)
    if task.prompts is not None:
        spec["prompts"] = ClassPrompts.of(task.prompts).to_json()
    return spec


def content_hash(files: tuple[str, ...]) -> str:
    """Returns a hash of the content of files, patterns and folders, in order; their place does not matter."""
    total = hashlib.sha256()
    for pattern in files:
        for match in [pattern] if exists(pattern) else sorted(glob(pattern, recursive=True)):
            path = Path(match)
            if path.is_dir():
                for name, digest in digests(path).items():
                    total.update(f"{name}\0{digest}\n".encode())
            else:
                with open_file(path) as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
