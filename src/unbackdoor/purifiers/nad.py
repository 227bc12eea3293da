"""Neural attention distillation."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models import Inputs, evaluating, logits, probe
from unbackdoor._purify import Run
from unbackdoor._text import Tokens
from unbackdoor._train import cross_entropy
from unbackdoor._values import value


@value
class NAD:
    """Fine-tune the suspect into a teacher, then tune the suspect so that it looks where the teacher looks.

    Where a trigger is, the activations of a backdoored network are large, and plain fine-tuning weakens that. With F a
    layer's feature map, its attention map has one number for each place, and NAD minimises

        CE(f(x), y) + beta * sum over layers of mean (A(F) / |A(F)| - A(F_teacher) / |A(F_teacher)|)^2,
        A(F) = sum over channels of |F|^power

    The layers are found by running the model. Transformers: the blocks, which are the outermost members of a ModuleList
    or Sequential that give one vector for each token; of these the ones at a third, at two thirds and at the end, with
    a place for each token that is no padding. Other networks: the last map of each resolution (stages end where the
    resolution changes) with more than one place, and of these the last three.

    Li, Lyu, Koren, Lyu, Li and Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural
    Networks", ICLR 2021, https://arxiv.org/abs/2101.05930

    Args:
        beta: weight of the attention against the labels, at least 0.
        power: of the activations, more than 0.
        teacher_epochs: passes of the fine-tuning that makes the teacher, at least 1.
        epochs: passes of the distillation, at least 1, with another forward pass each.
        learning_rate: at the start, more than 0; None is 0.05 (SGD) for images and 1e-4 (AdamW) for texts. The teacher
            is tuned at the recipe's, 0.01 and 5e-5.
        batch_size: examples per step, at least 2; None is 64 for images and 16 for texts.

    Differences from the paper: one beta for all layers, where their script has 500, 1000 and 1000 for the three groups
    of a WideResNet; no weight decay, no Nesterov momentum; a cosine in place of steps from 0.1, which is too much where
    there are only some hundred images. Their script keeps the epoch that is best on test data, triggered ones included;
    here the last counts. Transformers are this project's addition.
    """

    beta: Annotated[float, Field(ge=0)] = 1000.0
    power: Annotated[float, Field(gt=0)] = 2.0
    teacher_epochs: Annotated[int, Field(ge=1)] = 10
    epochs: Annotated[int, Field(ge=1)] = 20
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        layers = stages(model, probe(model, clean))
        images = clean.modality == "images"
        size = 64 if images and self.batch_size is None else self.batch_size
        rate = (5 if images else 2) * run.recipe.learning_rate if self.learning_rate is None else self.learning_rate
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
            run.tune(
                model,
                clean,
                epochs=self.epochs,
                learning_rate=rate,
                batch_size=size,
                loss=loss,
            )
        return model


def unit_length(maps: Tensor, inputs: Inputs) -> Tensor:
    """Attention maps (batch, places) at length 1 each, without what is padded."""
    if isinstance(inputs, Tokens) and maps.shape == inputs.shape:
        maps = maps * inputs["attention_mask"]
    lengths: Tensor = maps.norm(dim=1, keepdim=True)
    return maps / (lengths + 1e-6)


@contextmanager
def attention(model: nn.Module, layers: list[str], power: float) -> Iterator[dict[str, Tensor]]:
    """While the block runs, each forward pass leaves A(F), (batch, places), of each layer in the dictionary."""
    maps: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        features = _tensor(output)
        assert features is not None
        maps[name] = features.float().abs().pow(power).sum(dim=1 if features.ndim == 4 else 2).flatten(1)

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name in layers
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def stages(model: nn.Module, inputs: Inputs) -> list[str]:
    """The names of at most three layers whose attention is compared, see `NAD`.

    Raises:
        UnbackdoorError: no layer has more than one place.
    """
    shapes: dict[str, tuple[int, ...]] = {}  # in the order in which the layers are done

    def keep(name: str, output: Any) -> None:
        features = _tensor(output)
        if features is not None and len(features) == len(inputs):
            shapes.pop(name, None)
            shapes[name] = tuple(features.shape)

    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with evaluating(model):
            logits(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    listed = [
        name
        for name, shape in shapes.items()
        if len(shape) == 3
        and shape[1] > 1
        and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
    ]
    blocks = [name for name in listed if not any(name.startswith(f"{other}.") for other in listed)]
    if blocks:
        count = min(3, len(blocks))
        return [blocks[len(blocks) * part // count - 1] for part in range(1, count + 1)]
    last: dict[tuple[int, ...], str] = {}
    for name, shape in shapes.items():
        # A layer whose last dimension is the channels has a shape that is no smaller picture of the input.
        if len(shape) == 4 and shape[2] * shape[3] > 1 and shape[2] * inputs.shape[3] == shape[3] * inputs.shape[2]:
            last.pop(shape[2:], None)
            last[shape[2:]] = name
    if not last:
        raise UnbackdoorError(
            f"NAD needs feature maps of convolutions, or transformer blocks; {type(model).__name__} has none. Try fst."
        )
    return list(last.values())[-3:]


def _tensor(output: Any) -> Tensor | None:
    """The features among what a layer returns."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None
