"""Layers whose weight is computed from other tensors; weight normalisation is undone while a model is worked on."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import remove_weight_norm as remove_old
from torch.nn.utils import weight_norm as put_on_old
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from unbackdoor._errors import UnbackdoorError

_KEPT = "_unbackdoor_weight_norms"  # an attribute of a layer, so that copies of it have it as well


class _Norm(NamedTuple):
    """The weight normalisation of a layer: a weight is `direction` brought to `length` along `dim`.

    Args:
        name: of the weight in the layer.
        dim: the dimension that has a length for each of its entries; -1 for one length of all.
        length: the parameter `g`.
        direction: the parameter `v`, of the shape of the weight.
        old: whether it is that of `torch.nn.utils.weight_norm`, and not that of `parametrizations`.
    """

    name: str
    dim: int
    length: Tensor
    direction: Tensor
    old: bool


@torch.no_grad()
def undo_weight_norms_(model: nn.Module) -> None:
    """Give layers with weight normalisation a plain weight of the same numbers, in place.

    A method that turns, scales or prunes a weight would change a computed one without any effect.
    `redo_weight_norms_` undoes it.
    """
    for layer in list(model.modules()):
        norms = [*_old(layer), *_new(layer)]
        weights = {norm.name: nn.Parameter(getattr(layer, norm.name).detach().clone()) for norm in norms}
        for norm in norms:
            if norm.old:
                remove_old(layer, norm.name)
        if any(not norm.old for norm in norms):
            # Not remove_parametrizations, which changes the class: the copies of a layer share it.
            del layer._modules["parametrizations"]
            layer.__class__ = type(layer).__bases__[0]
        if norms:
            layer._parameters = {
                **weights,
                **{name: part for name, part in layer._parameters.items() if name not in weights},
            }  # a weight stands before its bias
            setattr(layer, _KEPT, norms)


@torch.no_grad()
def redo_weight_norms_(model: nn.Module) -> None:
    """Compute the weights again as they were before `undo_weight_norms_`, from the numbers that they have now."""
    for layer in model.modules():
        norms: list[_Norm] = getattr(layer, _KEPT, [])
        if norms:
            delattr(layer, _KEPT)
        for norm in norms:
            weight = getattr(layer, norm.name).detach().clone()
            length, direction = norm.length.to(weight), norm.direction.to(weight)
            if not torch.equal(_weight(direction, length, norm.dim), weight):  # else it stays as it was, bit by bit
                length = torch.norm_except_dim(weight, 2, norm.dim)
                direction = torch.where(length == 0, torch.ones_like(weight), weight)  # 0 has no direction
            if norm.old:
                put_on_old(layer, norm.name, norm.dim)
                lengths, directions = getattr(layer, f"{norm.name}_g"), getattr(layer, f"{norm.name}_v")
            else:
                parametrizations.weight_norm(layer, norm.name, norm.dim)
                parts: Any = layer.parametrizations
                lengths, directions = parts[norm.name].original0, parts[norm.name].original1
            lengths.copy_(length)
            directions.copy_(direction)
            if norm.old:  # what the hook of the next pass computes
                setattr(layer, norm.name, _weight(direction, length, norm.dim))


@torch.no_grad()
def settle_spectral_norms_(model: nn.Module) -> None:
    """Compute the singular vectors by which spectral normalisation divides its weights, in place.

    They are estimates that follow a weight in passes in train mode alone. Weights that were set are divided by the
    estimate of others, and so do not have norm 1.
    """
    for layer in model.modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                matrix = hook.reshape_weight_to_matrix(getattr(layer, f"{hook.name}_orig"))
                _leading_(matrix, getattr(layer, f"{hook.name}_u"), getattr(layer, f"{hook.name}_v"))
        parts: Any = layer.parametrizations if parametrize.is_parametrized(layer) else {}
        for steps in parts.values():
            if len(steps) == 1 and isinstance(steps[0], parametrizations._SpectralNorm) and steps.original.ndim > 1:
                _leading_(steps[0]._reshape_weight_to_matrix(steps.original), steps[0]._u, steps[0]._v)


def _leading_(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Write the singular vectors of the largest singular value of a matrix."""
    columns, _, rows = torch.linalg.svd(matrix.double(), full_matrices=False)
    left.copy_(columns[:, 0])
    right.copy_(rows[0])


def check_weight_is_own(layer: nn.Module, which: str = "its last linear layer") -> None:
    """Refuse a layer whose weight is computed from other tensors, where a method sets it.

    Args:
        layer: the layer.
        which: what it is in the model, for the message.

    Raises:
        UnbackdoorError: names the ways out.
    """
    if "weight" not in layer._parameters:
        raise UnbackdoorError(
            f"the model computes the weight of {which} from other tensors (spectral normalisation, a mask of pruning "
            "or another parametrization), so that this method cannot set it. Save the model without that "
            "(remove_parametrizations, remove_spectral_norm or prune.remove of torch.nn.utils), or take fine-tuning."
        )


def copied_tensors(model: nn.Module) -> dict[int, Any]:
    """Returns a memo for `copy.deepcopy` with copies of computed weights, which Python cannot copy by itself.

    The normalisations of `torch.nn.utils` keep a weight with its gradient graph as an attribute of a layer.
    """
    return {
        id(part): part.detach().clone()
        for module in model.modules()
        for part in vars(module).values()
        if isinstance(part, Tensor) and not part.is_leaf
    }


def detach_(model: nn.Module) -> None:
    """Take the graph off computed weights, in place, so that a model can be copied; the next pass computes them."""
    for module in model.modules():
        for name, part in list(vars(module).items()):
            if isinstance(part, Tensor) and not part.is_leaf:
                setattr(module, name, part.detach())


def _old(layer: nn.Module) -> list[_Norm]:
    own = layer._parameters
    return [
        _Norm(hook.name, hook.dim, _kept(own[f"{hook.name}_g"]), _kept(own[f"{hook.name}_v"]), old=True)
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, WeightNorm)
    ]


def _new(layer: nn.Module) -> list[_Norm]:
    found: Any = layer.parametrizations if parametrize.is_parametrized(layer) else {}
    if not all(len(steps) == 1 and isinstance(steps[0], parametrizations._WeightNorm) for steps in found.values()):
        return []
    return [
        _Norm(name, steps[0].dim, _kept(steps.original0), _kept(steps.original1), old=False)
        for name, steps in found.items()
    ]


def _kept(part: Any) -> Tensor:
    assert isinstance(part, Tensor)
    return part.detach().clone()


def _weight(direction: Tensor, length: Tensor, dim: int) -> Tensor:
    return torch._weight_norm(direction, length, dim)
