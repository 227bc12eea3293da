"""Auto: a purification without a choice to make."""

import logging
from typing import Annotated

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._purification.method import Method, method_name
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._shortcuts import audited, counting, described, summary
from unbackdoor.purifiers._trial import GONE, Trial
from unbackdoor.purifiers.contrastive_unlearning import ContrastiveUnlearning
from unbackdoor.purifiers.fine_tuning import FineTuning
from unbackdoor.purifiers.mixing_distillation import MixingDistillation
from unbackdoor.purifiers.scale_invariant_fst import ScaleInvariantFST
from unbackdoor.purifiers.word_distillation import WordDistillation

logger = logging.getLogger("unbackdoor")


@value
class Auto:
    """Audit the suspect, try methods from the safest to the cheapest, keep the first that passes, and audit the result.

    Four fifths of the clean examples are for the audits and the methods; the others are held out to judge the results.
    A shortcut counts if the audit raises an alarm. If it has no clean models to compare with, a shortcut counts that
    moves most unseen examples, more than a random trigger does, and whose size is rare among the classes (nominal p at
    most 0.05). The methods are, on images, scale-invariant FST at full strength, which has the best worst case of those
    measured, contrastive unlearning and fine-tuning; on texts mixing distillation if there is a base, word distillation
    if a shortcut counts, and fine-tuning.

    A result passes if it loses at most `max_loss` points of accuracy on the held-out examples, and if no shortcut of
    the audit moves a tenth more of them than a random trigger does. If none passes, the one within `max_loss` is kept
    that leaves the least of the shortcuts; if there is none, the suspect is handed back unchanged. Both have a warning.
    The entry `choice` of the record has the audits, each method that was tried, its numbers, and the reason.

    A variant of this project; its methods name their parents.

    Args:
        max_loss: points of accuracy on the held-out examples that the result may lose, 0 to 100.
        detectors: names of the detectors that audit, see `unbackdoor list detectors`; None takes all that fit the data.

    Differences from the paper: there is no paper on this variant. An audit that finds nothing proves nothing, so the
    suspect is purified all the same. To unlearn the found shortcuts alone is not the first choice, because on small
    victims it left more of a backdoor than the shift did (docs/results/auto.md). Backdoors planted on purpose do not
    help to choose: it has not been measured yet whether they tell methods apart.
    """

    max_loss: Annotated[float, Field(ge=0, le=100)] = 10.0
    detectors: tuple[str, ...] | None = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify copies, and return one of them, or the model itself."""
        tuned, held = run.hold_out(clean)
        logger.info("Auto: auditing the suspect; then at most 3 methods, and an audit of the result, are left.")
        report = audited(model, tuned, run, self.detectors)
        shortcuts = counting(report)
        run.note(f"audit of the suspect: {summary(report, shortcuts)}")
        methods = _methods(clean.modality, bool(shortcuts), run)
        trials: list[Trial] = []
        for number, method in enumerate(methods):
            left = " and ".join(map(method_name, methods[number + 1 :])) or "no other method"
            logger.info("Auto: trying %s. Left if it does not pass: %s.", method_name(method), left)
            trials.append(Trial.of(method, model, tuned, held, shortcuts, run))
            run.note(f"{method_name(method)}: {trials[-1].sentence(len(held))}.")
            if trials[-1].within(self.max_loss / 100, len(held)) and trials[-1].most_left <= GONE:
                break
        chosen, reason = self._chosen(trials, len(held), run)
        run.warnings += [] if chosen is None else chosen.warnings
        run.choice = {
            "max_loss": self.max_loss,
            "held_out": len(held),
            "audit": described(report, shortcuts),
            "tried": [trial.to_json() for trial in trials],
            "not_tried": [method_name(method) for method in methods[len(trials) :]],
            "kept": None if chosen is None else method_name(chosen.method),
            "reason": reason,
            "audit_of_the_result": None,
        }
        run.unseen, run.cross_validated = held, None
        if chosen is None or chosen.model is None:
            return model
        logger.info("Auto: auditing the result of %s; nothing is left after that.", method_name(chosen.method))
        again = audited(chosen.model, tuned, run, self.detectors)
        still = counting(again)
        run.choice["audit_of_the_result"] = described(again, still)
        known = {each.target for each in shortcuts}
        for each in still:
            if each.judged.p_value is None and each.target not in known:
                run.note(f"audit of the result: {each.sentence}. Nothing says how rare that is in clean models.")
            else:
                run.warn(f"the audit of the result: {each.sentence}. Look at it, or try another method as well.")
        return chosen.model

    def _chosen(self, trials: list[Trial], count: int, run: Run) -> tuple[Trial | None, str]:
        """Returns the trial to keep, None for the suspect, and why; warns if it does not pass."""
        within = [trial for trial in trials if trial.within(self.max_loss / 100, count)]
        if not within:
            reason = f"no method lost at most {self.max_loss:g} points of accuracy on {count} held-out examples"
            run.warn(
                f"{reason}, so the suspect was handed back as it was: a backdoor that it has is still there. Give more "
                "clean examples, or raise `max_loss`."
            )
            return None, reason
        best = min(within, key=lambda trial: trial.most_left if trial.most_left > GONE else 0.0)
        name = method_name(best.method)
        if best.most_left > GONE:
            reason = f"no method removed the shortcuts; {name} left the least of them"
            run.warn(f"{reason}: one still moves {best.most_left:.0%} more examples than a random trigger does.")
        elif isinstance(best.method, FineTuning):
            reason = f"{name} is the only method that passed"
            run.warn(f"{reason}, and it leaves most backdoors that the audit cannot see. Give more clean examples.")
        else:
            tested = "and left none of the shortcuts" if best.left else "(there was no trigger to test it with)"
            reason = f"{name} is the first that lost at most {self.max_loss:g} points of accuracy {tested}"
        return best, reason


def _methods(modality: str, shortcut: bool, run: Run) -> list[Method]:
    """Returns the methods to try, in order."""
    if modality == "images":
        return [ScaleInvariantFST(strength=1), ContrastiveUnlearning(), FineTuning()]
    based = [MixingDistillation()] if run.base is not None else []
    return [*based, *([WordDistillation()] if shortcut else []), FineTuning()]
