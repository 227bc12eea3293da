"""Which of the trials of `Auto` is kept, and what the user is told about it."""

from unbackdoor._errors import SENTENCE, printable
from unbackdoor._purification.run import Run
from unbackdoor.purifiers._methods_to_try import WITHOUT_A_SEARCH, method_label
from unbackdoor.purifiers._trial import GONE, NO_MEMORY, Trial
from unbackdoor.purifiers.fine_tuning import FineTuning


def choice(trials: list[Trial], count: int, max_loss: float, run: Run) -> tuple[Trial | None, str]:
    """Returns the trial to keep, None for the suspect, and why.

    `run.failure` says so if it does not pass, and `run.warnings` if there is reason to doubt it.

    Args:
        trials: in the order in which they were made.
        count: of the held-out examples.
        max_loss: points of accuracy on these that a result may lose, 0 to 100.
        run: of the purification.
    """
    within = [trial for trial in trials if trial.within(max_loss / 100, count)]
    if not within:
        reason = f"no method lost at most {max_loss:g} points of accuracy on {count} held-out examples"
        usable = [trial for trial in trials if trial.model is not None and not trial.lost_a_class]
        least = min(usable, key=lambda trial: trial.lost, default=None)
        cheapest = "" if least is None else f": {method_label(least.method)} lost least, {100 * least.lost:.1f} points"
        way_out = f"Give more clean examples, or raise `max_loss`{cheapest}."
        if all(trial.model is None for trial in trials):
            reason = f"no method could run; {method_label(trials[0].method)} says: {trials[0].problem.rstrip('.')}"
            way_out = "Take smaller inputs or another `device`." if trials[0].problem == NO_MEMORY else ""
        run.failure = printable(
            f"Nothing was purified: {reason}, so the suspect is handed back as it was, with any backdoor that it "
            f"has. {way_out}".rstrip(),
            SENTENCE,
        )
        return None, reason
    best = min(within, key=lambda trial: trial.most_left if trial.most_left > GONE else 0.0)
    name = method_label(best.method)
    if best.most_left > GONE:
        reason = (
            f"no method that lost at most {max_loss:g} points of accuracy removed the shortcuts; {name} left "
            "the least of them"
        )
        again = "an audit of its result found one again"
        moves = f"one still moves {best.most_left:.0%} more examples than a random trigger does"
        run.failure = printable(
            f"The result did not pass its tests: {reason}: {again if best.returned else moves}. Do not take it for "
            "purified. Give more clean examples, raise `max_loss`, or try another method.",
            SENTENCE,
        )
    elif isinstance(best.method, FineTuning):
        reason = f"{name} is the only method that passed"
        run.warn(f"{reason}, and it leaves most backdoors that the audit cannot see. Give more clean examples.")
    elif not best.left and not isinstance(best.method, WITHOUT_A_SEARCH):
        reason = f"{name} is the first that lost at most {max_loss:g} points of accuracy"
        run.warn(
            f"{reason}, but there was no trigger of the audit to test it with, and what it does not find may stay: "
            "a backdoor may be left. Give more clean examples, or try another method as well."
        )
    else:
        tested = "and left none of the shortcuts" if best.left else "(there was no trigger to test it with)"
        reason = f"{name} is the first that lost at most {max_loss:g} points of accuracy {tested}"
    return best, reason
