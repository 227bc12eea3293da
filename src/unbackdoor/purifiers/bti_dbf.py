"""BTI-DBF: backdoor trigger inversion by decoupling benign features, with unlearning."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._inversion.generator import GeneratorSearch
from unbackdoor._inversion.triggers import InvertedTrigger, encoded, in_pixels, refuse_texts
from unbackdoor._inversion.unlearning import WithTrigger
from unbackdoor._models.hooks import watching
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import cross_entropy
from unbackdoor._value import value


@value
class BTIDBF:
    """Separate benign features from the rest, let a generator move the rest alone, and unlearn its pictures.

    With h the head and f(x) the features that it sees, a mask m in [0, 1] of the benign features minimises CE(h(m
    f(x)), y) - CE(h((1 - m) f(x)), y) + 3 mean(m). A generator G then minimises

        -|(1 - m)(f(x) - f(G(x)))|^2 + 0.01 |m (f(x) - f(G(x)))|^2

    (means over all entries), or |x - G(x)|^2 alone on batches on which the picture or the benign features have moved
    too far. From the second round on CE(f(G(x)), t) is added, t being the class that the model answers for most of
    G(x). No class is scanned. A share of each batch is then replaced by G(x) with its true label, and the model
    minimises CE(f(x'), y) + |f(x) - f(x')|^2. Mask, generator and unlearning alternate.

    Xu, Huang, Li, Qin and Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling Benign
    Features", ICLR 2024, https://openreview.net/forum?id=Tw9wemV6cb; the variant (U) of its defences.

    Args:
        rounds: rounds of mask, generator and unlearning, at least 1.
        generator_epochs: passes of the generator over the clean examples per round, at least 1.
        epochs: passes of unlearning over the clean examples per round, at least 1.
        distance: mean squared change of a pixel in [0, 1] that the generator may make, more than 0.
        drift: mean squared change of the benign features that it may cause, in units of the features' variance, more
            than 0.
        share: share of each batch that carries the trigger while unlearning, 0 to 1.
        learning_rate: learning rate of unlearning (Adam), more than 0.
        batch_size: examples per step, at least 2; None is 128.

    Differences from the paper: the mask lies on what the head sees (after pooling), not on the last convolution's map,
    so that it works for any architecture, and the mask is learned from features computed once (200 steps). The term 3
    mean(m) is this project's: without it all of these features became benign on a real victim, and the generator had
    nothing left to move. The generator is a smaller U-Net whose output, at first nearly zero, is added to the picture,
    so the 50 epochs that teach it the identity are not needed. The limits are on pixels in [0, 1] and on scaled
    features (the authors: 0.3 on normalised pixels, 3 on raw features), so they do not depend on the preprocessing.
    They are also tighter: with 0.01 the generator led to another class than a real victim's target, with 0.002 to the
    target. For two cores: 2 rounds of 10 and 10 epochs; the authors take 5 rounds of 30 and 30. Pixels only.
    """

    rounds: Annotated[int, Field(ge=1)] = 2
    generator_epochs: Annotated[int, Field(ge=1)] = 10
    epochs: Annotated[int, Field(ge=1)] = 10
    distance: Annotated[float, Field(gt=0)] = 0.002
    drift: Annotated[float, Field(gt=0)] = 1.0
    share: Annotated[float, Field(ge=0, le=1)] = 0.1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_texts(self, clean)
        search = GeneratorSearch(
            epochs=self.generator_epochs, distance=self.distance, drift=self.drift, batch_size=self.batch_size
        )
        trigger: InvertedTrigger | None = None
        for _ in range(self.rounds):
            trigger = search(model, clean, run, trigger)
            self.unlearn_(model, clean, run, trigger)
        return model

    def unlearn_(self, model: nn.Module, clean: Dataset, run: Run, trigger: InvertedTrigger) -> None:
        """Tune the model in place on examples, a share of which carries the trigger."""
        with watching(run.head(model)) as seen:

            def loss(scores: Tensor, batch: Batch) -> Tensor:
                triggered = seen[0]
                run.scores(model, encoded(clean, batch.pixels, run))
                return cross_entropy(scores, batch) + F.mse_loss(triggered.float(), seen[0].float())

            run.tune(
                WithTrigger(model, clean, run, trigger, self.share),
                in_pixels(clean),
                epochs=self.epochs,
                batch_size=self.batch_size,
                optimizer=torch.optim.Adam(model.parameters(), lr=self.learning_rate),
                loss=loss,
                description="unlearning",
            )
