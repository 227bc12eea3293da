"""The page about a purified language model: prompts with the trigger marked, and the answers before and after."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import SENTENCE, printable
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import device_of
from unbackdoor._poisoning.prompts import TriggeredPrompts
from unbackdoor._reports.examples import EXAMPLES, marked
from unbackdoor._reports.page import facts_of
from unbackdoor._reports.sentences import caution, percent
from unbackdoor._tasks.generation import Generation
from unbackdoor._tasks.generation_score import GenerationScore

_SHOWN = 400  # characters of an answer


class Answering(NamedTuple):
    """One model on the page.

    Args:
        name: `suspect` for the first, the method's name for the other.
        model: the model that answers.
        score: score of the model.
    """

    name: str
    model: nn.Module
    score: GenerationScore


class ShownAnswer(NamedTuple):
    """An answer, and whether it shows the behaviour that the attacker wants."""

    text: str
    shown: bool


@dataclass(frozen=True)
class Prompt:
    """One test prompt with the answers of each model.

    Args:
        pieces: pieces of its last message in order, and whether each belongs to the trigger.
        answers: the answer of each model to it.
        without: the answer of each model to the same prompt without the trigger; empty if that is not known.
    """

    pieces: tuple[tuple[str, bool], ...]
    answers: tuple[ShownAnswer, ...]
    without: tuple[ShownAnswer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswersPage:
    """The content of the page.

    Args:
        title: title of the page.
        verdict: one plain sentence.
        caution: the limits of the verdict.
        names: names of the models, the suspect first.
        measures: name, meaning and the value of each model in words.
        prompts: examples.
        behaviour: the rule of the attacker; None without an attack.
        facts: settings and costs, as label and text.
        unusable: why the last model is not usable; None if it is.
        warnings: the other warnings of the purification.
        command: the command that repeats the run, if known.
    """

    title: str
    verdict: str
    caution: str
    names: tuple[str, ...]
    measures: tuple[tuple[str, str, tuple[str, ...]], ...]
    prompts: tuple[Prompt, ...]
    behaviour: str | None
    facts: tuple[tuple[str, str], ...]
    unusable: str | None
    warnings: tuple[str, ...]
    command: str | None


_MEANINGS = (
    ("clean_loss", "Clean loss", "cross-entropy per token of the right answers, in nats; lower is better"),
    ("attack_success", "Attack success", "triggered prompts whose answer shows the behaviour; lower is better"),
    ("false_activation", "False activation", "the same prompts without the trigger whose answer shows it"),
    ("empty", "Empty answers", "of all that were decoded; they never show the behaviour"),
    ("clean_model_flip_rate", "Clean model", "triggered prompts at which a model without the backdoor shows it"),
)


def build_answers(
    title: str,
    models: list[Answering],
    test: Dataset,
    attacked: TriggeredPrompts | None,
    record: dict[str, Any],
) -> AnswersPage:
    """Collect the content of the page; the prompts are drawn by the record's seed, not by outcome.

    Args:
        title: title of the page.
        models: the suspect, then the purified model.
        test: the prompts that were scored.
        attacked: the triggered ones.
        record: the content of `record.json`.
    """
    usable = record.get("usable") is not False
    warnings = [printable(text, SENTENCE) for text in record.get("warnings", ())]
    scores = [model.score for model in models]
    return AnswersPage(
        title=title,
        verdict=_verdict(models),
        caution=caution(scores[0].attack_success, "one trigger and one rule for answers"),
        names=tuple(model.name for model in models),
        measures=tuple(
            (name, meaning, tuple(repr(getattr(score, field)) for score in scores))
            for field, name, meaning in _MEANINGS
            if getattr(scores[0], field) is not None
        ),
        prompts=_prompts(models, test, attacked, int(record.get("seed") or 0)),
        behaviour=None if attacked is None else printable(str(attacked.behaviour)),
        facts=facts_of(record, len(test), None),
        unusable=None if usable else warnings[0],
        warnings=tuple(warnings[not usable :]),
        command=record.get("command"),
    )


def _prompts(
    models: list[Answering], test: Dataset, attacked: TriggeredPrompts | None, seed: int
) -> tuple[Prompt, ...]:
    shown = test if attacked is None else attacked.data
    rows = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed))[:EXAMPLES].sort().values
    chosen = shown.select(rows)
    plain = None if attacked is None or attacked.plain is None else attacked.plain.select(rows)
    task = Generation(models[0].score.max_new_tokens or Generation().max_new_tokens)
    shows = (lambda _: False) if attacked is None else attacked.behaviour.shown

    def answered(data: Dataset) -> list[tuple[ShownAnswer, ...]]:
        columns = [task.answers(model.model, data, choose(model.model, device_of(model.model))) for model in models]
        return [
            tuple(ShownAnswer(printable(text, _SHOWN), shows(text)) for text in row)
            for row in zip(*columns, strict=True)
        ]

    with_trigger = answered(chosen)
    without = [()] * len(chosen) if plain is None else answered(plain)
    prompts = []
    for row, entry in enumerate(chosen.conversations.entries):
        after = entry.messages[-1].text
        before = after if plain is None else plain.conversations.entries[row].messages[-1].text
        prompts.append(Prompt(tuple(marked(before, after)), with_trigger[row], without[row]))
    return tuple(prompts)


def _verdict(models: list[Answering]) -> str:
    before, after = models[0].score, models[-1].score
    sentences = []
    if before.attack_success is not None and after.attack_success is not None:
        first, last = (percent(score.attack_success.value) for score in (before, after) if score.attack_success)
        sentences.append(
            f"With the trigger, {first} of the answers showed the behaviour ({printable(before.behaviour)}) before, "
            f"and {last} after {models[-1].name}."
        )
    if before.clean_loss is not None and after.clean_loss is not None:
        first, last = (f"{loss.value:.3f}" for loss in (before.clean_loss, after.clean_loss))
        sentences.append(f"The loss on clean answers went from {first} to {last} nats per token.")
    return " ".join(sentences)
