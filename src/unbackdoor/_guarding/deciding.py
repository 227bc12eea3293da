"""Deciding about inputs: scores, actions, and the answers that leave the guard."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Texts
from unbackdoor._errors import SENTENCE, UnbackdoorError, printable
from unbackdoor._guarding.guard import Edited, Guard, Learnt, Scored, Suspicious, edits, owner_of, restrains
from unbackdoor._guarding.threshold import alarms
from unbackdoor._models.calling import embeddings
from unbackdoor._models.hooks import removing
from unbackdoor._purification.run import Run
from unbackdoor._tasks.generation import Generation

Action = Literal["pass", "reject", "clean"]

_NOT_FINITE = "the score is not finite, as the model's answer probably is not, so nothing can be judged"


@dataclass(frozen=True)
class Decision:
    """The decision of a guard about one input.

    Args:
        row: number of the input, from 0.
        score: None if there was nothing to score.
        threshold: beyond which scores raise an alarm; None for a guard that changes every input.
        action: `pass`, `reject`, or `clean` for an input or an answer that the guard changed.
        reason: in words.
        output: what the guard made of the input, if the action is `clean`: a changed text, or what the restrained
            model answers, a class or a text.
    """

    row: int
    score: float | None
    threshold: float | None
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
        plain: answers of the model without the guard: class scores, (classes,), or a text for each input. None if
            they were not asked for; None for an input that cannot be judged, or that is changed in any case.
        final: those behind the guard; of rejected inputs they have no meaning.
        edited: the changed inputs by row: the sides of a text, or a conversation.
    """

    decisions: list[Decision]
    scores: Tensor
    plain: list[Any] | None
    final: list[Any] | None
    edited: dict[int, Any]


@dataclass
class Forwards:
    """The number of inputs that went through a model."""

    count: int = 0


@contextmanager
def counting(model: nn.Module, modality: str) -> Iterator[Forwards]:
    """Count the inputs of a model while the block runs.

    A language model looks its tokens up once in each pass. Around one with an adapter, answers take another way in than
    scores do, so passes are counted there.
    """
    passes = Forwards()

    def count(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = arguments[0] if arguments else next(iter(named.values()))
        passes.count += len(inputs)

    entrance = embeddings(model) if modality == "conversations" else model
    with removing([entrance.register_forward_pre_hook(count, with_kwargs=True)]):
        yield passes


@torch.no_grad()
def class_scores(model: nn.Module, data: Dataset, run: Run) -> Tensor:
    """Returns a model's class scores, row by row, (n, classes), on the CPU; the model is on the device of the run."""
    parts: list[Tensor] = []
    rows: list[Tensor] = []
    for batch in data.to(run.arithmetic.device).batches(run.arithmetic.evaluation_batch):
        parts.append(run.scores(model, batch.inputs).cpu())
        rows.append(batch.rows.cpu())
    return torch.cat(parts)[torch.cat(rows).argsort()]


def answers_of(model: nn.Module, data: Dataset, run: Run) -> list[Any]:
    """Returns what a model answers to each input: class scores, (classes,), or of a language model a text."""
    if isinstance(run.task, Generation):
        return run.task.answers(model, data, run.arithmetic)
    return list(class_scores(model, data, run))


def chunks(data: Dataset, run: Run) -> Iterator[Tensor]:
    """Yields the rows of inputs of about the same length, as many as one forward pass takes."""
    items: Any = data.items
    size = run.arithmetic.evaluation_batch
    yield from items.order(size, None).cpu().split(size)


def scored(guard: Guard, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
    """Returns the scores of a few inputs; NaN or infinite where the model's answer is not finite.

    Raises:
        UnbackdoorError: the guard returned something else.
    """
    with torch.no_grad():
        result = guard.scores(model, inputs, learnt, run)
    if not isinstance(result, Scored):
        raise UnbackdoorError(f"{owner_of(guard)}.scores must return a Scored, got {type(result).__name__}.")
    scores = result.scores.detach().cpu().double()
    if scores.shape != (len(inputs),):
        raise UnbackdoorError(
            f"{owner_of(guard)} must give a score for each of {len(inputs)} inputs, got a tensor of shape "
            f"{tuple(scores.shape)}."
        )
    answers = result.answers.cpu() if isinstance(result.answers, Tensor) else result.answers
    return result._replace(scores=scores, answers=answers)


def all_scores(guard: Guard, model: nn.Module, data: Dataset, learnt: Learnt, run: Run) -> Tensor:
    """The scores of inputs, (n,), float64, on the CPU.

    Raises:
        UnbackdoorError: the guard returned something else, or a score is not finite.
    """
    scores = torch.empty(len(data), dtype=torch.float64)
    parts = list(chunks(data, run))
    with run.progress("scoring inputs", len(parts)) as advance:
        for rows in parts:
            scores[rows] = scored(guard, model, data.select(rows), learnt, run).scores
            advance()
    if count := int((~scores.isfinite()).sum()):
        raise UnbackdoorError(
            f"{owner_of(guard)} gives {count:,} of {len(data):,} clean inputs a score that is not finite, as their "
            "answers probably are not. Leave these inputs out, or take `precision='fp32'`."
        )
    return scores


def beyond_judgement(data: Dataset, run: Run) -> dict[int, str]:
    """Returns why some inputs cannot be judged, by row.

    These are texts and prompts without a word, prompts that leave no room for an answer, and texts that hold the token
    at which their model answers more than once; no image is one.
    """
    if isinstance(data.items, Texts):
        special = data.tokenizer.num_special_tokens_to_add(pair=len(data.items.columns) > 1)
        blank = torch.tensor([not any(map(str.strip, sides)) for sides in data.items.strings], dtype=torch.bool)
        rows = torch.nonzero(blank | (data.items.lengths.cpu() <= special)).flatten().tolist()
        encode = data.text_encoder
        others = torch.nonzero(encode.has_other_ends(data.items)).flatten().tolist()
        end = "" if encode.end is None else printable(encode.tokenizer.convert_ids_to_tokens(encode.end))
        return {
            **dict.fromkeys(others, f"the text has the token {end} of its own, and the model answers at the last one"),
            **dict.fromkeys(rows, "the text is empty, so nothing can be judged"),
        }
    if not isinstance(data.items, Conversations):
        return {}
    assert isinstance(run.task, Generation)
    reasons, answer, most = {}, run.task.max_new_tokens, data.conversation_encoder.max_length
    for row, (entry, count) in enumerate(zip(data.items.entries, data.items.tokens.starts.tolist(), strict=True)):
        if not entry.messages[-1].text.strip():
            reasons[row] = "the prompt is empty, so nothing can be judged"
        elif count + answer > most:
            reasons[row] = f"the prompt has {count:,} tokens and an answer {answer:,}, but the model reads {most:,}"
    return reasons


def _strings(data: Dataset) -> list[str]:
    """Texts or prompts as a model reads them."""
    if data.modality == "conversations":
        return data.conversation_encoder.texts(data.conversations)
    return [" | ".join(sides) for sides in data.texts.strings]


def judge(
    guard: Guard,
    model: nn.Module,
    data: Dataset,
    learnt: Learnt,
    threshold: float | None,
    run: Run,
    *,
    answering: bool,
) -> Judged:
    """Decide about inputs.

    Args:
        guard: the guard.
        model: on the device of the run, in eval mode.
        data: the inputs; labels are not read.
        learnt: what the guard fitted.
        threshold: beyond which scores raise an alarm; None for a guard that changes every input.
        run: arithmetic, task and seed.
        answering: whether the model's answers are wanted.
    """
    unjudged = beyond_judgement(data, run)
    judging = _Judging(guard, learnt, threshold, run, data, answering)
    full = torch.tensor([row for row in range(len(data)) if row not in unjudged], dtype=torch.int64)
    parts = [full[rows] for rows in chunks(data.select(full), run)] if len(full) else []
    with run.progress("deciding about inputs", len(parts)) as advance:
        for rows in parts:
            judging.add(model, rows)
            advance()
    for row, reason in unjudged.items():
        judging.decisions[row] = Decision(row, None, threshold, "reject", reason)
    decisions = [judging.decisions[row] for row in range(len(data))]
    return Judged(decisions, judging.scores, judging.plain, judging.final, judging.edited)


def acted(judged: Judged, action: str) -> Tensor:
    """Which inputs got an action, (n,), bool."""
    return torch.tensor([decision.action == action for decision in judged.decisions])


def at_threshold(judged: Judged, threshold: float | None, suspicious: Suspicious) -> Judged:
    """The same scores and answers with the decisions of another threshold, for a guard that only rejects."""
    caught = alarms(judged.scores, threshold, suspicious) | judged.scores.isnan()
    decisions = [
        replace(decision, threshold=threshold, action="reject" if alarm else "pass", reason="")
        for decision, alarm in zip(judged.decisions, caught.tolist(), strict=True)
    ]
    return judged._replace(decisions=decisions)


class _Judging:
    """The decisions and answers, filled a part of the inputs at a time."""

    def __init__(
        self, guard: Guard, learnt: Learnt, threshold: float | None, run: Run, data: Dataset, answering: bool
    ) -> None:
        self.guard, self.learnt, self.threshold, self.run, self.data = guard, learnt, threshold, run, data
        self.decisions: dict[int, Decision] = {}
        self.scores = torch.full((len(data),), torch.nan, dtype=torch.float64)
        self.plain: list[Any] | None = [None] * len(data) if answering else None
        self.final: list[Any] | None = [None] * len(data) if answering else None
        self.edited: dict[int, Any] = {}

    def add(self, model: nn.Module, rows: Tensor) -> None:
        """Decide about the inputs of some rows."""
        part = self.data.select(rows)
        rated = scored(self.guard, model, part, self.learnt, self.run)
        finite = rated.scores.isfinite()
        self.scores[rows] = torch.where(finite, rated.scores, torch.nan)
        caught = alarms(rated.scores, self.threshold, self.guard.suspicious) & finite
        details = rated.details or [""] * len(rows)
        for row, score, alarm, detail in zip(
            rows.tolist(), rated.scores.tolist(), caught.tolist(), details, strict=True
        ):
            reason = self._reason(row, score, alarm, detail)
            self.decisions[row] = Decision(row, score, self.threshold, "reject" if alarm else "pass", reason)
        for row in rows[~finite].tolist():
            self.decisions[row] = Decision(row, None, self.threshold, "reject", _NOT_FINITE)
        if self.plain is not None and self.guard.suspicious != "all":
            given = answers_of(model, part, self.run) if rated.answers is None else rated.answers
            answers = [answer if known else None for answer, known in zip(given, finite.tolist(), strict=True)]
            self._fill(self.plain, rows, answers)
            self._fill(self.final, rows, answers)
        if not bool(caught.any()):
            return
        if editing := edits(self.guard):
            suspicious = self.data.select(rows[caught])
            changed = editing.edited(suspicious, self.learnt, self.threshold, self.run)
            self._edit(model, changed, suspicious, rows[caught])
        elif (restraining := restrains(self.guard)) and self.threshold is not None:
            with restraining.restrained(model, self.learnt, self.threshold, self.run):
                answers = answers_of(model, self.data.select(rows[caught]), self.run)
            self._fill(self.final, rows[caught], answers)
            for row, answer in zip(rows[caught].tolist(), answers, strict=True):
                shown = answer if isinstance(answer, str) else self.data.class_name(int(answer.argmax()))
                self._clean(row, shown)

    def _fill(self, answers: list[Any] | None, rows: Tensor, of_rows: list[Any]) -> None:
        """Put the answers to some rows in their places, if answers are wanted."""
        if answers is not None:
            for row, answer in zip(rows.tolist(), of_rows, strict=True):
                answers[row] = answer

    def _edit(self, model: nn.Module, changed: Edited, before: Dataset, rows: Tensor) -> None:
        """Put changed inputs in place of suspicious ones; one of which nothing is left is rejected."""
        after = replace(before, items=changed.items)
        nothing = beyond_judgement(after, self.run)
        left = torch.tensor([place for place in range(len(rows)) if place not in nothing], dtype=torch.int64)
        if self.final is not None and len(left):
            self._fill(self.final, rows[left], answers_of(model, after.select(left), self.run))
        strings, identities = _strings(after), after.identities()
        for place, row in enumerate(rows.tolist()):
            reason = f"{changed.reasons[place]}; {self.decisions[row].reason}"
            if place not in nothing:
                self.edited[row] = identities[place]
                self._clean(row, strings[place], reason)
            else:
                empty = printable(f"{reason}; nothing is left of the text", SENTENCE)
                self.decisions[row] = replace(self.decisions[row], reason=empty)

    def _clean(self, row: int, output: str, reason: str | None = None) -> None:
        before = self.decisions[row]
        reason = before.reason if reason is None else printable(reason, SENTENCE)
        self.decisions[row] = replace(before, action="clean", output=output, reason=reason)

    def _reason(self, row: int, score: float, alarm: bool, detail: str) -> str:
        if self.threshold is None:
            return f"{self.guard.measure} is {score:.4g}"
        side = "above" if self.guard.suspicious == "high" else "below"
        cut = ""
        if isinstance(self.data.items, Texts) and bool(self.data.items.cut[row]):
            cut = f" (the model reads {self.data.text_encoder.max_length:,} tokens of it)"
        more = printable(f"; {detail}", SENTENCE) if alarm and detail else ""
        return f"{self.guard.measure} is {score:.4g}, {'' if alarm else 'not '}{side} {self.threshold:.4g}{cut}{more}"
