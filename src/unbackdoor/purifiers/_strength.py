"""How much strength a suspect can bear: trials from strong to weak, judged on held-out examples."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._purification.run import Run
from unbackdoor._purification.selection import difference
from unbackdoor._tasks.classification import hits


class Attempt(NamedTuple):
    """What is tried: a strength, 0 to 1, in a number of passes over the clean examples."""

    strength: float
    epochs: int

    def __str__(self) -> str:
        passes = "1 pass" if self.epochs == 1 else f"{self.epochs} passes"
        return f"strength {self.strength:g} in {passes}"


class Price(NamedTuple):
    """What a trial lost on the held-out examples; a class is dearer than any accuracy (a share, -1 to 1)."""

    lost_a_class: bool
    lost: float


class Kept(NamedTuple):
    """The trial that is kept, its price and its weights."""

    price: Price
    trial: Attempt
    weights: dict[str, Tensor]


def price(before: Tensor, model: nn.Module, held: Dataset, run: Run) -> Price:
    """Returns what a model loses of the held-out examples that the suspect had right, (n,)."""
    after = hits(model, held, run.arithmetic)
    return Price(run.task.lost_a_class(held, before, after), difference(before, after).lost)


def strongest(
    model: nn.Module,
    suspect: nn.Module,
    trials: Sequence[Attempt],
    tune: Callable[[Attempt], None],
    held: Dataset,
    before: Tensor,
    margin: float,
    run: Run,
) -> Kept:
    """Make trials in the model, in order, and return the first within the margin, else the one that loses least.

    Those of a strength below 1 leave more of a backdoor, so they are made only if each before them lost more than twice
    the margin, or a class. Warns if the result is beyond the margin, or of a strength below 1.

    Args:
        model: a copy of the suspect; it is left with the weights of the last trial.
        suspect: the model before any trial.
        trials: from strong to weak.
        tune: makes a trial in the model.
        held: examples that no trial was tuned on.
        before: which of these the suspect has right, (n,).
        margin: accuracy that may be lost, 0 to 1.
        run: of the purification.
    """
    kept: Kept | None = None
    cause = f"cost more than the margin of {100 * margin:g} points of accuracy"
    for trial in trials:
        if trial.strength < 1 and kept is not None and kept.price <= (False, 2 * margin):
            break
        model.load_state_dict(suspect.state_dict())
        tune(trial)
        paid = price(before, model, held, run)
        run.note(f"{trial} loses {100 * paid.lost:.1f} points of accuracy on {len(held)} held-out examples.")
        if trial.strength == 1 and paid.lost_a_class and paid.lost <= margin:
            cause = "lost most of a class"
        if kept is None or paid < kept.price:
            kept = Kept(paid, trial, copy.deepcopy(model.state_dict()))
        if paid <= (False, margin):
            break
    assert kept is not None
    _warn_of(kept, cause, margin, len(held), run)
    return kept


def _warn_of(kept: Kept, cause: str, margin: float, count: int, run: Run) -> None:
    """Warn of a price beyond the margin, or of a backdoor that less strength may have left."""
    if kept.trial.strength == 1 and kept.price > (False, margin) and not kept.price.lost_a_class:
        run.warn(
            f"strength 1 lost {100 * kept.price.lost:.1f} points of accuracy on {count} held-out examples, more than "
            f"the margin of {100 * margin:g}, and was kept: less strength leaves more of a backdoor. Give more clean "
            "examples."
        )
    if kept.trial.strength < 1:
        run.warn(
            f"a backdoor may have stayed: strength 1 {cause}, so {kept.trial.strength:g} was used, which shifts "
            "features less. Give more clean examples, raise `margin`, or try another method as well."
        )
