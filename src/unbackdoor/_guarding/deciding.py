"""Deciding about inputs: scores, actions, and the answers that leave the guard."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Texts
from unbackdoor._errors import SENTENCE, UnbackdoorError, printable
from unbackdoor._guarding.guard import Edited, Guard, Learnt, Scored, edits, owner_of, restrains
from unbackdoor._guarding.threshold import alarms
from unbackdoor._models.hooks import removing
from unbackdoor._purification.run import Run

Action = Literal["pass", "reject", "clean"]


@dataclass(frozen=True)
class Decision:
    """What a guard decided about one input.

    Args:
        row: number of the input, from 0.
        score: None if there was nothing to score.
        threshold: beyond which scores raise an alarm.
        action: `pass`, `reject`, or `clean` for an input or an answer that the guard changed.
        reason: in words.
        output: what the guard made of the input, where the action is `clean`: a changed text, or the class that the
            restrained model answers.
    """

    row: int
    score: float | None
    threshold: float
    action: Action
    reason: str
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Its line in `decisions.jsonl`."""
        entry = {name: entry for name, entry in vars(self).items() if name != "output"}
        return entry if self.output is None else {**entry, "output": self.output}


class Judged(NamedTuple):
    """Inputs behind a guard.

    Args:
        decisions: one for each input.
        scores: (n,), float64; NaN for an input without anything to score.
        plain: class scores of the model without the guard, (n, classes); None if they were not asked for.
        final: those behind the guard; rows of rejected inputs have no meaning.
        edited: the changed texts by row.
    """

    decisions: list[Decision]
    scores: Tensor
    plain: Tensor | None
    final: Tensor | None
    edited: dict[int, tuple[str, ...]]


@dataclass
class Forwards:
    """The number of inputs that went through a model."""

    count: int = 0


@contextmanager
def counting(model: nn.Module) -> Iterator[Forwards]:
    """Count the inputs of a model while the block runs."""
    made = Forwards()

    def count(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = given[0] if given else next(iter(named.values()))
        made.count += len(inputs)

    with removing([model.register_forward_pre_hook(count, with_kwargs=True)]):
        yield made


@torch.no_grad()
def class_scores(model: nn.Module, data: Dataset, run: Run) -> Tensor:
    """Returns a model's class scores, row by row, (n, classes), on the CPU; the model is on the device of the run."""
    parts: list[Tensor] = []
    rows: list[Tensor] = []
    for batch in data.to(run.arithmetic.device).batches(run.arithmetic.evaluation_batch):
        parts.append(run.scores(model, batch.inputs).cpu())
        rows.append(batch.rows.cpu())
    return torch.cat(parts)[torch.cat(rows).argsort()]


def chunks(data: Dataset, run: Run) -> Iterator[Tensor]:
    """Yields the rows of inputs of about the same length, as many as one forward pass takes."""
    items: Any = data.items
    size = run.arithmetic.evaluation_batch
    yield from items.order(size, None).cpu().split(size)


def scored(guard: Guard, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
    """Returns the scores of a few inputs, checked.

    Raises:
        UnbackdoorError: the guard returned something else.
    """
    with torch.no_grad():
        made = guard.scores(model, inputs, learnt, run)
    scores = made.scores.detach().cpu().double()
    if scores.shape != (len(inputs),) or not torch.isfinite(scores).all():
        raise UnbackdoorError(
            f"{owner_of(guard)} must give a finite score for each of {len(inputs)} inputs, got a tensor of shape "
            f"{tuple(scores.shape)}."
        )
    return made._replace(scores=scores, answers=None if made.answers is None else made.answers.cpu())


def all_scores(guard: Guard, model: nn.Module, data: Dataset, learnt: Learnt, run: Run) -> Tensor:
    """The scores of inputs, (n,), float64, on the CPU."""
    scores = torch.empty(len(data), dtype=torch.float64)
    parts = list(chunks(data, run))
    with run.progress("scoring inputs", len(parts)) as advance:
        for rows in parts:
            scores[rows] = scored(guard, model, data.select(rows), learnt, run).scores
            advance()
    return scores


def empty_rows(data: Dataset) -> Tensor:
    """Which texts have no word, or a pair two empty sides, (n,), bool; no image is empty."""
    if not isinstance(data.items, Texts):
        return torch.zeros(len(data), dtype=torch.bool)
    special = data.tokenizer.num_special_tokens_to_add(pair=len(data.items.columns) > 1)
    blank = torch.tensor([not any(map(str.strip, sides)) for sides in data.items.strings], dtype=torch.bool)
    tokenless: Tensor = data.items.lengths.cpu() <= special
    return blank | tokenless


def judge(
    guard: Guard, model: nn.Module, data: Dataset, learnt: Learnt, threshold: float, run: Run, *, answering: bool
) -> Judged:
    """Decide about inputs.

    Args:
        guard: the guard.
        model: on the device of the run, in eval mode.
        data: the inputs; labels are not read.
        learnt: what the guard fitted.
        threshold: beyond which scores raise an alarm.
        run: arithmetic and seed.
        answering: whether the model's answers are wanted.
    """
    empty = empty_rows(data)
    made = _Judging(guard, learnt, threshold, run, data)
    full = torch.nonzero(~empty).flatten()
    parts = [full[rows] for rows in chunks(data.select(full), run)] if len(full) else []
    with run.progress("deciding about inputs", len(parts)) as advance:
        for rows in parts:
            made.add(model, rows, answering)
            advance()
    for row in torch.nonzero(empty).flatten().tolist():
        made.decisions[row] = Decision(row, None, threshold, "reject", "the text is empty, so nothing can be judged")
    decisions = [made.decisions[row] for row in range(len(data))]
    return Judged(decisions, made.scores, made.plain, made.final, made.edited)


class _Judging:
    """The decisions and answers, filled a part of the inputs at a time."""

    def __init__(self, guard: Guard, learnt: Learnt, threshold: float, run: Run, data: Dataset) -> None:
        self.guard, self.learnt, self.threshold, self.run, self.data = guard, learnt, threshold, run, data
        self.decisions: dict[int, Decision] = {}
        self.scores = torch.full((len(data),), torch.nan, dtype=torch.float64)
        self.plain: Tensor | None = None
        self.final: Tensor | None = None
        self.edited: dict[int, tuple[str, ...]] = {}

    def add(self, model: nn.Module, rows: Tensor, answering: bool) -> None:
        """Decide about the inputs of some rows."""
        part = self.data.select(rows)
        found = scored(self.guard, model, part, self.learnt, self.run)
        self.scores[rows] = found.scores
        caught = alarms(found.scores, self.threshold, self.guard.suspicious)
        for row, score, alarm in zip(rows.tolist(), found.scores.tolist(), caught.tolist(), strict=True):
            self.decisions[row] = Decision(
                row, score, self.threshold, "reject" if alarm else "pass", self._reason(row, score, alarm)
            )
        if answering:
            answers = found.answers if found.answers is not None else class_scores(model, part, self.run)
            if self.plain is None or self.final is None:
                self.plain = torch.zeros(len(self.data), answers.shape[1], dtype=answers.dtype)
                self.final = self.plain.clone()
            self.plain[rows], self.final[rows] = answers, answers
        if not bool(caught.any()):
            return
        if editing := edits(self.guard):
            suspicious = self.data.select(rows[caught])
            self._edit(
                model,
                editing.edited(suspicious, self.learnt, self.threshold, self.run),
                suspicious,
                rows[caught],
                answering,
            )
        elif restraining := restrains(self.guard):
            with restraining.restrained(model, self.learnt):
                answers = class_scores(model, self.data.select(rows[caught]), self.run)
            if self.final is not None:
                self.final[rows[caught]] = answers
            for row, answer in zip(rows[caught].tolist(), answers.argmax(dim=1).tolist(), strict=True):
                self._clean(row, self.data.class_name(answer))

    def _edit(self, model: nn.Module, changed: Edited, before: Dataset, rows: Tensor, answering: bool) -> None:
        """Put changed texts in place of suspicious ones; a text of which nothing is left is rejected."""
        after = replace(before, items=changed.items)
        left = ~empty_rows(after)
        if answering and self.final is not None and bool(left.any()):
            self.final[rows[left]] = class_scores(model, after.select(torch.nonzero(left).flatten()), self.run)
        for place, row in enumerate(rows.tolist()):
            strings = after.texts.strings[place]
            reason = f"{changed.reasons[place]}; {self.decisions[row].reason}"
            if left[place]:
                self.edited[row] = strings
                self._clean(row, " | ".join(strings), reason)
            else:
                nothing = printable(f"{reason}; nothing is left of the text", SENTENCE)
                self.decisions[row] = replace(self.decisions[row], reason=nothing)

    def _clean(self, row: int, output: str, reason: str | None = None) -> None:
        before = self.decisions[row]
        reason = before.reason if reason is None else printable(reason, SENTENCE)
        self.decisions[row] = replace(before, action="clean", output=output, reason=reason)

    def _reason(self, row: int, score: float, alarm: bool) -> str:
        side = "above" if self.guard.suspicious == "high" else "below"
        cut = ""
        if isinstance(self.data.items, Texts) and bool(self.data.items.cut[row]):
            cut = f" (the model reads {self.data.text_encoder.max_length:,} tokens of it)"
        return f"{self.guard.measure} is {score:.4g}, {'' if alarm else 'not '}{side} {self.threshold:.4g}{cut}"
