"""Neural attention distillation."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._models.calling import Inputs, probe
from unbackdoor._models.hooks import removing
from unbackdoor._models.stage_ends import features_of, stage_ends
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import cross_entropy
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value


@value
class NAD:
    """Fine-tune the suspect into a teacher, then tune the suspect so that it attends as the teacher does.

    A backdoored network attends to the trigger, its fine-tuned copy does so less, and the copy's attention can be
    taught. With F a layer's feature map, its attention map has one number for each place, and NAD minimises

        CE(f(x), y) + beta * sum over layers of mean (A(F) / |A(F)| - A(F_teacher) / |A(F_teacher)|)^2,
        A(F) = sum over channels of |F|^power

    A forward pass finds the layers. In transformers the blocks are the outermost members of a ModuleList or Sequential
    that return one vector for each token; the layers are the blocks at a third, at two thirds and at the end, with a
    place for each token that is not padding. In other networks stages end where the resolution changes; the layers are
    the last maps of the last three stages with more than one place.

    Li, Lyu, Koren, Lyu, Li and Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural
    Networks", ICLR 2021, https://arxiv.org/abs/2101.05930

    Args:
        beta: weight of the attention against the labels, at least 0.
        power: exponent of the activations, more than 0.
        teacher_epochs: passes of the fine-tuning that makes the teacher, at least 1.
        epochs: passes of the distillation, at least 1, with another forward pass each.
        learning_rate: initial learning rate, more than 0; None is 0.05 (SGD) for images and 1e-4 (AdamW) for
            texts. The teacher is tuned at the recipe's, 0.01 and 5e-5.
        batch_size: examples per step, at least 2; None is 64 for images and 16 for texts.

    Differences from the paper: one beta for all layers (their script has 500, 1000 and 1000 for the three groups of a
    WideResNet); no weight decay, no Nesterov momentum; a cosine from half their learning rate instead of steps. Their
    script chooses an epoch by its scores on test data, triggered examples included; here the last epoch is the result.
    Transformers are this project's addition.
    """

    beta: Annotated[float, Field(ge=0)] = 1000.0
    power: Annotated[float, Field(gt=0)] = 2.0
    teacher_epochs: Annotated[int, Field(ge=1)] = 10
    epochs: Annotated[int, Field(ge=1)] = 20
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {
        "images": {"learning_rate": 0.05, "batch_size": 64},
        "text": {"learning_rate": 1e-4, "batch_size": 16},
    }

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        layers = stage_ends(model, probe(model, clean), type(self).__name__)
        size, rate = run.setting(self, "batch_size"), run.setting(self, "learning_rate")
        teacher = copy.deepcopy(model)
        run.tune(teacher, clean, epochs=self.teacher_epochs, batch_size=size, description="tuning the teacher")
        teacher.eval().requires_grad_(False)

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            with torch.no_grad():
                run.scores(teacher, batch.inputs)
            distance = scores.new_zeros(())
            for name in layers:
                mine, theirs = (unit_length(maps[name], batch.inputs) for maps in (seen, wanted))
                distance = distance + (mine - theirs).square().mean()
            return cross_entropy(scores, batch) + self.beta * distance

        with attention(model, layers, self.power) as seen, attention(teacher, layers, self.power) as wanted:
            run.tune(model, clean, epochs=self.epochs, learning_rate=rate, batch_size=size, loss=loss)
        return model


def unit_length(maps: Tensor, inputs: Inputs) -> Tensor:
    """Returns attention maps (batch, places) at length 1 each, without padding."""
    if isinstance(inputs, Tokens) and maps.shape == inputs.shape:
        maps = maps * inputs["attention_mask"]
    lengths: Tensor = maps.norm(dim=1, keepdim=True)
    return maps / (lengths + 1e-6)


@contextmanager
def attention(model: nn.Module, layers: list[str], power: float) -> Iterator[dict[str, Tensor]]:
    """While the block runs, each forward pass leaves A(F), (batch, places), of each layer in the dictionary."""
    maps: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        features = features_of(output)
        assert features is not None
        features = features.clone()  # some networks change it in place afterwards
        maps[name] = features.float().abs().pow(power).sum(dim=1 if features.ndim == 4 else 2).flatten(1)

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name in layers
    ]
    with removing(hooks):
        yield maps
