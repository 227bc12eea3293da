"""How well a guard does: false alarms on fresh data, missed attacks, the area under its curve, and its cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._guarding.area import Area
from unbackdoor._guarding.cost import Cost
from unbackdoor._guarding.deciding import Judged, acted, at_threshold
from unbackdoor._guarding.fit import hashes
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.guard import only_rejects
from unbackdoor._guarding.identity import check_unchanged
from unbackdoor._guarding.prompt_score import PromptGuardScore, score_of_prompts
from unbackdoor._guarding.work import Work
from unbackdoor._models.arithmetic import Precision
from unbackdoor._modes import in_own_modes
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.prompts import TriggeredPrompts
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered
from unbackdoor._progress import bar, silent
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.generation import Generation
from unbackdoor._tasks.proportion import Proportion, proportion_of
from unbackdoor._tasks.task import Asked


@dataclass(frozen=True)
class GuardScore:
    """How well a guard does on data that it was not fitted to.

    Args:
        false_alarms: clean examples that raise an alarm.
        accuracy: the model's accuracy on the clean examples that are not rejected, with the answers behind the guard;
            None if all are rejected.
        accuracy_without: on all clean examples, without the guard.
        cost: forward passes for each input.
        missed: triggered examples that pass; or that were changed, and still are classified as the attacker wants.
            None without triggered examples, as the following.
        attack_success: triggered examples that are classified as the attacker wants, behind the guard.
        attack_success_without: the same without the guard.
        area: under the curve of the scores.
        label_rule: of the attack.
    """

    false_alarms: Proportion
    accuracy: Proportion | None
    accuracy_without: Proportion
    cost: Cost
    missed: Proportion | None = None
    attack_success: Proportion | None = None
    attack_success_without: Proportion | None = None
    area: Area | None = None
    label_rule: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All numbers, each with n and, if it is a share, its interval."""
        entries = {
            "false_alarms": self.false_alarms,
            "missed_attacks": self.missed,
            "auc": self.area,
            "accuracy_of_what_passes": self.accuracy,
            "accuracy_without_guard": self.accuracy_without,
            "attack_success": self.attack_success,
            "attack_success_without_guard": self.attack_success_without,
            "forwards_per_input": self.cost,
        }
        shown = {key: None if entry is None else entry.to_json() for key, entry in entries.items()}
        return {**shown, "label_rule": self.label_rule}

    def __repr__(self) -> str:
        lines: list[tuple[str, object]] = [("false alarms", self.false_alarms)]
        if self.missed is not None:
            lines += [("missed attacks", self.missed), ("area under the curve", self.area)]
            lines += [
                ("attack success", self.attack_success),
                ("  without the guard", self.attack_success_without),
            ]
        lines += [("accuracy of what passes", self.accuracy), ("  without the guard", self.accuracy_without)]
        lines += [("forward passes per input", self.cost)]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {'-' if entry is None else repr(entry)}" for name, entry in lines)


@in_own_modes
def evaluate_guard(
    fitted: FittedGuard,
    model: nn.Module,
    test: Dataset,
    *,
    attack: "Attack | Trigger | str | Path | None" = None,
    triggered_data: Dataset | None = None,
    target: int | None = None,
    trigger: str | None = None,
    behaviour: Behaviour | str | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> GuardScore | PromptGuardScore:
    """Score a guard on fresh clean examples, and on triggered ones.

    Args:
        fitted: the guard.
        model: that it was fitted to; it is not changed.
        test: clean labelled examples, or prompts; those that the guard was fitted on are left out.
        attack: the attack whose trigger is put on them: a value, a `Trigger`, or a path to `attack.json`.
        triggered_data: instead of `attack`, examples that already carry a trigger, with their true labels.
        target: the attacker's class, with `triggered_data`.
        trigger: for a language model, instead of `attack`: text that is put in front of the last message of each
            prompt.
        behaviour: with `trigger` or `triggered_data` of a language model: the answer that the attacker wants, as
            contains:TEXT, starts-with:TEXT, equals:TEXT or refuses.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a progress bar on stderr.

    Raises:
        UnbackdoorError: the guard was fitted to another model, tokenizer, template or processor, or the data do not
            fit.
    """
    asked = Asked(attack, triggered_data, target, trigger, behaviour)
    task = task_of(fitted.encode, max_new_tokens=fitted.record.get("max_new_tokens"))
    task.check_asked(asked)
    fitted.check(model, test)
    fresh = unseen(fitted, test)
    fitting = task.checked(model, fresh, triggered_data)
    attacked: Triggered | TriggeredPrompts | None = task.attacked(fitting, asked)
    (score,) = scores_at([fitted], model, fitting.test, attacked, device=device, precision=precision, progress=progress)
    return score


def scores_at(
    guards: Sequence[FittedGuard],
    model: nn.Module,
    test: Dataset,
    attacked: Triggered | TriggeredPrompts | None,
    *,
    device: str | None = None,
    precision: Precision = "auto",
    progress: bool = False,
) -> list[GuardScore | PromptGuardScore]:
    """The scores of one fitted guard at several thresholds; a guard that only rejects scores each input once.

    Args:
        guards: the guard at each threshold, see `FittedGuard.at`.
        model: that it was fitted to; it is not changed.
        test: clean examples that the guard was not fitted on.
        attacked: triggered examples; None for none.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: show a progress bar on stderr.
    """
    scores = []
    answered: _Answered | None = None
    for fitted in guards:
        if answered is not None and only_rejects(fitted.guard):
            answered = answered.at(fitted)
        else:
            with fitted.at_work(model, device, precision, bar if progress else silent) as work:
                answered = _Answered.of(work, fitted, test, attacked)
        scores.append(answered.score(fitted, test, attacked))
    check_unchanged(guards[0].guard, model, guards[0].identity.model)
    return scores


class _Answered(NamedTuple):
    """Clean and triggered inputs behind a guard, and what they cost."""

    clean: Judged
    marked: Judged | None
    cost: Cost

    @classmethod
    def of(
        cls, work: Work, fitted: FittedGuard, test: Dataset, attacked: Triggered | TriggeredPrompts | None
    ) -> "_Answered":
        before = 0 if fitted.reference is None else fitted.reference.forwards
        clean = work.judged(test, answering=True)
        marked = None if attacked is None else work.judged(attacked.data, answering=True)
        cost = _cost(work, before, len(test) + (0 if attacked is None else len(attacked.data)))
        if isinstance(work.run.task, Generation):
            clean = work.with_plain(clean, test)
            marked = None if marked is None or attacked is None else work.with_plain(marked, attacked.data)
        return cls(clean, marked, cost)

    def at(self, fitted: FittedGuard) -> "_Answered":
        """The same scores and answers with the decisions of another threshold."""
        marked = None if self.marked is None else at_threshold(self.marked, fitted.threshold, fitted.guard.suspicious)
        return _Answered(at_threshold(self.clean, fitted.threshold, fitted.guard.suspicious), marked, self.cost)

    def score(
        self, fitted: FittedGuard, test: Dataset, attacked: Triggered | TriggeredPrompts | None
    ) -> GuardScore | PromptGuardScore:
        """The numbers of these inputs."""
        if test.modality == "conversations":
            wanted = attacked.behaviour if isinstance(attacked, TriggeredPrompts) else None
            return score_of_prompts(fitted, self.clean, self.marked, wanted, self.cost)
        assert not isinstance(attacked, TriggeredPrompts)
        return score_of(fitted, self.clean, test.labels.cpu(), attacked, self.marked, self.cost)


def unseen(fitted: FittedGuard, test: Dataset) -> Dataset:
    """The test examples that the guard was not fitted on."""
    known = torch.isin(hashes(test), fitted.seen)
    if bool(known.all()):
        raise UnbackdoorError(
            f"{test.name} holds only examples that the guard was fitted on; scores need others. Give other `test`."
        )
    return test if not bool(known.any()) else test.select(torch.nonzero(~known).flatten())


def _cost(work: Work, before: int, count: int) -> Cost:
    reference = work.run.reference
    after = 0 if reference is None else reference.forwards
    return Cost(work.forwards.count / count, (after - before) / count, count)


def score_of(
    fitted: FittedGuard, clean: Judged, labels: Tensor, attacked: Triggered | None, marked: Judged | None, cost: Cost
) -> GuardScore:
    """The numbers of clean and of triggered inputs."""
    assert clean.plain is not None and clean.final is not None  # noqa: PT018
    let_through = acted(clean, "pass") | acted(clean, "clean")
    right = _classes(clean.final) == labels
    shares = {
        "false_alarms": proportion_of(~acted(clean, "pass")),
        "accuracy": proportion_of(right[let_through]) if bool(let_through.any()) else None,
        "accuracy_without": proportion_of(_classes(clean.plain) == labels),
    }
    if attacked is None or marked is None:
        return GuardScore(**shares, cost=cost)  # type: ignore[arg-type]
    assert marked.plain is not None and marked.final is not None  # noqa: PT018
    wanted = attacked.wanted.cpu()
    reached = _classes(marked.final) == wanted
    passed, changed = acted(marked, "pass"), acted(marked, "clean")
    kept, caught = (scores[~scores.isnan()] for scores in (clean.scores, marked.scores))
    return GuardScore(
        **shares,  # type: ignore[arg-type]
        cost=cost,
        missed=proportion_of(passed | (changed & reached)),
        attack_success=proportion_of((passed | changed) & reached),
        attack_success_without=proportion_of(_classes(marked.plain) == wanted),
        area=Area.of(kept, caught, fitted.guard.suspicious),
        label_rule=attacked.label_rule,
    )


def _classes(answers: list[Tensor | None]) -> Tensor:
    """The classes of answers, (n,), int64; -1 for an input that was not answered."""
    return torch.tensor([-1 if answer is None else int(answer.argmax()) for answer in answers])
