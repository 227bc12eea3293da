"""Path-Aware Minimisation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion import Carrying, Reverse, Reversed, in_pixels, universal
from unbackdoor._models.hooks import weights_kept
from unbackdoor._purification.run import Run
from unbackdoor._registry.entries import located
from unbackdoor._training.descent import cross_entropy
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers.bti_dbf import BTIDBF
from unbackdoor.purifiers.neural_cleanse import NeuralCleanse


class Search(NamedTuple):
    """A way to reverse triggers, and the modalities that it serves."""

    make: Callable[[], Reverse]
    modality: tuple[str, ...]


TRIGGERS = {
    "bti-dbf": Search(lambda: BTIDBF().reverse, ("images",)),
    "neural-cleanse": Search(lambda: NeuralCleanse().reverse, ("images",)),
    "universal": Search(lambda: universal, ("images", "text")),
}


@value
class PAM:
    """Unlearn reversed triggers by gradients taken on the way back to the suspect, so that the backdoor stays gone.

    Most purified models lie close to the backdoored one: a few triggered examples in later tuning bring the backdoor
    back. PAM moves further away, by stepping with the gradient of a point between the present weights W and the
    suspect's W_s:

        W' = W + rho (W_s - W) / (|W_s - W| + 1e-12)
        W <- SGD(W, gradient of CE(f(x'), y) at W')

    with one norm over all parameters, and x' a batch of which int(share * n + 1) of n examples carry a reversed trigger
    and all keep their true labels. One forward and one backward pass per step, at W'. The first step is a plain one.
    BatchNorm is in train mode, so its running statistics are those of the probed points.

    Min, Qin, Zhang, Shen and Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor
    Defense", NeurIPS 2024, https://arxiv.org/abs/2410.09838

    Args:
        rho: length of the step towards the suspect, at least 0; 0 is plain unlearning.
        trigger: how triggers are reversed: `bti-dbf` (a generator), `neural-cleanse` (mask and pattern of odd classes),
            `universal` (one perturbation of pixels or embeddings that drives examples off their classes), or
            package.module:function of your own, of (model, clean, run, last) to a change of pixels or embeddings. None
            is neural-cleanse for images and universal for texts.
        share: of each batch that carries the trigger, 0 to 1.
        rounds: of reversing the trigger and unlearning it, at least 1.
        epochs: of unlearning per round, passes over the clean examples, at least 1.
        learning_rate: constant, more than 0; None is 0.01 (SGD, momentum 0.1) for images and 5e-5 (AdamW) for texts.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts.

    Differences from the paper: the trigger is an exchangeable part, and the text variant (AdamW, one perturbation of
    all words' embeddings) is this project's. The paper reverses by BTI-DBF; the default here is Neural Cleanse, which
    named the planted class of a real victim with less doubt. For two cores: 1 round of 10 epochs; the authors' script
    takes 3 of 30.
    """

    rho: Annotated[float, Field(ge=0)] = 0.5
    trigger: str | None = None
    share: Annotated[float, Field(ge=0, le=1)] = 0.2
    rounds: Annotated[int, Field(ge=1)] = 1
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {
        "images": {"trigger": "neural-cleanse"},
        "text": {"trigger": "universal"},
    }

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        reverse = self._reverse(clean, run)
        weights = list(model.parameters())
        suspect = [weight.detach().clone() for weight in weights]
        rate = run.setting(self, "learning_rate")
        found: Reversed | None = None
        for _ in range(self.rounds):
            found = reverse(model, clean, run, found)
            carrying = Carrying(model, clean, run, found, self.share)

            def gradients(batch: Batch, carrying: nn.Module = carrying) -> None:
                with probed(weights, suspect, self.rho):
                    cross_entropy(run.scores(carrying, batch.inputs), batch).backward()

            sgd = run.recipe.optimizer == "sgd"
            run.tune(
                carrying,
                in_pixels(clean),
                epochs=self.epochs,
                batch_size=self.batch_size,
                optimizer=torch.optim.SGD(weights, lr=rate, momentum=0.1)
                if sgd
                else torch.optim.AdamW(weights, lr=rate),
                gradients=gradients,
                description="path-aware unlearning",
            )
        return model

    def _reverse(self, clean: Dataset, run: Run) -> Reverse:
        name = run.setting(self, "trigger")
        if name in TRIGGERS:
            if clean.modality not in TRIGGERS[name].modality:
                raise UnbackdoorError(
                    f"PAM.trigger {name} is looked for among pixels, but {clean.name} holds texts. Take universal."
                )
            return TRIGGERS[name].make()
        if ":" not in name:
            raise UnbackdoorError(f"PAM.trigger must be {', '.join(TRIGGERS)} or package.module:function, got {name}.")
        own = located(name)

        def checked(*given: Any) -> Reversed:
            found = own(*given)
            if not callable(found):
                raise UnbackdoorError(
                    f"PAM.trigger {name} must return a function of pixels or embeddings, got {type(found).__name__}."
                )
            made: Reversed = found
            return made

        return checked


@contextmanager
def probed(weights: Sequence[Tensor], suspect: Sequence[Tensor], rho: float) -> Iterator[None]:
    """While the block runs, weights are a step of length rho on the way back to the suspect's.

    Args:
        weights: moved in place, and back.
        suspect: the suspect's, in the same order.
        rho: at least 0; where it is 0, or the weights are the suspect's, there is no way to go.
    """
    if rho == 0:
        yield
        return
    with weights_kept(weights):
        with torch.no_grad():
            way = [start - weight for start, weight in zip(suspect, weights, strict=True)]
            step = rho / (torch.stack([part.norm() for part in way]).norm() + 1e-12)
            for weight, part in zip(weights, way, strict=True):
                weight.add_(part * step)
        yield
