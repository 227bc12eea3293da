"""Heads that compute what a linear layer could: a linear layer takes their place while a model is worked on."""

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import Inputs, checked_logits, probe
from unbackdoor._models.head import head_of
from unbackdoor._models.hooks import removing


class LinearHead(nn.Module):
    """A linear layer, called `linear`, in place of a layer from whose output a model takes the mean and a multiple.

    Args:
        layer: a convolution with kernels of 1x1, or a linear layer.
        factor: the model's class scores divided by the layer's output, not 0.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, factor: float) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten(1) * factor
        classes, width = weight.shape
        self.linear = nn.utils.skip_init(  # draws nothing
            nn.Linear, width, classes, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            if layer.bias is not None:
                self.linear.bias.copy_(layer.bias * factor)
        self.factor = factor
        self._layer = [layer]  # in a list, so that it is no part of the model

    def forward(self, features: Tensor) -> Tensor:
        """Returns the layer's output, (batch, classes); at each of several positions, its mean over them."""
        pooled = features if features.ndim == 2 else features.mean(dim=(2, 3))
        scores: Tensor = self.linear(pooled) / self.factor
        return scores if features.ndim == 2 else scores[:, :, None, None].expand(-1, -1, *features.shape[2:])

    @torch.no_grad()
    def layer(self) -> nn.Module:
        """Returns the layer with the numbers that the linear one has now."""
        layer = self._layer[0]
        layer.weight.data = (self.linear.weight / self.factor).reshape(layer.weight.shape)
        if layer.bias is not None:
            layer.bias.data = self.linear.bias / self.factor
        return layer.train(self.training)


@torch.no_grad()
def exchange_head_(model: nn.Module, data: Dataset) -> None:
    """Put a linear layer in the place of a head that computes the same, in place.

    Such a head is a convolution with kernels of 1x1, before or after the mean over positions, or a layer whose output
    the model multiplies by a number; both are known by running the model. `put_back_head_` undoes it.

    Args:
        model: any classifier, in float32 or float64.
        data: examples.
    """
    layers = {name: layer for name, layer in model.named_modules() if name and _replaceable(layer)}
    answers: dict[str, list[Tensor]] = {}  # (batch, classes), of each pass through a layer

    def keep(name: str, output: Tensor) -> None:
        if output.ndim in (2, 4):
            answers.setdefault(name, []).append(output.mean(dim=(2, 3)) if output.ndim == 4 else output)

    hooks = [
        layer.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name, layer in layers.items()
    ]
    try:
        with removing(hooks):
            inputs = probe(model, data)
            scores = checked_logits(model, inputs)
    except UnbackdoorError:  # whoever looks for the head says so
        return
    for name, (first, *more) in reversed(answers.items()):
        factor = _factor(first.to(scores.dtype), scores) if not more and first.shape == scores.shape else None
        if factor is not None:
            if factor != 1 or isinstance(layers[name], nn.Conv2d):
                _exchange_(model, name, factor, inputs, scores)
            return


def put_back_head_(model: nn.Module) -> str | None:
    """Put the layer back whose place `exchange_head_` gave to a linear one, with the numbers of that, in place.

    Returns:
        The name of the layer; None if there was none to put back.
    """
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, LinearHead)}
    for name, module in replaced.items():
        model.set_submodule(name, module.layer())
    return next(iter(replaced), None)


def _replaceable(layer: nn.Module) -> bool:
    """Whether a layer is of a kind that a linear one can stand for."""
    if type(layer) not in (nn.Linear, nn.Conv2d) or "weight" not in layer._parameters:  # a pruned one has another
        return False
    return not isinstance(layer, nn.Conv2d) or (layer.kernel_size == (1, 1) and layer.groups == 1)


def _factor(answers: Tensor, scores: Tensor) -> float | None:
    """Returns the number that a layer's answers, (batch, classes), are multiplied by; None if it makes other scores."""
    if torch.allclose(answers, scores, rtol=1e-4, atol=1e-6) or torch.allclose(
        answers.log_softmax(1), scores, rtol=1e-4, atol=1e-5
    ):
        return 1.0
    factor = float((answers.double() * scores).sum() / answers.double().square().sum())
    right = factor != 0 and torch.allclose(factor * answers, scores, rtol=1e-4, atol=1e-6)
    return factor if right and len(answers) > 1 else None


def _exchange_(model: nn.Module, name: str, factor: float, inputs: Inputs, scores: Tensor) -> None:
    """Put a linear layer in the place of another, unless that shares its weight or the model then answers otherwise."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    if sum(part is layer.weight for module in model.modules() for part in module._parameters.values()) > 1:
        return
    head = LinearHead(layer, factor).train(layer.training)
    model.set_submodule(name, head)
    try:
        same = head_of(model, inputs).layer is head.linear
        same = same and torch.allclose(checked_logits(model, inputs), scores, rtol=1e-4, atol=1e-5)
    except UnbackdoorError:
        same = False
    if not same:
        put_back_head_(model)
