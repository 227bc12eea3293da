"""Heads that compute what a linear layer could: a linear layer takes their place while a model is worked on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import Inputs, checked_logits, probe
from unbackdoor._models.head import head_of
from unbackdoor._models.hooks import removing


class LinearHead(nn.Module):
    """A linear layer, called `linear`, in place of a layer from whose output a model makes class scores.

    Args:
        layer: a convolution with kernels of 1x1, or a linear layer; it has an output for each class, or one for two.
        factors: for each class, what the model multiplies the layer's output by, after the mean over positions.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, factors: Sequence[float]) -> None:
        super().__init__()
        self.factors = tuple(factors)
        weight = layer.weight.detach().flatten(1) * layer.weight.new_tensor(factors)[:, None]
        classes, width = weight.shape
        self.linear = nn.utils.skip_init(  # draws nothing
            nn.Linear, width, classes, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            if layer.bias is not None:
                self.linear.bias.copy_(layer.bias * layer.bias.new_tensor(factors))
        self._layer = [layer]  # in a list, so that it is no part of the model

    def _outputs(self, scores: Tensor) -> Tensor:
        """Returns the layer's outputs, (n, outputs), from class scores, (n, classes); one output is a difference."""
        if self._layer[0].weight.shape[0] == len(self.factors):
            return scores / scores.new_tensor(self.factors)
        return (scores[:, 1:] - scores[:, :1]) / (self.factors[1] - self.factors[0])

    def forward(self, features: Tensor) -> Tensor:
        """Returns the layer's output, (batch, outputs); at each of several positions, its mean over them."""
        pooled = features if features.ndim == 2 else features.mean(dim=(2, 3))
        outputs = self._outputs(self.linear(pooled))
        return outputs if features.ndim == 2 else outputs[:, :, None, None].expand(-1, -1, *features.shape[2:])

    @torch.no_grad()
    def layer(self) -> nn.Module:
        """Returns the layer with the numbers that the linear one has now."""
        layer = self._layer[0]
        layer.weight.data = self._outputs(self.linear.weight.T).T.reshape(layer.weight.shape)
        if layer.bias is not None:
            layer.bias.data = self._outputs(self.linear.bias[None])[0]
        return layer.train(self.training)


@torch.no_grad()
def exchange_head_(model: nn.Module, data: Dataset) -> None:
    """Put a linear layer in the place of a head that computes the same, in place.

    Such a head is a convolution with kernels of 1x1, before or after the mean over positions, a layer whose output the
    model multiplies by a number, or one of a single output x from which two scores are made, 0 and x or -x and x. All
    are known by running the model. `put_back_head_` undoes it.

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
        factors = None if more else _factors(first.to(scores.dtype), scores)
        if factors is not None:
            if set(factors) != {1.0} or isinstance(layers[name], nn.Conv2d):
                _exchange_(model, name, factors, inputs, scores)
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


def _factors(answers: Tensor, scores: Tensor) -> list[float] | None:
    """Returns what a layer's answers, (batch, classes) or (batch, 1), are multiplied by; None if it makes other scores.

    Scores, (batch, classes), may also be logarithms of probabilities.
    """
    classes = scores.shape[1]
    tried = [[1.0] * classes]
    if classes == 2 and answers.shape[1] == 1:
        tried = [[0.0, 1.0], [1.0, 0.0], [-1.0, 1.0], [1.0, -1.0]]
    elif answers.shape != scores.shape:
        return None
    elif len(answers) > 1:
        factor = float((answers.double() * scores).sum() / answers.double().square().sum())
        tried += [[factor] * classes] if factor else []
    for factors in tried:
        made = answers * answers.new_tensor(factors)
        for each, near in ((made, 1e-6), (made.log_softmax(1), 1e-5)):
            if torch.allclose(each, scores, rtol=1e-4, atol=near):
                return factors
    return None


def _exchange_(model: nn.Module, name: str, factors: list[float], inputs: Inputs, scores: Tensor) -> None:
    """Put a linear layer in the place of another, unless that shares its weight or the model then answers otherwise."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    if sum(part is layer.weight for module in model.modules() for part in module._parameters.values()) > 1:
        return
    head = LinearHead(layer, factors).train(layer.training)
    model.set_submodule(name, head)
    try:
        same = head_of(model, inputs).layer is head.linear
        same = same and torch.allclose(checked_logits(model, inputs), scores, rtol=1e-4, atol=1e-5)
    except UnbackdoorError:
        same = False
    if not same:
        put_back_head_(model)
