"""Trigger distillation: inverted triggers, unlearned with the suspect's own answers to clean examples as labels."""

import copy
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._inversion.masks import MaskSearch, stamp
from unbackdoor._inversion.triggers import refuse_texts
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._own_answers import unlearn
from unbackdoor.purifiers.scale_invariant_fst import ScaleInvariantFST


@value
class TriggerDistillation:
    """Teach a model to answer triggered examples as the suspect answers the same examples without the trigger.

    On clean examples a suspect is right, and its answers teach more than a few labels do; only its answers to triggered
    examples are wrong. With T a trigger that Neural Cleanse inverts and f_s the suspect, this method minimises over the
    clean examples (x, y), augmented again each time,

        taught * CE(f(x'), f_s(x)) + (1 - taught) * CE(f(x'), y),   x' = T(x) for a share of each batch, else x

    with the gradient taken at a point on the way back to the suspect, as in PAM, if rho is more than 0. If no class is
    an outlier of Neural Cleanse, there is no trigger of this kind to unlearn; then the features are shifted, by
    scale-invariant FST at its own settings. A note in the record says which of the two was done.

    A variant of this project. Its parents are Neural Cleanse (Wang et al., IEEE S&P 2019,
    https://doi.org/10.1109/SP.2019.00031), PAM (Min et al., NeurIPS 2024, https://arxiv.org/abs/2410.09838) and
    distillation (Hinton et al., https://arxiv.org/abs/1503.02531); for the shift, see `ScaleInvariantFST`.

    Args:
        taught: weight of the suspect's answers compared with the labels, 0 to 1.
        share: share of each batch that carries a trigger, 0 to 1.
        rho: length of the step towards the suspect, at least 0.
        reverse_steps: steps of the search for triggers, at least 1.
        epochs: passes over the clean examples, at least 1, with another forward pass each.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD).
        batch_size: examples per step, at least 2; None is 128.

    Differences from the paper: there is no paper on this variant. The shift without an outlier was added after a real
    victim (a sinusoid over the whole picture) had kept its backdoor. Pixels only.
    """

    taught: Annotated[float, Field(ge=0, le=1)] = 0.9
    share: Annotated[float, Field(ge=0, le=1)] = 0.2
    rho: Annotated[float, Field(ge=0)] = 0.0
    reverse_steps: Annotated[int, Field(ge=1)] = 100
    epochs: Annotated[int, Field(ge=1)] = 20
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    # The first version shifted as shift distillation does; that depends on the scale of the head, and ruined a suspect.
    # The second to fourth took versions 3 to 5 of scale-invariant FST.
    version: ClassVar[int] = 5

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_texts(self, clean)
        triggers, outliers = MaskSearch(steps=self.reverse_steps).outliers(model, clean, run)
        if len(outliers) == 0:
            run.note("TriggerDistillation: no trigger to unlearn; the features are shifted by scale-invariant-fst.")
            with run.of_another("scale-invariant-fst"):
                return ScaleInvariantFST()(model, clean, run)
        trigger = stamp(triggers.masks[outliers], triggers.patterns[outliers])
        unlearn(
            model,
            copy.deepcopy(model).eval().requires_grad_(False),
            clean,
            run,
            trigger,
            taught=self.taught,
            share=self.share,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            rho=self.rho,
        )
        return model
