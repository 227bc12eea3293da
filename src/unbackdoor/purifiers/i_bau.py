"""Implicit backdoor adversarial unlearning."""

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.calling import evaluating
from unbackdoor._models.perturbation import perturbation_shape, perturbation_unit
from unbackdoor._purification.run import Run
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value


@value
class IBAU:
    """Unlearn the perturbation that fools the model on all examples at once, and account for how it will move.

    A trigger works on every input, so the search is for one perturbation d that all clean examples (x, y) share:

        theta = argmin of  L(theta, d(theta)),   d(theta) = argmin over |d| <= bound of  G(theta, d)
        L = CE(f(x + d), y),   G = -CE(f(x + d), y) + decay * |d|^2

    In each round d is searched again by gradient steps over the clean examples, and the weights then descend batch by
    batch along the total derivative of L, which includes the effect of theta on d. With the map P(theta, d) = d - step
    * dG/dd, whose fixed point d(theta) is, that derivative is

        dL/dtheta + (dP/dtheta)^T v,   v = sum over k < iterations of ((dP/dd)^T)^k dL/dd

    where v approaches (1 - dP/dd)^-T dL/dd as the iterations grow.

    Zeng, Chen, Park, Mao, Jin and Jia, "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022,
    https://arxiv.org/abs/2110.03735

    Args:
        rounds: rounds of one search and one pass over the clean examples, at least 1.
        iterations: iterations of the fixed point, at least 1; 1 uses v = dL/dd.
        step: step size of the map P, more than 0.
        decay: weight of |d|^2, at least 0.
        bound: root mean square of the largest perturbation, more than 0; None is 0.5 of the range of a pixel for
            images, and for texts the root mean square of the word embeddings' entries.
        share: share of each batch that carries the perturbation in the outer loss, more than 0 and at most 1.
        learning_rate: initial learning rate of AdamW, more than 0; None is 5e-4 for images and 5e-5 for texts.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts.

    Differences from the paper: the steps of the search are normalised, two bounds long together, and end inside the
    ball; the authors' script takes plain steps of 10 times the gradient, without a ball. Their script perturbs one
    example in a hundred in the outer loss, uses the model's own answers as labels in the search, and one fixed batch
    for G in the derivative. Here share is a field, the labels are the true ones, and G is computed on the batch of the
    step. They run five rounds of Adam at a constant 1e-3; here the rate falls linearly to zero. As there, BatchNorm and
    dropout stay as in eval mode. The bound was chosen with attack success on two real victims in view: 0.2 is enough
    for a pattern over the whole picture, but leaves a small patch in place. Texts are this project's addition: one
    shift of the embeddings for all words of all texts.
    """

    version: ClassVar[int] = 2

    rounds: Annotated[int, Field(ge=1)] = 3
    iterations: Annotated[int, Field(ge=1)] = 5
    step: Annotated[float, Field(gt=0)] = 0.1
    decay: Annotated[float, Field(ge=0)] = 0.001
    bound: Annotated[float | None, Field(gt=0)] = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {
        "images": {"bound": 0.5, "learning_rate": 5e-4, "batch_size": 128},
        "text": {"bound": 1.0, "learning_rate": 5e-5, "batch_size": 16},
    }

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        unit = perturbation_unit(model, clean)
        bound, size = run.setting(self, "bound"), run.setting(self, "batch_size")
        parameters = list(model.parameters())
        kept: list[Tensor] = []  # the present perturbation

        def inner(perturbation: Tensor, batch: Batch) -> Tensor:
            scores = run.scores(model, batch.inputs, unit * perturbation)
            return self.decay * perturbation.square().sum() - F.cross_entropy(scores, batch.labels)

        def outer(perturbation: Tensor, batch: Batch) -> Tensor:
            chosen = torch.rand(len(batch.labels), generator=run.generator) < self.share
            some = chosen.to(perturbation.device).view(-1, *[1] * (perturbation.ndim - 1))  # (batch, 1, ...)
            return F.cross_entropy(run.scores(model, batch.inputs, unit * perturbation * some), batch.labels)

        def search() -> None:
            kept.clear()
            with evaluating(model):
                for batch in clean.batches(size, generator=run.generator):
                    if not kept:
                        kept.append(unit.new_zeros(shared_shape(perturbation_shape(model, batch.inputs))))
                    perturbation = kept.pop().requires_grad_(True)
                    (slope,) = torch.autograd.grad(inner(perturbation, batch), perturbation)
                    radius = bound * slope.numel() ** 0.5
                    length = 2 * radius / -(-len(clean) // size)
                    moved = perturbation.detach() - length * slope / (slope.norm() + 1e-12)
                    kept.append(moved * (radius / (moved.norm() + 1e-12)).clamp(max=1))

        def gradients(batch: Batch) -> None:
            perturbation = kept[0].requires_grad_(True)
            with evaluating(model), sdpa_kernel(SDPBackend.MATH):  # faster attention has no second derivative
                slopes = implicit_gradient(
                    lambda: inner(perturbation, batch),
                    lambda: outer(perturbation, batch),
                    perturbation,
                    parameters,
                    iterations=self.iterations,
                    step=self.step,
                )
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope

        run.tune(
            model,
            clean,
            epochs=self.rounds,
            learning_rate=run.setting(self, "learning_rate"),
            batch_size=size,
            optimizer="adamw",
            gradients=gradients,
            before_epoch=search,
        )
        return model


def shared_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one perturbation for all examples of a batch: a picture, or a shift of all embeddings.

    >>> shared_shape((32, 3, 28, 28)), shared_shape((16, 40, 768))
    ((1, 3, 28, 28), (1, 1, 768))
    """
    return (1, *shape[1:]) if len(shape) == 4 else (1, 1, *shape[2:])


def implicit_gradient(
    inner: Callable[[], Tensor],
    outer: Callable[[], Tensor],
    perturbation: Tensor,
    parameters: Sequence[Tensor],
    *,
    iterations: int,
    step: float,
) -> list[Tensor]:
    """Returns the derivative of `outer` by the parameters if the perturbation minimises `inner`; see `IBAU`."""
    along, *direct = torch.autograd.grad(outer(), [perturbation, *parameters], materialize_grads=True)
    (slope,) = torch.autograd.grad(inner(), perturbation, create_graph=True)
    v = along
    for _ in range(iterations - 1):
        (bent,) = torch.autograd.grad(slope, perturbation, v, retain_graph=True)
        v = v - step * bent + along
    mixed = torch.autograd.grad(slope, parameters, v, materialize_grads=True)
    return [one - step * other for one, other in zip(direct, mixed, strict=True)]
