"""A fitted guard: decisions, a model or a pipeline behind it, and its directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._artifacts import directories
from unbackdoor._artifacts.guard_record import write_guard
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.images import ImageEncoder
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._guarding.deciding import Decision, counting
from unbackdoor._guarding.guard import Guard, is_movable, owner_of
from unbackdoor._guarding.identity import (
    Identity,
    check_model,
    check_reading,
    check_same,
    check_unchanged,
    encoder_hashes,
)
from unbackdoor._guarding.threshold import check_enough, check_rate, threshold_of
from unbackdoor._guarding.turns import turn
from unbackdoor._guarding.work import Work
from unbackdoor._guarding.wrapped import Guarded
from unbackdoor._inversion.search import frozen
from unbackdoor._models.arithmetic import Precision, choose
from unbackdoor._models.calling import check_modules
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._modes import in_own_modes
from unbackdoor._progress import Progress, bar, silent
from unbackdoor._purification.run import Run
from unbackdoor._tasks.choice import task_of


@dataclass(frozen=True, eq=False)
class FittedGuard:
    """A guard that was fitted to one model; `fit_guard` and `load_guard` return it.

    Args:
        guard: of `unbackdoor.guards`, with its settings.
        learnt: its arrays, on the CPU.
        threshold: beyond which scores raise an alarm; None for a guard that changes every input.
        identity: hashes of what it was fitted to.
        encode: makes inputs of the model; its tokenizer or processor is the fitted one.
        seen: hashes of the clean examples, (n,), int64, see `_guarding.fit`.
        reference: the second language model of a guard that needs one.
        record: the other entries of `guard.json`.
        held_out: the scores of the clean examples that set the threshold, (n,); a directory does not keep them.
    """

    guard: Guard
    learnt: dict[str, Tensor] = field(repr=False)
    threshold: float | None
    identity: Identity = field(repr=False)
    encode: Encoder = field(repr=False)
    seen: Tensor = field(repr=False)
    reference: Perplexity | None = field(default=None, repr=False)
    record: dict[str, Any] = field(default_factory=dict, repr=False)
    held_out: Tensor | None = field(default=None, repr=False)

    def at(self, false_alarms: float) -> "FittedGuard":
        """Returns the guard with the threshold of another share of false alarms; the score of an input is the same.

        Args:
            false_alarms: share of clean inputs that may raise an alarm, in (0, 1).

        Raises:
            UnbackdoorError: it was loaded, has a threshold of its own or none, or there were too few clean examples.
        """
        check_rate(false_alarms)
        if self.guard.suspicious == "all" or not is_movable(self.guard):
            what = "changes every input" if self.guard.suspicious == "all" else "sets its own threshold"
            raise UnbackdoorError(f"{owner_of(self.guard)} {what}, so no share of false alarms moves it. Leave it out.")
        if self.held_out is None:
            raise UnbackdoorError(
                "The scores that set the threshold are not in the directory of a guard. Fit the guard again for "
                "another `false_alarms`."
            )
        check_enough(self.record["clean"]["n"], false_alarms, "`clean`")
        asked = {**self.record["false_alarms"], "asked": false_alarms}
        threshold = threshold_of(self.held_out, false_alarms, self.guard.suspicious)
        return replace(self, threshold=threshold, record={**self.record, "false_alarms": asked})

    @in_own_modes
    def decide(
        self,
        model: nn.Module,
        inputs: Dataset,
        *,
        device: str | None = None,
        precision: Precision = "auto",
        progress: bool = False,
    ) -> list[Decision]:
        """Decide about inputs; their labels are not read.

        Args:
            model: the model that the guard was fitted to; it is not changed.
            inputs: read with the encoder that the guard was fitted with.
            device: None uses a GPU if there is one.
            precision: see `unbackdoor._models.arithmetic.choose`.
            progress: show a progress bar on stderr.

        Raises:
            UnbackdoorError: the guard was fitted to another model, tokenizer, template or processor.
        """
        self.check(model, inputs)
        with self.at_work(model, device, precision, bar if progress else silent) as work:
            decisions = work.judged(inputs, answering=False).decisions
        check_unchanged(self.guard, model, self.identity.model)
        return decisions

    def wrap(self, model: Any, *, device: str | None = None, precision: Precision = "auto") -> Guarded:
        """Returns the model behind the guard: it takes inputs, and returns a decision and an answer for each.

        If the weights change later on, the next call is refused.

        Args:
            model: the model that the guard was fitted to, or a pipeline of transformers around it.
            device: None uses a GPU if there is one; a pipeline answers on its own device.
            precision: see `unbackdoor._models.arithmetic.choose`; a pipeline answers in its own.

        Raises:
            UnbackdoorError: the guard was fitted to another model or tokenizer.
        """
        guarded = Guarded(self, model, device, precision)
        guarded.check()
        return guarded

    def check(self, model: Any, inputs: Dataset | None) -> None:
        """Refuse a model, or inputs, that the guard was not fitted to.

        Raises:
            UnbackdoorError: says which part differs.
        """
        check_modules("A guard", model=model)
        check_model(self.identity.model, model)
        if inputs is not None:
            self.check_inputs(inputs)

    def check_inputs(self, inputs: Dataset) -> None:
        """Refuse inputs that the guard was not fitted to.

        Raises:
            UnbackdoorError: there are none, or they are of another kind, or for another tokenizer or processor.
        """
        if not isinstance(inputs, Dataset):
            raise UnbackdoorError(
                f"decide takes inputs as a Dataset, got {type(inputs).__name__}. Load it with unbackdoor.Dataset.load, "
                "or wrap the model."
            )
        if inputs.modality != self.record["modality"]:
            raise UnbackdoorError(
                f"The guard was fitted to {self.record['modality']}, and {printable(inputs.name)} holds "
                f"{inputs.modality}. Give other inputs."
            )
        if len(inputs) == 0:
            raise UnbackdoorError(f"{inputs.name} is empty; at least one input is needed.")
        check_reading(inputs.encode, self.record["max_length"], self.record.get("template"))
        texts = self.record.get("texts")  # absent in older records
        if texts is not None and inputs.modality == "text" and len(inputs.texts.columns) != texts:
            kinds = ("single texts", "pairs of texts")
            raise UnbackdoorError(
                f"The guard was fitted to {kinds[texts - 1]}, and {printable(inputs.name)} holds {kinds[2 - texts]}. "
                f"Give {kinds[texts - 1]}."
            )
        if isinstance(inputs.encode, ImageEncoder) and inputs.encode.channels not in (None, inputs.shape[0]):
            raise UnbackdoorError(
                f"The guard takes pictures with {inputs.encode.channels} channels, as its model does, and "
                f"{printable(inputs.name)} has pictures with {inputs.shape[0]}. Convert them."
            )
        for part, digest in encoder_hashes(inputs.encode).items():
            check_same(part, getattr(self.identity, part), digest)

    @contextmanager
    def at_work(
        self, model: nn.Module, device: str | None, precision: Precision, progress: Progress = silent
    ) -> Iterator[Work]:
        """The guard with a model that was checked, while no other thread uses it; it is the same after the block."""
        arithmetic = choose(model, device, precision)
        run = Run(
            generator=torch.Generator().manual_seed(self.record["seed"]),
            arithmetic=arithmetic,
            head_name=self.record["head"],
            modality=self.record["modality"],
            task=task_of(self.encode, max_new_tokens=self.record.get("max_new_tokens")),
            progress=progress,
            reference=self.reference,
        )
        with (
            turn(model),
            arithmetic.placed(model) as placed,
            frozen(placed),
            counting(placed, run.modality) as forwards,
        ):
            yield Work(self.guard, self.learnt, self.threshold, placed, run, forwards)

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write `guard.json` and `guard.safetensors` into a directory, complete or not at all.

        Args:
            out: its name.
            overwrite: replace a directory that unbackdoor wrote.

        Raises:
            UnbackdoorError: the directory exists or cannot be made.
        """
        earlier = directories.check_free(Path(out), overwrite=overwrite)
        with directories.directory(Path(out), earlier) as folder:
            self.write(folder)

    def write(self, folder: Path, **more: Any) -> dict[str, Any]:
        """Fill a directory; returns the content of its `guard.json`, with further entries."""
        content = {**self.record, "threshold": self.threshold, "identity": vars(self.identity), **more}
        return write_guard(folder, content, {**self.learnt, "seen": self.seen})
