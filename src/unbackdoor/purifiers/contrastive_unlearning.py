"""Contrastive unlearning: triggers that move the suspect and not a shifted copy of it are unlearned."""

import copy
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.contrast import Contrast, contrasts, one_each
from unbackdoor._inversion.triggers import refuse_texts
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import hits
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._own_answers import unlearn
from unbackdoor.purifiers.scale_invariant_fst import ScaleInvariantFST

KEPT = 0.75  # of the suspect's right answers: a copy that keeps fewer of them is no reference


@value
class ContrastiveUnlearning:
    """Search triggers that move the suspect and not a shifted copy of it, and unlearn them by the suspect's answers.

    Scale-invariant FST breaks most backdoors and pays for it with accuracy. Its result g is used here as a reference
    that lacks the shortcut. For every class t, and for patches, patterns over the whole picture, patterns of low
    frequency and warps, this method searches the smallest trigger T that minimises, over most of the clean examples,

        CE(f(T(x)), t) + CE(g(T(x)), g(x)) + cost * size(T)

    A feature of the class t itself would move g as well, so it is not among the results. (If g has forgotten a quarter
    of what the suspect gets right, it shows nothing about features, and is left out of the search.) A trigger counts
    if it moves `found` of the held-out examples of other classes in f and not in g. The triggers of all kinds and
    classes are then unlearned at once, as in trigger distillation: with f_s the suspect,

        taught * CE(f(x'), f_s(x)) + (1 - taught) * CE(f(x'), y),   x' = T(x) for a share of each batch, else x

    Search and unlearning are repeated until nothing is found, for at most `rounds` rounds. Large triggers of this kind
    exist for clean models as well; to unlearn them costs little. **If the first round finds nothing**, the features of
    the suspect are shifted, by scale-invariant FST at its own settings. Notes in the record say what was found.

    A variant of this project. Its parents are `ScaleInvariantFST`, `TriggerDistillation` and Neural Cleanse (Wang et
    al., IEEE S&P 2019, https://doi.org/10.1109/SP.2019.00031).

    Args:
        rounds: rounds of search and unlearning, at least 1.
        steps: steps of the search for each kind of trigger, at least 1.
        found: share of the held-out examples that a trigger must move, more than 0 and at most 1.
        taught: weight of the suspect's answers against the labels, 0 to 1.
        share: share of each batch that carries a trigger, 0 to 1.
        epochs: passes over the clean examples in each round, at least 1, with another forward pass each.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD).
        batch_size: examples per step, at least 2; None is 32.

    Differences from the paper: there is no paper on this variant. Triggers that differ between pictures, and those of
    a few source classes, are not searched. Pixels only.
    """

    rounds: Annotated[int, Field(ge=1)] = 2
    steps: Annotated[int, Field(ge=1)] = 50
    found: Annotated[float, Field(gt=0, le=1)] = 0.5
    taught: Annotated[float, Field(ge=0, le=1)] = 0.9
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    # The first version took any shifted copy as the reference, also one that had forgotten its task; the second copy
    # was shifted in ten passes, the third with dropout; the fourth to sixth took versions 3 to 5 of the shift.
    version: ClassVar[int] = 7
    defaults: ClassVar[Defaults] = {"images": {"batch_size": 32}}

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_texts(self, clean)
        suspect = copy.deepcopy(model).eval().requires_grad_(False)
        tuned, held = run.hold_out(clean)
        reference = self._reference(model, tuned, held, run)
        shortcuts: list[Contrast] = []
        for number in range(1, self.rounds + 1):
            new = contrasts(model, reference, tuned, held, run, steps=self.steps, least=self.found)
            run.note(f"round {number}: {_described(new, clean, reference)}.")
            if not new:
                break
            shortcuts += new
            unlearn(
                model,
                suspect,
                tuned,
                run,
                one_each(shortcuts, run.generator),
                taught=self.taught,
                share=self.share,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                batch_size=run.setting(self, "batch_size"),
            )
        if not shortcuts:
            run.note("ContrastiveUnlearning: no trigger to unlearn; the features are shifted by scale-invariant-fst.")
            with run.of_another("scale-invariant-fst"):
                return ScaleInvariantFST()(model, clean, run)
        run.unseen = held
        return model

    def _reference(self, model: nn.Module, tuned: Dataset, held: Dataset, run: Run) -> nn.Module | None:
        """Returns the shifted copy; None if it forgot too much to say what a feature of a class is."""
        copied = ScaleInvariantFST(strength=1)(copy.deepcopy(model), tuned, run).eval().requires_grad_(False)
        before, after = (hits(each, held, run.arithmetic) for each in (model, copied))
        kept = float(after[before].double().mean()) if bool(before.any()) else 0.0
        if kept >= KEPT:
            return copied
        run.note(
            f"the shifted copy is right on {kept:.0%} of the held-out examples that the suspect is right on, less than "
            f"{KEPT:.0%}, so it is no reference: triggers that move the model are unlearned."
        )
        return None


def _described(contrasts: list[Contrast], clean: Dataset, reference: nn.Module | None) -> str:
    """Returns what a round found, in words."""
    apart = "" if reference is None else " and not the shifted copy"
    if not contrasts:
        return f"no trigger moves the model{apart}"
    named = ", ".join(f"a {each.kind} to {clean.class_name(each.target)} ({each.moved:.0%})" for each in contrasts)
    return f"triggers that move held-out examples of the model{apart}: {named}"
