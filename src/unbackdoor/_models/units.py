"""Units that can be pruned: channels before a BatchNorm, and neurons that a linear layer reads.

No list of architectures is needed: layers are found by their kind or by running a batch.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import Inputs, evaluating, like_inputs, logits, scored_at_once, without_gradients
from unbackdoor._models.hooks import removing, watching


class Channels(NamedTuple):
    """A convolution, and the BatchNorm after it whose weight and bias can silence its channels.

    Args:
        name: name of the BatchNorm.
        convolution: the convolution.
        kernel: the weight that it computes with, (channels, inputs, kernel sides). It may be another one
            than it stores: it may be standardised, say, or divided by its spectral norm.
        norm: the BatchNorm.
    """

    name: str
    convolution: nn.Module
    kernel: Tensor
    norm: _BatchNorm


def norms(model: nn.Module, method: object) -> dict[str, _BatchNorm]:
    """Returns all BatchNorm layers with weight and bias, by name, in module order.

    Raises:
        UnbackdoorError: there is no such layer; names the method.
    """
    layers = _norms(model)
    if not layers:
        raise _absent("BatchNorm layers with weights and statistics", model, method)
    return layers


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.affine and layer.track_running_stats
    }


def channels(model: nn.Module, method: object, inputs: Inputs | None = None) -> list[Channels]:
    """Finds the BatchNorm layers that read one convolution's output, each with it, in module order, by running a batch.

    Between the two there may be operations on single channels, such as an activation or pooling. A BatchNorm that reads
    a sum, a concatenation or the outputs of different convolutions belongs to no convolution, and so does one that
    reads a module of a convolution that computes more than that.

    Args:
        model: any model.
        method: method whose name is used in messages.
        inputs: a batch; None tries images of the usual sizes, since the pairs do not depend on the size.

    Raises:
        UnbackdoorError: there is no such pair, or the model takes no image of a usual size.
    """
    layers = _norms(model)
    what = "convolutions followed by BatchNorm with weights and statistics"
    if not layers or not any(isinstance(layer, _CONVOLUTIONS) for layer in model.modules()):
        raise _absent(what, model, method)
    read = _convolutions_read(model, layers.values(), _blank_images(model) if inputs is None else [inputs])
    if read is None:
        raise UnbackdoorError(
            f"{type(method).__name__} pairs layers by running the model, and {type(model).__name__} takes no image "
            "of a usual size. Give clean examples."
        )
    pairs = []
    nothing: dict[nn.Module | None, Tensor | None] = {None: None}
    for name, layer in layers.items():
        ((convolution, kernel), *others) = (read.get(layer) or nothing).items()
        if convolution is not None and kernel is not None and not others:
            pairs.append(Channels(name, convolution, kernel, layer))
    if not pairs:
        raise _absent(what, model, method)
    return pairs


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Operations that may come between a convolution and its BatchNorm, by the name of their backward pass.
_CHANNELWISE = re.compile(
    "(Relu|LeakyRelu|Relu6|Hardtanh|Prelu|PreluKernel|Elu|Celu|Selu|Gelu|Silu|Mish|Hardswish|Hardsigmoid|Sigmoid|Tanh|"
    "Softplus|Clamp|NativeDropout|Clone|ToCopy|Alias|Contiguous|"
    "((Adaptive)?(Max|Avg)Pool[123]D(WithIndices)?|MkldnnMaxPool2D))Backward[0-9]*"
)


def _convolutions_read(
    model: nn.Module, layers: Iterable[_BatchNorm], tried: Iterable[Inputs]
) -> dict[nn.Module, dict[nn.Module | None, Tensor | None]] | None:
    """Returns the convolutions that each layer reads, with their kernels; None if the model takes no input.

    Any other input is None among the convolutions.
    """
    convolutions: dict[Any, nn.Module] = {}  # by the node of the backward pass
    read: dict[nn.Module, dict[nn.Module | None, Tensor | None]] = {}

    def remember(layer: nn.Module, _arguments: Any, output: Tensor) -> None:
        if hasattr(output.grad_fn, "_saved_weight"):  # else its module does more than to convolve
            convolutions[output.grad_fn] = layer

    def look(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        node: Any = arguments[0].grad_fn
        while node is not None and node not in convolutions and _CHANNELWISE.fullmatch(type(node).__name__):
            before = [part for part, _ in node.next_functions if part is not None]
            node = before[0] if len(before) == 1 else None
        convolution = convolutions.get(node)
        kernel = None if convolution is None else node._saved_weight.detach()
        read.setdefault(layer, {})[convolution] = kernel

    hooks = [layer.register_forward_hook(remember) for layer in model.modules() if isinstance(layer, _CONVOLUTIONS)]
    hooks += [layer.register_forward_pre_hook(look) for layer in layers]
    with removing(hooks), evaluating(model), torch.enable_grad():
        for inputs in tried:
            convolutions.clear()
            read.clear()
            try:
                logits(model, inputs.detach().requires_grad_() if isinstance(inputs, Tensor) else inputs)
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError, UnbackdoorError) as problem:
                if without_gradients(problem):  # nothing tells then which layer reads which
                    raise
                continue
            return read
    return None


def _blank_images(model: nn.Module) -> Iterator[Tensor]:
    """Yields blank images of the sizes that a model may take, the likeliest first."""
    config = getattr(model, "config", None)
    first = next(layer for layer in model.modules() if isinstance(layer, _CONVOLUTIONS))
    like = like_inputs(model)
    sides = [
        getattr(config, "image_size", None),
        32,
        224,
        28,
        8,
        12,
        16,
        24,
        48,
        64,
        96,
        112,
        128,
        160,
        192,
        256,
        299,
        384,
    ]
    for side in (side for side in sides if isinstance(side, int)):
        for count in dict.fromkeys((first.in_channels, 3, 1)):
            yield torch.zeros(2, count, side, side, device=like.device, dtype=like.dtype)


def _absent(what: str, model: nn.Module, method: object) -> UnbackdoorError:
    return UnbackdoorError(f"{type(method).__name__} needs {what}; {type(model).__name__} has none. Try fine-pruning.")


def matrix_of(layer: nn.Module) -> Tensor | None:
    """Returns the matrix of a linear layer as (outputs, inputs), in the layer's memory; None for other layers.

    The layers of GPT-2, which transformers calls Conv1D, are linear and store the transposed matrix.
    """
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        stored: Tensor = layer.weight  # type: ignore[assignment]
        return stored.detach().T
    return None


@torch.no_grad()
def feed_forward(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """Returns the second linear layer of each feed-forward block, in running order; its inputs are the neurons.

    A block is a widening linear layer (d to h > d) and the linear layer that runs next, if it goes back (h to d).
    """
    ran: list[tuple[nn.Module, torch.Size]] = []
    layers = {layer: matrix.shape for layer in model.modules() if (matrix := matrix_of(layer)) is not None}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _args: ran.append((layer, layers[layer]))) for layer in layers
    ]
    with removing(hooks), evaluating(model):
        logits(model, inputs)
    return [
        back
        for (_, (hidden, width)), (back, (returned, read)) in itertools.pairwise(ran)
        if width == returned < hidden == read
    ]


@torch.no_grad()
def mean_activation(model: nn.Module, reader: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Returns the mean absolute value of each input of a linear layer over the data without padding, (inputs,)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    with watching(reader) as seen, evaluating(model):
        for batch in data.batches(scored_at_once(model, data, arithmetic)):
            with arithmetic.autocast():
                logits(model, arithmetic.lay(batch.inputs))
            sizes = sizes_of(seen[0], batch.inputs)
            total = total + sizes.sum(dim=0).cpu()
            count += len(sizes)
    return total / count


def sizes_of(values: Tensor, inputs: Inputs) -> Tensor:
    """Returns absolute values, one row for each example or for each token that is not padding, (rows, values)."""
    sizes = values.abs().double()
    if isinstance(inputs, Tokens):
        if sizes.shape[:-1] == (inputs.shape.numel(),):  # all tokens of a batch in one row, as OPT has them
            sizes = sizes.view(*inputs.shape, -1)
        if sizes.shape[:-1] == inputs.shape:
            sizes = sizes[inputs["attention_mask"].bool()]
    return sizes.flatten(0, -2)


@torch.no_grad()
def mean_answer(model: nn.Module, clean: Dataset, arithmetic: Arithmetic) -> dict[str, Tensor]:
    """Returns the mean absolute value of each output of each linear layer on clean examples, (out_features,) by name.

    For layers that see every token of a text, it is the mean over all tokens of all texts; padding does not count.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    inputs: Inputs

    def count(name: str, output: Tensor) -> None:
        sizes = sizes_of(output, inputs)
        sums[name] = sums.get(name, 0) + sizes.sum(dim=0)
        counts[name] = counts.get(name, 0) + len(sizes)

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output, name=name: count(name, output))
        for name, layer in layers.items()
    ]
    with removing(hooks), evaluating(model):
        for batch in clean.batches(scored_at_once(model, clean, arithmetic)):
            inputs = batch.inputs
            with arithmetic.autocast():
                logits(model, arithmetic.lay(inputs))
    return {name: total / counts[name] for name, total in sums.items()}
