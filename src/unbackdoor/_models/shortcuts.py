"""Skip connections, found by observing additions in a model: the shallower of two summands is the shortcut.

In most networks they are not modules (`out += identity`), so no list of layers contains them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from unbackdoor._models.calling import Inputs, evaluating, logits
from unbackdoor._models.hooks import removing

_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_IN_PLACE = {"add_", "__iadd__"}
_LAYERS = {"linear", "multi_head_attention_forward"}
_LAYERS |= {f"{kind}{dimensions}d" for kind in ("conv", "conv_transpose") for dimensions in (1, 2, 3)}


class _Additions(TorchFunctionMode):
    """Follows one forward pass: the depth of each tensor in layers, and the sums of tensors of different depths."""

    def __init__(self, scales: dict[int, float]) -> None:
        super().__init__()
        self.scales = scales
        self.depths = WeakTensorKeyDictionary()
        self.shortcuts: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        inputs = list(_tensors((*args, *kwargs.values())))
        depths = [self.depths.get(part, 0) for part in inputs]
        if name in _ADDITIONS and len(inputs) == 2 and depths[0] != depths[1] and inputs[0].shape == inputs[1].shape:
            shallow = inputs[0 if depths[0] < depths[1] else 1]
            scale = self.scales.get(len(self.shortcuts), 1.0)
            self.shortcuts.append(shallow)
            if scale != 1:
                # An in-place sum overwrites its first summand anyway, and a copy would lose the sum.
                weaker = shallow.mul_(scale) if name in _IN_PLACE and shallow is inputs[0] else shallow * scale
                args = tuple(weaker if part is shallow else part for part in args)
                kwargs = {key: weaker if part is shallow else part for key, part in kwargs.items()}
        output = func(*args, **kwargs)
        for part in _tensors((output,)):
            self.depths[part] = max(depths, default=0) + (name in _LAYERS)
        return output


def _tensors(parts: tuple[Any, ...]) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, list | tuple):
            yield from _tensors(tuple(part))


@contextmanager
def scaled(model: nn.Module, scales: dict[int, float]) -> Iterator[None]:
    """Multiply shortcuts, by their number in running order, in each forward pass of the model within the block.

    Args:
        model: any model.
        scales: factors by number; read at each forward pass, so they may change between passes.
    """
    running: list[ExitStack] = []

    def enter(*_: object) -> None:
        running.append(ExitStack())
        running[-1].enter_context(_Additions(scales))

    def leave(*_: object) -> None:
        running.pop().close()

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    with removing(hooks):
        yield


@torch.no_grad()
def shortcuts(model: nn.Module, inputs: Inputs) -> list[_BatchNorm | None]:
    """Returns the skip connections in running order: the BatchNorm that ends each, or None if no BatchNorm does."""
    normed: list[tuple[Tensor, _BatchNorm]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, _args, output: normed.append((output, layer)))
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.affine
    ]
    with removing(hooks), evaluating(model), _Additions({}) as seen:
        logits(model, inputs)
    return [next((layer for output, layer in normed if output is part), None) for part in seen.shortcuts]
