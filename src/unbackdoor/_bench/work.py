"""The work of a job: train a victim, or purify and score one. A process keeps data for its next job."""

import dataclasses
import functools
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from unbackdoor._artifacts.attack_record import recorded_implanted
from unbackdoor._artifacts.machine import peak_memory
from unbackdoor._artifacts.record import handed_back, recorded_seconds
from unbackdoor._bench.examples import Examples, Shelf
from unbackdoor._bench.schema import GridTask
from unbackdoor._bench.store import Store
from unbackdoor._bench.subjects import NONE, PlannedCell, Subject
from unbackdoor._data.classes import check_labels
from unbackdoor._data.conversation_rows import holds_prompts
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._detection.audit import audit
from unbackdoor._detection.result import JudgedFinding
from unbackdoor._errors import IncompleteError, UnbackdoorError
from unbackdoor._models.adapters import is_adapter
from unbackdoor._models.arithmetic import Arithmetic, choose, description
from unbackdoor._models.calling import class_names
from unbackdoor._models.loading import Loaded, base_encoder, load, load_base
from unbackdoor._poisoning.attack_file import load_trigger
from unbackdoor._poisoning.attacked import attacked_by
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.prompts import already_triggered_prompts
from unbackdoor._poisoning.triggered import already_triggered
from unbackdoor._purification.purify import Purified, judged, purify
from unbackdoor._registry.entries import to_json
from unbackdoor._registry.purifiers import REGISTRY
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.task import Task
from unbackdoor._victims.directory import write_victim
from unbackdoor._victims.implanted import has_implanted
from unbackdoor._victims.plant import plant
from unbackdoor._victims.recipe import VictimRecipe


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all jobs of a run share.

    Args:
        store: address of the store.
        grid: the grid's name under `grids/`.
        device: None uses a GPU if there is one.
        threads: number of threads of this process; None does not change it.
    """

    store: str
    grid: str
    device: str | None = None
    threads: int | None = None


class Outcome(NamedTuple):
    """The end of a job.

    Args:
        kind: `busy` if another process is working on it.
        seconds: time that the job took here.
        message: reason of a failure.
    """

    kind: Literal["done", "failed", "busy"]
    seconds: float = 0.0
    message: str = ""


def train(subject: Subject, surrogate: Subject | None, settings: Settings, wait: bool) -> Outcome:
    """Train a victim and keep it, unless it is already in the store.

    Raises:
        IncompleteError: the disk is full.
    """
    desk = _desk(settings)
    start = time.perf_counter()
    with desk.store.locked(f"victims/{subject.key}", wait=wait) as held:
        if subject.key in desk.store.victims():
            return Outcome("done")
        if not held:
            return Outcome("busy")
        try:
            desk.plant(subject, surrogate)
        except IncompleteError:
            raise
        except Exception as problem:
            return Outcome("failed", time.perf_counter() - start, problem_text(problem))
    return Outcome("done", time.perf_counter() - start)


def measure(cell: PlannedCell, settings: Settings, force: bool, wait: bool) -> Outcome:
    """Purify and score, and keep the result or the failure, unless the cell is done.

    Raises:
        IncompleteError: the disk is full.
    """
    desk = _desk(settings)
    start = time.perf_counter()
    with desk.store.locked(f"cells/{cell.key}", wait=wait) as held:
        before = desk.store.get(cell.spec)
        if before is not None and not force:
            return Outcome("done")
        if not held:
            return Outcome("busy")
        try:
            result = {"status": "done", **desk.measure(cell)}
            if "flips" in result and before is not None:
                result["flips"] = {**(before.get("flips") or {}), **result["flips"]}  # of another grid's victims
        except IncompleteError:
            raise
        except Exception as problem:
            unforeseen = None if isinstance(problem, UnbackdoorError) else traceback.format_exc()
            return fail(cell, settings, problem_text(problem), time.perf_counter() - start, unforeseen)
        result["provenance"] = desk.provenance(cell)
        desk.store.put(cell.spec, result)
    return Outcome("done", time.perf_counter() - start)


def fail(
    cell: PlannedCell, settings: Settings, message: str, seconds: float = 0.0, trace: str | None = None
) -> Outcome:
    """Record that a cell failed, and why."""
    desk = _desk(settings)
    result = {"status": "failed", "message": message, "traceback": trace, "provenance": desk.provenance(cell)}
    desk.store.put(cell.spec, result)
    return Outcome("failed", seconds, message)


def problem_text(problem: BaseException) -> str:
    """Returns a failure in one sentence."""
    text = " ".join(str(problem).split())
    return text if isinstance(problem, UnbackdoorError) else f"{type(problem).__name__}: {text}"[:500]


@functools.lru_cache(maxsize=1)
def _desk(settings: Settings) -> "_Desk":
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return _Desk(settings)


class _Desk:
    """The state of a process: the store, and the data and the subject of the latest job."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.store)
        self.shelf = Shelf()
        self.examples = Examples(self.store, self.shelf)
        self.device: str | None = None

    def plant(self, subject: Subject, surrogate: Subject | None) -> None:
        task = subject.task
        encode = None
        if task.base is not None:
            assert task.train is not None
            prompts = holds_prompts(task.train, task.columns)
            encode = base_encoder(task.base, max_length=task.max_length, prompts=prompts, template=task.template)
        data = self.examples.read(task, "train", encode, None)
        like = encode or ImageEncoder(size=data.shape[1:], channels=data.shape[0])  # type: ignore[arg-type]
        test, _ = self.examples.parts(subject, like, data.classes)
        recipe = VictimRecipe(
            rate=subject.rate or 0.05,
            base=task.base,
            arch=task.arch,
            width=task.width,
            epochs=task.epochs,
            clean_epochs=task.clean_epochs,
            learning_rate=task.learning_rate,
            batch_size=task.batch_size,
            lora_rank=task.lora_rank,
            adapter=task.adapter,
        )
        control = None if surrogate is None else load(self.store.victim(surrogate.key))
        victim = plant(
            data,
            subject.attack,
            recipe,
            subject.seed or 0,
            behaviour=subject.behaviour,
            test=test,
            surrogate=control and control.model,
            surrogate_encode=control and control.encode,
            max_new_tokens=task.max_new_tokens,
            device=self.settings.device,
            precision=task.precision,
        )
        source = Path(task.base) if task.base is not None and Path(task.base).is_dir() else None
        self.store.put_victim(subject.spec, lambda folder: write_victim(victim, folder, source=source))

    def measure(self, cell: PlannedCell) -> dict[str, Any]:
        subject, task, device = cell.subject, cell.subject.task, self.settings.device
        folder, (model, encode) = self.shelf.keep("subject", subject.key, lambda: self._load(subject))
        test, pool = self.examples.parts(subject, encode, class_names(model))
        scored_model, record = model, {}
        if cell.method is not None:
            purified = self._purified(cell, pool, model, encode)
            scored_model, record = purified.model, purified.record
        arithmetic = choose(scored_model, device, task.precision)
        if cell.method is not None and purified.record["usable"] is None:
            record |= judged(purified, model, test, cell.method, arithmetic)
        self.device = description(arithmetic)
        scoring = _Scoring.of(model, test, task, arithmetic)
        attacked = None
        if subject.marked:
            attacked = self.shelf.keep("attacked", subject.key, lambda: self._attacked(subject, scoring, model))
        start = time.perf_counter()
        measured = scoring.of_model(scored_model, attacked)
        result: dict[str, Any] = {"score": measured.to_json()}
        if subject.control:
            result["implanted"] = None
            result["flips"] = {
                other.key: scoring.task.flip_rate(scored_model, shown, arithmetic).to_json()
                for other in cell.others
                if (shown := self._attacked(other, scoring, model)) is not None
            }
        elif task.triggered is None:
            result["implanted"] = recorded_implanted(Path(subject.trigger or folder / "attack.json"))
        elif cell.method is None:
            result["implanted"] = scoring.implanted(measured)
        else:
            result["implanted"] = self._took(subject, lambda: scoring.implanted(scoring.of_model(model, attacked)))
        seconds = time.perf_counter() - start
        if cell.second:
            second = scoring._replace(test=self.examples.read(task, "second_test", encode, class_names(model)))
            attacked = None
            if subject.marked and task.triggered is None:
                attacked = self.shelf.keep(
                    "second attacked", subject.key, lambda: self._attacked(subject, second, model)
                )
            result["second_test"] = second.of_model(scored_model, attacked).to_json()
        result |= {
            "method": None,
            "seconds": record.get("seconds", 0.0),
            "scoring_seconds": round(seconds, 3),
            "training_seconds": recorded_seconds(folder),
            "peak_memory_bytes": record.get("peak_memory_bytes", peak_memory()),
            "examples_seen": record.get("examples_seen", 0),
            "held_out": (record.get("clean") or {}).get("held_out", 0),
            "notes": record.get("notes", []),
            "warnings": record.get("warnings", []),
            "usable": True if handed_back(record) else record.get("usable"),
        }
        if cell.method is not None:
            result["method"] = _described(cell.method)
        if cell.detectors:
            result["audit"] = self._audited(cell, pool, model, encode)
            result["seconds"] = result["audit"]["seconds"]
        return result

    def _purified(self, cell: PlannedCell, pool: Dataset | None, model: Any, encode: Any) -> Purified:
        task = cell.subject.task
        proxy = task.proxy
        return purify(
            model,
            None if cell.budget is None else self.examples.budget(cell, pool, encode, class_names(model)),
            cell.method,
            seed=cell.seed,
            device=self.settings.device,
            precision=task.precision,
            base=self._base(task, encode),
            proxy=None if proxy is None else self.shelf.keep("proxy", proxy, lambda: _asked(proxy, task).model),
            unlabelled=self._unlabelled(cell, encode, class_names(model)),
        )

    def _unlabelled(self, cell: PlannedCell, encode: Any, classes: Any) -> Dataset | None:
        """The examples without labels of a task, for a method that uses them."""
        if "unlabelled" not in cell.spec:
            return None
        return self.examples.read(cell.subject.task, "unlabelled", encode, classes)

    def _base(self, task: GridTask, encode: Any) -> Any:
        """The pre-trained model of a task, for methods and detectors; None if it has none."""
        base = task.base
        if base is None:
            return None
        return self.shelf.keep("base", base, lambda: load_base(base, factory=task.factory, modality=encode.modality))

    def _audited(self, cell: PlannedCell, pool: Dataset | None, model: Any, encode: Any) -> dict[str, Any]:
        """The result of the detectors. P-values are left out: they change with the clean models to compare with."""
        task = cell.subject.task
        result = audit(
            model,
            self.examples.budget(cell, pool, encode, class_names(model)),
            detectors=cell.detectors,
            base=self._base(task, encode),
            seed=cell.seed,
            device=self.settings.device,
            precision=task.precision,
        )
        return {
            "findings": [_finding_entry(finding) for finding in result.findings],
            "doubt": "" if result.findings else result.reason,
            "accuracy_on_clean": result.record["suspect_accuracy_on_clean"],
            "judged_on": result.record["examples"]["judged_on"],
            "seconds": result.record["seconds"],
        }

    def provenance(self, cell: PlannedCell) -> dict[str, Any]:
        labelled = {
            "attack": (cell.subject.label, cell.subject.spec["attack"]["name"]),
            "method": (cell.label, cell.spec["method"]["name"]),
        }
        return {
            "commit": commit(),
            "versions": {
                "unbackdoor": version("unbackdoor"),
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "python": platform.python_version(),
            },
            "device": self.device,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "grid": self.settings.grid,
            "labels": {key: label for key, (label, name) in labelled.items() if label not in (name, "own")},
        }

    def _load(self, subject: Subject) -> tuple[Path, Loaded]:
        task = subject.task
        if subject.model is not None:
            return Path(subject.model), _asked(subject.model, task)
        folder = self.store.victim(subject.key)
        return folder, load(folder, max_length=task.max_length, base=task.base if task.adapter else None)

    def _attacked(self, subject: Subject, scoring: "_Scoring", model: Any) -> Any:
        """Returns test examples with a subject's trigger; None if the subject is not trained yet."""
        task, test, classes = subject.task, scoring.test, scoring.classes
        if task.triggered is not None:
            marked = self.examples.triggered(subject, test, test.encode, class_names(model))
            if task.behaviour is not None:
                return already_triggered_prompts(marked, Behaviour.of(task.behaviour))
            assert task.target is not None
            check_labels(marked, classes)
            return already_triggered(marked, task.target, classes)
        if subject.trigger is not None:
            return attacked_by(test, load_trigger(subject.trigger), classes)
        if subject.key not in self.store.victims():
            return None
        return attacked_by(test, load_trigger(self.store.victim(subject.key)), classes)

    def _took(self, subject: Subject, measured: Callable[[], bool]) -> bool:
        """Whether an existing model has its backdoor: by its cell without a method if there is one, else measured."""
        known = self.store.get({"victim": subject.spec, "method": NONE, "clean": None, "seed": 0})
        if known is not None and known.get("implanted") is not None:
            return bool(known["implanted"])
        implanted: bool = self.shelf.keep("took", subject.key, measured)
        return implanted


class _Scoring(NamedTuple):
    """The parts that all scores of a cell share.

    Args:
        task: of the models.
        test: examples to score on.
        classes: the number of the models' classes; of language models, of their tokens.
        arithmetic: device, precision, layout.
    """

    task: Task
    test: Dataset
    classes: int
    arithmetic: Arithmetic

    @classmethod
    def of(cls, model: Any, test: Dataset, task: GridTask, arithmetic: Arithmetic) -> "_Scoring":
        use = task_of(test.encode, max_new_tokens=task.max_new_tokens)
        fitting = use.checked(model, test)
        return cls(use, fitting.test, fitting.classes, arithmetic)

    def of_model(self, model: Any, attacked: Any) -> Any:
        """The score of a model on the test examples and on those with a trigger, if there are any."""
        return self.task.score(model, self.test, attacked, self.arithmetic)

    def implanted(self, measured: Any) -> bool:
        """Whether a score is that of a model with the backdoor."""
        return has_implanted(measured, self.classes, self.test.modality)


def _asked(source: str, task: GridTask) -> Loaded:
    """Returns an existing model of a task, loaded with the task's settings."""
    return load(
        source,
        factory=task.factory,
        mean=task.mean,
        std=task.std,
        image_size=task.image_size,
        max_length=task.max_length,
        template=task.template,
        base=task.base if Path(source).is_dir() and is_adapter(Path(source)) else None,
    )


def _finding_entry(finding: JudgedFinding) -> dict[str, Any]:
    return {
        "detector": finding.detector,
        "unit": finding.unit,
        "looks_natural": finding.looks_natural,
        "seconds": finding.seconds,
        "classes": [
            {
                "target": each.candidate.target,
                **({"name": each.target_name} if each.candidate.name else {}),
                "sources": list(each.candidate.sources),
                "strength": each.candidate.strength,
                "size": each.candidate.size,
                "nominal_p": each.nominal_p,
                "moved": None if each.moved is None else each.moved.to_json(),
                "random": None if each.random is None else each.random.to_json(),
            }
            for each in finding.classes
        ],
    }


def _described(method: Any) -> dict[str, Any]:
    """Returns a method's repr and parameters, with files named without the folders of this machine."""
    parameters = to_json(method, REGISTRY)["parameters"]
    text = json.dumps({"repr": repr(method), "parameters": parameters})
    for step in parameters if isinstance(parameters, list) else [parameters]:
        for parameter in step.values():
            if isinstance(parameter, str) and Path(parameter).is_absolute():
                text = text.replace(json.dumps(parameter)[1:-1], Path(parameter).name)
    return dict(json.loads(text))


@functools.lru_cache(maxsize=1)
def commit() -> str | None:
    """Returns the commit of the source tree that runs, with `-dirty` after changes; None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", os.fspath(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return described.stdout.strip() or None
