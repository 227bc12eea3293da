"""The work of a job: train a victim, or purify and score one. A process keeps data for its next job."""

import dataclasses
import functools
import platform
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
from unbackdoor._artifacts.record import failed, recorded_seconds
from unbackdoor._bench.columns import NONE
from unbackdoor._bench.described import commit, described, finding_entry
from unbackdoor._bench.examples import Examples, Shelf
from unbackdoor._bench.guarded import Helpers, measure_guard
from unbackdoor._bench.plan import lacks_flips
from unbackdoor._bench.schema import GridTask
from unbackdoor._bench.store import Store
from unbackdoor._bench.subjects import PlannedCell, Subject
from unbackdoor._bench.trained import compared, recipe_of, train_anew, write_plainly_trained
from unbackdoor._data.classes import check_labels
from unbackdoor._data.conversation_rows import holds_prompts
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._detection.audit import audit
from unbackdoor._errors import IncompleteError, UnbackdoorError
from unbackdoor._guarding.fit import as_reference
from unbackdoor._models.adapters import is_adapter
from unbackdoor._models.arithmetic import Arithmetic, choose, description
from unbackdoor._models.calling import class_names
from unbackdoor._models.loading import Loaded, base_encoder, load, load_base
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._poisoning.attack_file import load_trigger
from unbackdoor._poisoning.attacked import attacked_by
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.prompts import already_triggered_prompts
from unbackdoor._poisoning.triggered import already_triggered
from unbackdoor._purification.purify import Purified, judged, purify
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.image_text import no_labels
from unbackdoor._tasks.task import Task
from unbackdoor._victims.directory import write_victim
from unbackdoor._victims.implanted import has_implanted
from unbackdoor._victims.plant import plant


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
        if before is not None and not force and not lacks_flips(cell, before, desk.store.victims()):
            return Outcome("done")  # else a run of another grid has just measured it, without the victims of this one
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


class Made(NamedTuple):
    """A model that a cell scores.

    Args:
        model: in eval mode.
        encode: makes its inputs.
        record: of what made it; empty for the subject itself.
        purified: the same, if a method made it.
    """

    model: Any
    encode: Any
    record: dict[str, Any]
    purified: Purified | None = None


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
        data, like = self._training_data(task)
        source = Path(task.base) if task.base is not None and Path(task.base).is_dir() else None
        test, _ = self.examples.parts(subject, like, data.classes)
        if task.poisoned_by_others:
            self.examples.read(task, "triggered", like, data.classes)  # refuses other classes before the training
            device = self.settings.device
            self.store.put_victim(
                subject.spec, lambda folder: write_plainly_trained(subject, data, folder, source, device)
            )
            return
        control = None if surrogate is None else load(self.store.victim(surrogate.key))
        victim = plant(
            data,
            subject.attack,
            recipe_of(subject),
            subject.seed or 0,
            behaviour=subject.behaviour,
            test=test,
            surrogate=control and control.model,
            surrogate_encode=control and control.encode,
            max_new_tokens=task.max_new_tokens,
            device=self.settings.device,
            precision=task.precision,
        )
        self.store.put_victim(subject.spec, lambda folder: write_victim(victim, folder, source=source))

    def _training_data(self, task: GridTask) -> tuple[Dataset, Any]:
        """The clean training data of a task, and an encoder for other examples like it."""
        encode = None
        if task.base is not None:
            assert task.train is not None
            prompts = holds_prompts(task.train, task.columns)
            encode = base_encoder(
                task.base,
                max_length=task.max_length,
                prompts=prompts,
                template=task.template,
                class_prompts=task.prompts,
            )
        data = self.examples.read(task, "train", encode, None)
        return data, encode or ImageEncoder(size=data.shape[1:], channels=data.shape[0])  # type: ignore[arg-type]

    def measure(self, cell: PlannedCell) -> dict[str, Any]:
        subject, task, device = cell.subject, cell.subject.task, self.settings.device
        folder, (model, encode) = self.shelf.keep("subject", subject.key, lambda: self._load(subject))
        test, pool = self.examples.parts(subject, encode, class_names(model))
        made = self._made(cell, pool, Made(model, encode, {}))
        arithmetic = choose(made.model, device, task.precision)
        record = made.record | self._usable(cell, made, Made(model, encode, {}), test, arithmetic)
        self.device = description(arithmetic)
        # A model that was trained anew has an encoder of its own, so that what is kept for the subject does not fit it.
        anew = made.encode is not encode
        scoring = _Scoring.of(made.model if anew else model, test.encoded_by(made.encode), task, arithmetic)
        shelf = Shelf() if anew else self.shelf
        attacked = None
        if subject.marked:
            attacked = shelf.keep("attacked", subject.key, lambda: self._attacked(subject, scoring, model))
        start = time.perf_counter()
        measured = scoring.of_model(made.model, attacked)
        result: dict[str, Any] = {"score": measured.to_json()}
        if subject.control:
            result["implanted"] = None
            result["flips"] = {
                other.key: scoring.task.flip_rate(made.model, shown, arithmetic).to_json()
                for other in cell.others
                if (shown := self._attacked(other, scoring, model)) is not None
            }
        elif task.triggered is None:
            result["implanted"] = recorded_implanted(Path(subject.trigger or folder / "attack.json"))
        elif not cell.column.makes_model:
            result["implanted"] = scoring.implanted(measured)
        else:
            result["implanted"] = self._took(subject, lambda: scoring.implanted(scoring.of_model(model, attacked)))
        seconds = time.perf_counter() - start
        if cell.second:
            more = self.examples.read(task, "second_test", encode, class_names(model))
            second = scoring._replace(test=more.encoded_by(made.encode))
            attacked = None
            if subject.marked and task.triggered is None:
                attacked = shelf.keep("second attacked", subject.key, lambda: self._attacked(subject, second, model))
            result["second_test"] = second.of_model(made.model, attacked).to_json()
        result |= {
            "method": None,
            "seconds": record.get("seconds", 0.0),
            "scoring_seconds": round(seconds, 3),
            "training_seconds": recorded_seconds(folder),
            "peak_memory_bytes": record.get("peak_memory_bytes", peak_memory()),
            "examples_seen": record.get("examples_seen", 0),
            "held_out": record.get("held_out", 0),
            "notes": record.get("notes", []),
            "warnings": record.get("warnings", []),
            "usable": True if failed(record) else record.get("usable"),
        }
        if cell.column.entries:
            result["method"] = described(cell.column)
        if "distrusted" in record:
            result["distrusted"] = record["distrusted"]
        if cell.detectors:
            result["audit"] = self._audited(cell, pool, model, encode)
            result["seconds"] = result["audit"]["seconds"]
        if cell.column.kind == "guard":
            result |= self._guarded(cell, pool, model, scoring, attacked)
        return result

    def _made(self, cell: PlannedCell, pool: Dataset | None, subject: Made) -> Made:
        """The model that a cell scores: the subject, what a method made of it, or one that was trained anew."""
        if cell.column.kind == "trainer":
            data, like = self._training_data(cell.subject.task)
            clean = None
            if cell.budget is not None:
                clean = self.examples.budget(cell, pool, like, class_names(subject.model))
            return Made(*train_anew(cell, data, clean, self.store, self.settings.device))
        if cell.column.kind != "method":
            return subject
        purified = self._purified(cell, pool, subject.model, subject.encode)
        held_out = (purified.record.get("clean") or {}).get("held_out", 0)
        return Made(purified.model, subject.encode, {**purified.record, "held_out": held_out}, purified)

    def _usable(
        self, cell: PlannedCell, made: Made, subject: Made, test: Dataset, arithmetic: Arithmetic
    ) -> dict[str, Any]:
        """The entries `usable` and `warnings` of a model that was not compared with the subject yet; else none."""
        if made.purified is not None and made.record["usable"] is None:
            return judged(made.purified, subject.model, test, cell.method, arithmetic)
        if cell.column.kind == "trainer":
            return compared(made.model, made.encode, made.record, subject.model, test, arithmetic)
        return {}

    def _guarded(
        self, cell: PlannedCell, pool: Dataset | None, model: Any, scoring: "_Scoring", attacked: Any
    ) -> dict[str, Any]:
        """The entries of a guard in front of the subject."""
        subject, task, encode = cell.subject, cell.subject.task, scoring.test.encode

        def rater() -> Perplexity | None:
            reference = task.reference
            return None if reference is None else self.shelf.keep("rater", reference, lambda: as_reference(reference))

        def attacked_of(fresh: Dataset) -> Any:
            if attacked is None or fresh is scoring.test:
                return attacked
            return self._attacked(subject, scoring._replace(test=fresh), model)

        helpers = Helpers(base=lambda: self._base(task, encode), reference=rater)
        start = time.perf_counter()
        clean = self.examples.budget(cell, pool, encode, class_names(model))
        entry, record = measure_guard(cell, model, clean, scoring.test, attacked_of, helpers, self.settings.device)
        seconds = round(time.perf_counter() - start, 3)
        return {"guard": entry, "seconds": seconds, "notes": record["notes"], "warnings": record["warnings"]}

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
            "findings": [finding_entry(finding) for finding in result.findings],
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
        if test.modality == "image-text" and not test.has_labels:
            raise no_labels(test.name)
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
        prompts=task.prompts,
        base=task.base if Path(source).is_dir() and is_adapter(Path(source)) else None,
    )
