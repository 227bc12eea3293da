"""Multi-scale low-rank adaptation."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._registry.entries import Modality
from unbackdoor._robust_training.run import TrainingRun
from unbackdoor._tasks.classification import hits
from unbackdoor._training.descent import cross_entropy
from unbackdoor._training.lora import adapted, merged
from unbackdoor._value import value


@value
class MuScleLoRA:
    """Train few directions of the weights, and only along those that clean examples also ask for.

    A shortcut is a smooth function, of low frequency, which networks learn first. Three things hold it back. Only
    matrices of low rank next to the layers are trained (LoRA). The head has several, of rank 1, whose inputs are scaled
    by 1, 2, ..., which brings functions of higher frequency within reach. And the gradient g of each parameter is
    replaced by the size of its projection on the gradient r of a batch of clean examples, along r: |g . r| / |r|^2 * r.
    At the end all matrices are added to the layers: the result is a model like any other.

    Wu, Zhang, Cheng and Liu, "Acquiring Clean Language Models from Backdoor Poisoned Datasets by Downscaling Frequency
    Space", ACL 2024, https://arxiv.org/abs/2402.12026

    Distrusts rows that the trained model answers otherwise than labelled.

    Cannot see: triggers for which clean examples and poisoned rows pull the weights the same way. It needs clean texts,
    about 100 in the paper.

    Args:
        rank: rank of the matrices next to the layers, 1 to 4,096.
        alpha: numerator of their scale, at least 1; the denominator is the rank.
        scales: number of matrices in the head, at least 1.
        reference: clean examples in the batch of each step, at least 2; all if there are fewer.
        raw_share: share of the gradient that is not aligned, 0 to 1; it grows to this from 0 over the training.
        adapter_epochs: passes over the data, at least 1; those of the recipe are for tuning all weights.
        adapter_rate: peak learning rate, more than 0; that of the recipe is for tuning all weights.

    Differences from the paper: written from its formulas. How the share of the raw gradient grows is this project's
    choice: evenly with the steps. The learning rate is larger, for fewer epochs. The rows that are distrusted are this
    project's addition.
    """

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Annotated[int, Field(ge=1)] = 32
    scales: Annotated[int, Field(ge=1)] = 9
    reference: Annotated[int, Field(ge=2)] = 96
    raw_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    adapter_epochs: Annotated[int, Field(ge=1)] = 10
    adapter_rate: Annotated[float, Field(gt=0)] = 5e-4

    modality: ClassVar[tuple[Modality, ...]] = ("text",)
    needs_clean: ClassVar[bool] = True

    def __call__(self, data: Dataset, model: nn.Module, run: TrainingRun) -> nn.Module:
        """Train in place."""
        if not hasattr(model, "can_generate"):
            raise UnbackdoorError(
                f"MuScleLoRA needs a model of transformers, got {type(model).__name__}. Try dpoe or abl."
            )
        assert run.clean is not None
        body = set(map(id, model.base_model.parameters()))  # type: ignore[union-attr]
        adapters = adapted(model, rank=self.rank, alpha=self.alpha, seed=run.seed)
        for parameter in model.parameters():  # a layer between body and head is as new as the head
            parameter.requires_grad_(parameter.requires_grad or id(parameter) not in body)
        head = MultiScale(run.head(model), self.scales, run.generator)
        model.set_submodule(run.head_name, run.arithmetic.place(head))
        run.train(
            model,
            data,
            epochs=self.adapter_epochs,
            learning_rate=self.adapter_rate,
            gradients=self.alignment(model, data, run),
        )
        model.set_submodule(run.head_name, head.plain())
        merged(adapters)
        losses = run.losses(model, data)
        rows = (~hits(model, data, run.arithmetic)).nonzero().flatten()
        run.distrust(rows, losses[rows], "the loss of the trained model")
        return model

    def alignment(self, model: nn.Module, data: Dataset, run: TrainingRun) -> Any:
        """Returns the function that fills the gradients for a batch."""
        assert run.clean is not None
        clean = references(run.clean.to(run.arithmetic.device), self.reference, run.generator)
        size = run.training.schedule.batch_size
        steps = self.adapter_epochs * -(-len(data) // size)
        done = 0

        def fill(batch: Batch) -> None:
            nonlocal done
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            wanted, gradients = (
                torch.autograd.grad(cross_entropy(run.scores(model, each.inputs), each), parameters, allow_unused=True)
                for each in (next(clean), batch)
            )
            share = self.raw_share * min(1.0, done / steps)
            for parameter, along, gradient in zip(parameters, wanted, gradients, strict=True):
                if along is not None and gradient is not None:
                    parameter.grad = share * gradient + (1 - share) * aligned(gradient, along)
            done += 1

        return fill


class MultiScale(nn.Module):
    """A linear layer whose change is the sum of matrices of rank 1, on inputs that are scaled by 1, 2, ...

    Args:
        layer: the layer; its weight stays, its bias is trained.
        scales: number of matrices.
        generator: draws their rows; their columns start at zero.
    """

    def __init__(self, layer: nn.Linear, scales: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        layer.weight.requires_grad_(False)
        weight = layer.weight
        drawn = torch.randn(scales, layer.in_features, generator=generator) / layer.in_features**0.5
        self.rows = nn.Parameter(drawn.to(weight))
        self.columns = nn.Parameter(weight.new_zeros(layer.out_features, scales))

    def forward(self, features: Tensor) -> Tensor:
        """Scores of features, (..., in_features) to (..., out_features)."""
        changed: Tensor = self.layer(features) + features @ self.scaled().T @ self.columns.T
        return changed

    def scaled(self) -> Tensor:
        """The rows, each times its scale, (scales, in_features)."""
        return self.rows * torch.arange(1, len(self.rows) + 1).to(self.rows)[:, None]

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """Returns the layer with all matrices added to its weight."""
        self.layer.weight += self.columns @ self.scaled()
        return self.layer


def aligned(gradient: Tensor, along: Tensor) -> Tensor:
    """Returns the size of the projection of a gradient on another, along the other; 0 if that is 0."""
    length = along.pow(2).sum()
    return torch.where(length > 0, (gradient * along).sum().abs() / length.clamp_min(1e-30), 0) * along


def references(clean: Dataset, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of clean examples without end."""
    while True:
        yield from clean.batches(min(size, len(clean)), generator=generator)
