"""Feature Shift Tuning that does not depend on the scale of the suspect's features and head."""

import copy
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.calling import probe
from unbackdoor._models.head import Head
from unbackdoor._purification.run import Run
from unbackdoor._tasks.classification import hits
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._calibrated import calibrated_temperature
from unbackdoor.purifiers._head_units import in_own_units
from unbackdoor.purifiers._shift import shift_
from unbackdoor.purifiers._strength import Attempt, price, strongest

# What is tried, in order: the strength, and its part of the passes. Longer is better, and dearer; labels alone only fit
# the few examples if they take many passes.
TRIALS = ((1.0, 1.0), (1.0, 3.0), (0.5, 1.0), (0.0, 0.25))


@value
class ScaleInvariantFST:
    """FST at one scale for every head, with the suspect as teacher, as strong as the clean examples allow.

    If the features of a network grow by a factor and its head shrinks by it, the network computes the same. FST does
    not do the same: its penalty grows with the squared norm of the head, its new head is drawn at a fixed size, and its
    learning rate depends on neither. Here the head is tuned at one length per class, and its input is multiplied by the
    factor that the head was divided by. If the last normalisation sets the scale of the features, its weight and bias
    also get a root mean square of 1. A network with a head twice as large answers the same classes, only surer. So all
    scores, f(x) and f_suspect(x), are divided by the temperature at which the suspect is as sure of the clean examples
    as it is right, if that is above 1 (calibration: Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599). W_c are
    the rows of W less their mean, S_c those of the suspect. Over the clean examples (x, y) this method minimises

        (1 - share) * CE(f(x), y) + share * T^2 * KL(f_suspect(x) || f(x) at temperature T)
            + strength * alpha * cos(W_c, S_c)   subject to   |W_c| = |S_c|

    starting from the suspect's head, turned in a random direction by 90 degrees times the strength, and without
    dropout, which would be noise in answers that are to be met. A strength of 0 instead tunes on the labels alone, at
    the same scale. The suspect's answers preserve knowledge that a few labels cannot teach, and the features need many
    passes to learn it again. How many, and how much of a head can be given up, depends on the suspect. So trials are
    made on four fifths of the clean examples: strength 1, the same with three times the passes, strength 1/2, and
    strength 0 with a quarter of the passes. The first that loses no more accuracy on the remaining fifth than the
    margin, and no class, is the result; if there is none, it is the one that loses least. The last two, which leave
    more of a backdoor, are made only if strength 1 loses more than twice the margin, or a class.

    A step by SGD turns a short filter further than a long one, and a head with long inputs further than one with short
    ones, so that a rate that is right for one network ruins another or leaves its backdoor. Here the gradient of each
    weight of the body is multiplied by the mean squared length of its filters, and that of the head by the inverse of
    the squared length of its inputs, where that is over 10: the rate is an angle, the same for every network.

    Examples without labels (`run.unlabelled`) preserve more of the accuracy, but if a few of them carry the trigger,
    the suspect's answers to these teach the backdoor again. So the result is only the first step: the suspect is tuned
    once more, in the same way and with twice as many steps, on the clean and the unlabelled examples together. Its
    teacher is the suspect where the first result agrees with it on the class, and the first result where it does not.
    Of the two results the one that loses less on the held-out examples is kept.

    A variant of this project; its parents are Min et al., "Towards Stable Backdoor Purification through Feature Shift
    Tuning", NeurIPS 2023, https://arxiv.org/abs/2310.01875, and Hinton et al., "Distilling the Knowledge in a Neural
    Network", https://arxiv.org/abs/1503.02531

    Args:
        strength: how far the head is turned and how hard it is driven away, 0 to 1; None makes the trials.
        margin: accuracy on held-out examples that may be lost, 0 to 1; less strength is tried beyond twice that.
        alpha: weight of the cosine at strength 1, at least 0.
        share: weight of the suspect's answers against the labels, 0 to 1.
        temperature: temperature of both softmaxes, more than 0.
        epochs: passes over the clean examples, at least 1, with another forward pass each; in a trial three times or a
            quarter of them.
        learning_rate: initial learning rate, more than 0; None is 0.025 (SGD, in steps of equal angles) for images,
            less in proportion to a batch of fewer than 32, and 5e-5 (AdamW) for texts; at strength 0 it is the
            recipe's.
        batch_size: examples per step, at least 2; None is 8 to 32 for images, so that a pass makes twenty steps if it
            can, and 16 for texts; at strength 0 it is the recipe's, 128 and 16.

    Differences from the paper: the scale and the steps, the cosine instead of the inner product, the suspect's answers,
    the partial turn, and the choice of the strength; there is no paper on this variant. It is not FST and is never used
    in its place.
    """

    strength: Annotated[float | None, Field(ge=0, le=1)] = None
    margin: Annotated[float, Field(ge=0, le=1)] = 0.08
    alpha: Annotated[float, Field(ge=0)] = 3.0
    share: Annotated[float, Field(ge=0, le=1)] = 0.9
    temperature: Annotated[float, Field(gt=0)] = 2.0
    epochs: Annotated[int, Field(ge=1)] = 40
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    # The first version made ten passes, the second kept dropout; both lost more accuracy. The third had one rate for
    # all lengths of filters and features: it left most of a patch on a ResNet-20, and ruined others. The fourth took
    # small batches at the rate of large ones: with 400 pictures it lost up to 32 points. The fifth took scores as they
    # are, and left more of the backdoor in a suspect that is surer than it is right.
    version: ClassVar[int] = 6
    uses_unlabelled: ClassVar[bool] = True
    defaults: ClassVar[Defaults] = {
        "images": {"learning_rate": 0.025, "batch_size": 32},
        "text": {"batch_size": 16},
    }

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        suspect = copy.deepcopy(model).eval().requires_grad_(False)
        if self.strength is not None:
            self._tune(model, suspect, clean, run)
            if run.unlabelled is not None and self.strength > 0:
                self._tune_again(model, suspect, clean, run)
            return model
        tuned, held = run.hold_out(clean)
        before = hits(suspect, held, run.arithmetic)
        trials = [Attempt(strength, max(1, round(part * self.epochs))) for strength, part in TRIALS]
        kept = strongest(
            *(model, suspect, trials, lambda trial: self._at(trial)._tune(model, suspect, tuned, run)),
            *(held, before, self.margin, run),
        )
        model.load_state_dict(kept.weights)
        if run.unlabelled is None:
            return model
        if kept.trial.strength == 0:
            run.note("the unlabelled examples were not used: strength 0 tunes on labels alone.")
            return model
        self._at(kept.trial)._tune_again(model, suspect, tuned, run)
        paid = price(before, model, held, run)
        run.note(
            f"with {len(run.unlabelled):,} unlabelled examples it loses {100 * paid.lost:.1f} points of accuracy on "
            f"{len(held)} held-out examples."
        )
        if paid > kept.price:
            model.load_state_dict(kept.weights)
        return model

    def _at(self, trial: Attempt) -> Self:
        """Returns this method at the settings of a trial."""
        return replace(self, strength=trial.strength, epochs=trial.epochs)

    def _tune_again(self, model: nn.Module, suspect: nn.Module, clean: Dataset, run: Run) -> None:
        """Tune the suspect on the unlabelled examples as well, with the model, a first result, as second teacher."""
        assert run.unlabelled is not None
        first = copy.deepcopy(model).eval().requires_grad_(False)
        both = clean.joined(run.unlabelled)
        model.load_state_dict(suspect.state_dict())
        fewer = max(1, round(2 * self.epochs * len(clean) / len(both)))
        replace(self, epochs=fewer)._tune(model, suspect, both, run, first)

    def _tune(
        self, model: nn.Module, suspect: nn.Module, clean: Dataset, run: Run, first: nn.Module | None = None
    ) -> None:
        """Tune in place, at a given strength."""
        assert self.strength is not None
        if self.strength == 0:
            sureness = calibrated_temperature(suspect, clean, run.arithmetic)
            with in_own_units(model, Head(run.head_name, run.head(model)), probe(model, clean), sureness):
                run.tune(model, clean, epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size)
            return
        size: int = run.setting(self, "batch_size")
        smaller = run.smaller(size, len(clean)) if self.batch_size is None else size
        rate: float = run.setting(self, "learning_rate")
        shift_(
            model,
            suspect,
            clean,
            run,
            degrees=90 * self.strength,
            alpha=self.strength * self.alpha,
            share=self.share,
            temperature=self.temperature,
            epochs=self.epochs,
            learning_rate=rate * smaller / size if self.learning_rate is None else rate,
            batch_size=smaller,
            first=first,
        )
