"""A guard at work: with its model on a device."""

from dataclasses import dataclass

from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._guarding.deciding import Forwards, Judged, answers_of, judge
from unbackdoor._guarding.guard import Guard, owner_of
from unbackdoor._models.calling import checked_logits, probe
from unbackdoor._purification.run import Run


class StoredArrays(dict[str, Tensor]):
    """Arrays of a guard that were read from a file: they may have been written by anybody."""


@dataclass(frozen=True, eq=False)
class Work:
    """A guard with its model on a device.

    Args:
        guard: of `unbackdoor.guards`, with its settings.
        learnt: its arrays, on the CPU.
        threshold: beyond which scores raise an alarm; None for a guard that changes every input.
        model: on the device, in eval mode, its weights without gradients.
        run: arithmetic and seed.
        forwards: counts the inputs that went through the model.
    """

    guard: Guard
    learnt: dict[str, Tensor]
    threshold: float | None
    model: nn.Module
    run: Run
    forwards: Forwards

    def with_plain(self, judged: Judged, inputs: Dataset) -> Judged:
        """The same with the model's own answers to all inputs; those that are missing are asked for."""
        assert judged.plain is not None
        missing = [row for row, answer in enumerate(judged.plain) if answer is None]
        some = [row for row in missing if judged.decisions[row].score is not None]  # the others cannot be answered
        plain = list(judged.plain)
        if some:
            filled = inputs.select(some).to(self.run.arithmetic.device)
            for row, answer in zip(some, answers_of(self.model, filled, self.run), strict=True):
                plain[row] = answer
        return judged._replace(plain=plain)

    def judged(self, inputs: Dataset, *, answering: bool) -> Judged:
        """Decide about inputs, with the model's answers if they are wanted.

        Raises:
            UnbackdoorError: the model cannot take the inputs; or the arrays were read from a file, and the guard cannot
                work with them.
        """
        filled = inputs.to(self.run.arithmetic.device)
        try:
            return judge(self.guard, self.model, filled, self.learnt, self.threshold, self.run, answering=answering)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
            if "memory" in str(problem):
                raise
            if filled.modality == "images":  # of another size than the model takes, say: that is a better reason
                checked_logits(self.model, probe(self.model, filled))
            if not isinstance(self.learnt, StoredArrays):
                raise
            reason = printable(f"{type(problem).__name__}: {str(problem).strip()}", 200).rstrip(".")
            raise UnbackdoorError(
                f"{owner_of(self.guard)} cannot work with the arrays of its file ({reason}). Fit the guard again."
            ) from problem
