"""Auto: a purification without a choice to make."""

import logging
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._purification.method import Method
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._choice import choice
from unbackdoor.purifiers._methods_to_try import method_label, methods_to_try
from unbackdoor.purifiers._shortcuts import Shortcut, audited, counting, described, summary
from unbackdoor.purifiers._trial import GONE, Trial

logger = logging.getLogger("unbackdoor")


@value
class Auto:
    """Audit the suspect, try methods from the safest to the cheapest, and keep the first whose result passes.

    Four fifths of the clean examples are for the audits and the methods; the others are held out to judge the results.
    A shortcut counts if the audit raises an alarm. If it has no clean models to compare with, a shortcut counts that
    moves most unseen examples, more than a random trigger does, and whose size is rare among the classes (nominal p at
    most 0.05). The methods are, on images, adaptive unlearning if a shortcut counts, scale-invariant FST at full
    strength, the same in three times the passes, adaptive unlearning if it was not tried yet, and fine-tuning; on texts
    mixing distillation if there is a base, word distillation if a shortcut counts, and fine-tuning.

    A result passes if it loses at most `max_loss` points of accuracy and no class on the held-out examples, if no
    shortcut of the audit moves a tenth more of them than a random trigger does, and if an audit of the result finds no
    shortcut to their classes again. The last matters, because a method that was tuned on the shortcuts of the audit
    removes them, and may leave the backdoor. If none passes, the one within `max_loss` is kept that leaves the least of
    the shortcuts; if there is none, the suspect is handed back unchanged. Both count as not usable. A method that
    unlearns what it finds has a warning if the audit found nothing to test it with. The entry `choice` of the record
    has the audits, each method that was tried, its numbers, whether the result passed, and the reason.

    Examples without labels (`run.unlabelled`) go to the methods that use them, which is scale-invariant FST.

    A variant of this project; its methods name their parents.

    Args:
        max_loss: points of accuracy on the held-out examples that the result may lose, 0 to 100.
        detectors: names of the detectors that audit, see `unbackdoor list detectors`; None takes all that fit the data.

    Differences from the paper: there is no paper on this variant. An audit that finds nothing proves nothing, so the
    suspect is purified all the same, by a shift, which needs no trigger. Backdoors planted on purpose would choose the
    shift as well (docs/results/auto.md), for the price of many purifications more.
    """

    # The first version tried no trigger distillation; the second shifted in ten passes, and unlearned in small steps;
    # the third tried the shift at its defaults first; the fourth shifted with dropout; the fifth tried two rates,
    # where the shift has one now, in steps of equal angles; the sixth shifted few pictures at the rate of many. Up to
    # the seventh the shift stood first where there is evidence as well, and contrastive unlearning and trigger
    # distillation stood in the place of adaptive unlearning; the eighth to tenth had the first three versions of that.
    version: ClassVar[int] = 11
    uses_unlabelled: ClassVar[bool] = True
    needs_head: ClassVar[bool] = True  # the audit does, and most methods that it tries

    max_loss: Annotated[float, Field(ge=0, le=100)] = 10.0
    detectors: tuple[str, ...] | None = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify copies, and return one of them, or the model itself."""
        tuned, held = run.hold_out(clean)
        logger.info("Auto: auditing the suspect; then methods are tried, and each result that passes is audited.")
        report = audited(model, tuned, run, self.detectors)
        shortcuts = counting(report)
        if isinstance(report, str):
            run.warn(f"neither the suspect nor a result can be audited, so nothing shows what stayed: {report}")
        else:
            run.note(f"audit of the suspect: {summary(report, shortcuts)}")
        methods = methods_to_try(tuned, bool(shortcuts), run)
        trials = self._tried(methods, model, tuned, held, shortcuts, run)
        chosen, reason = choice(trials, len(held), self.max_loss, run)
        number = next((place for place, trial in enumerate(trials) if trial is chosen), None)
        again = None
        if chosen is not None and chosen.model is not None:
            run.warnings += chosen.warnings
            if chosen.audit is None:
                chosen = self._audited(chosen, tuned, shortcuts, run)
            assert chosen.audit is not None
            again = described(chosen.audit, counting(chosen.audit))
            for each in counting(chosen.audit):
                if each in chosen.returned or each.judged.p_value is not None:
                    run.warn(f"the audit of the result: {each.sentence}. Look at it, or try another method as well.")
                else:
                    run.note(f"audit of the result: {each.sentence}. Nothing says how rare that is in clean models.")
        passed = False if run.failure else True if chosen is not None and chosen.tested else None
        run.choice = {
            "max_loss": self.max_loss,
            "held_out": len(held),
            "audit": described(report, shortcuts),
            "tried": [trial.to_json() for trial in trials],
            "not_tried": [method_label(method) for method in methods[len(trials) :]],
            "kept": None if chosen is None else method_label(chosen.method),
            "kept_number": number,
            "passed": passed,
            "reason": reason,
            "audit_of_the_result": again,
        }
        run.unseen, run.cross_validated = held, None
        return model if chosen is None or chosen.model is None else chosen.model

    def _tried(
        self,
        methods: list[Method],
        model: nn.Module,
        tuned: Dataset,
        held: Dataset,
        shortcuts: list[Shortcut],
        run: Run,
    ) -> list[Trial]:
        """Try methods until a result passes, that of its own audit included; returns all trials."""
        trials: list[Trial] = []
        for number, method in enumerate(methods):
            left = ", ".join(map(method_label, methods[number + 1 :])) or "no other method"
            logger.info("Auto: trying %s. Left if it does not pass: %s.", method_label(method), left)
            trial = Trial.of(method, model, tuned, held, shortcuts, run)
            if trial.within(self.max_loss / 100, len(held)) and trial.most_left <= GONE:
                trial = self._audited(trial, tuned, shortcuts, run)
            run.note(f"{method_label(method)}: {trial.sentence(len(held))}.")
            trials.append(trial)
            if trial.audit is not None and trial.most_left <= GONE:
                break
        return trials

    def _audited(self, trial: Trial, clean: Dataset, shortcuts: list[Shortcut], run: Run) -> Trial:
        """Returns a trial with the audit of its result."""
        assert trial.model is not None
        logger.info("Auto: auditing the result of %s.", method_label(trial.method))
        report = audited(trial.model, clean, run, self.detectors)
        return replace(trial, audit=report, known=frozenset(each.target for each in shortcuts))
