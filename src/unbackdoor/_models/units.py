"""Units that can be pruned: channels behind a BatchNorm, and neurons that a linear layer reads.

No list of architectures is needed: layers are found by their kind or by running a batch.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import Inputs, evaluating, logits, removing, watching
from unbackdoor._purification.purify import Run


class Channels(NamedTuple):
    """A convolution, and the BatchNorm after it whose weight and bias can silence its channels."""

    name: str
    convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d
    norm: _BatchNorm


def norms(model: nn.Module, method: object) -> dict[str, _BatchNorm]:
    """All BatchNorm layers with a weight and a bias of their own, by name, in module order.

    Raises:
        UnbackdoorError: there is none; names the method.
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.affine and layer.track_running_stats
    }
    if not found:
        raise _absent("BatchNorm layers with weights and statistics", model, method)
    return found


def channels(model: nn.Module, method: object, inputs: Inputs | None = None) -> list[Channels]:
    """The BatchNorm layers that read what one convolution gives, each with it, in module order; found by running.

    Between the two there may be what treats each channel for itself: an activation, pooling. A BatchNorm that reads a
    sum or a concatenation, or now one convolution and now another, belongs to none.

    Args:
        model: any.
        method: named in messages.
        inputs: a batch; None tries pictures of the usual sizes, as which layer reads which does not depend on them.

    Raises:
        UnbackdoorError: there is none, or the model takes no picture of a usual size.
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.affine and layer.track_running_stats
    }
    what = "convolutions followed by BatchNorm with weights and statistics"
    if not found or not any(isinstance(layer, _CONVOLUTIONS) for layer in model.modules()):
        raise _absent(what, model, method)
    read = _read(model, found.values(), _pictures(model) if inputs is None else [inputs])
    if read is None:
        raise UnbackdoorError(
            f"{type(method).__name__} pairs layers by running the model, and {type(model).__name__} takes no picture "
            "of a usual size. Give clean examples."
        )
    pairs = []
    for name, layer in found.items():
        (convolution, *others) = read.get(layer) or {None}
        if convolution is not None and not others:
            pairs.append(Channels(name, convolution, layer))
    if not pairs:
        raise _absent(what, model, method)
    return pairs


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# What may stand between a convolution and its BatchNorm, by the name of its backward pass.
_CHANNELWISE = re.compile(
    "(Relu|LeakyRelu|Relu6|Hardtanh|Prelu|PreluKernel|Elu|Celu|Selu|Gelu|Silu|Mish|Hardswish|Hardsigmoid|Sigmoid|Tanh|"
    "Softplus|Clamp|NativeDropout|Clone|ToCopy|Alias|Contiguous|"
    "((Adaptive)?(Max|Avg)Pool[123]D(WithIndices)?|MkldnnMaxPool2D))Backward[0-9]*"
)


def _read(model: nn.Module, layers: Iterable[_BatchNorm], tried: Iterable[Inputs]) -> dict[nn.Module, set[Any]] | None:
    """Which convolution's output each layer reads, None for another thing; None in all where no input is taken."""
    made: dict[Any, nn.Module] = {}  # by the node of the backward pass
    read: dict[nn.Module, set[Any]] = {}

    def remember(layer: nn.Module, _given: Any, output: Tensor) -> None:
        made[output.grad_fn] = layer

    def look(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        node = given[0].grad_fn
        while node is not None and node not in made and _CHANNELWISE.fullmatch(type(node).__name__):
            before = [part for part, _ in node.next_functions if part is not None]
            node = before[0] if len(before) == 1 else None
        read.setdefault(layer, set()).add(made.get(node))

    hooks = [layer.register_forward_hook(remember) for layer in model.modules() if isinstance(layer, _CONVOLUTIONS)]
    hooks += [layer.register_forward_pre_hook(look) for layer in layers]
    with removing(hooks), evaluating(model), torch.enable_grad():
        for inputs in tried:
            made.clear()
            read.clear()
            try:
                logits(model, inputs.detach().requires_grad_() if isinstance(inputs, Tensor) else inputs)
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError, UnbackdoorError):
                continue
            return read
    return None


def _pictures(model: nn.Module) -> Iterator[Tensor]:
    """Blank pictures of the sizes that a model may take, the likeliest first."""
    config = getattr(model, "config", None)
    first = next(layer for layer in model.modules() if isinstance(layer, _CONVOLUTIONS))
    like = next(model.parameters())
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
    """The matrix of a linear layer as (outputs, inputs), of which a change is one of the layer; None of other layers.

    The layers of GPT-2, which transformers calls Conv1D, are linear ones that store it the other way round.
    """
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        stored: Tensor = layer.weight  # type: ignore[assignment]
        return stored.detach().T
    return None


@torch.no_grad()
def feed_forward(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """The second linear layer of each feed-forward block, in running order; its inputs are the neurons.

    A block is a widening linear layer (d to h > d) and, as the next linear layer to run, one back (h to d).
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
    """The mean absolute value of each input of a linear layer over the data, (inputs,); padding does not count."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    with watching(reader) as seen, evaluating(model):
        for batch in data.batches(arithmetic.evaluation_batch):
            with arithmetic.autocast():
                logits(model, arithmetic.lay(batch.inputs))
            sizes = _sizes(seen[0], batch.inputs)
            total = total + sizes.sum(dim=0).cpu()
            count += len(sizes)
    return total / count


@torch.no_grad()
def mean_answer(model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
    """For each linear layer, the mean size of each output over the clean examples, (out_features,).

    Of layers that see every token of a text it is the mean over all tokens of all texts; padding does not count.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    inputs: Inputs

    def count(name: str, output: Tensor) -> None:
        sizes = _sizes(output, inputs)
        sums[name] = sums.get(name, 0) + sizes.sum(dim=0)
        counts[name] = counts.get(name, 0) + len(sizes)

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output, name=name: count(name, output))
        for name, layer in layers.items()
    ]
    with removing(hooks), evaluating(model):
        for batch in clean.batches(run.arithmetic.evaluation_batch):
            inputs = batch.inputs
            run.scores(model, inputs)
    return {name: total / counts[name] for name, total in sums.items()}


def _sizes(values: Tensor, inputs: Inputs) -> Tensor:
    """Absolute values as one row for each example, or for each token that is no padding, (rows, values)."""
    sizes = values.abs().double()
    if isinstance(inputs, Tokens) and sizes.shape[:-1] == inputs.shape:
        sizes = sizes[inputs["attention_mask"].bool()]
    return sizes.flatten(0, -2)


class Scale(nn.Module):
    """A parametrization: what is stored, times a mask, plus noise relative to it."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(stored))
        self.noise = nn.Parameter(torch.zeros_like(stored))

    def forward(self, stored: Tensor) -> Tensor:
        """The stored value, scaled channel by channel."""
        return stored * (self.mask + self.noise)


def scaled_(layers: Iterable[nn.Module], name: str) -> list[Scale]:
    """Put a mask and a noise on a parameter of each layer; for copies that are thrown away afterwards."""
    made = []
    for layer in layers:
        scale = Scale(getattr(layer, name).detach())
        parametrize.register_parametrization(layer, name, scale)
        made.append(scale)
    return made


@torch.no_grad()
def as_far_as_accurate_(
    parameters: Sequence[Tensor], stages: Iterable[Callable[[], None]], accurate: Callable[[], bool]
) -> int:
    """Prune in stages, from mild to severe, up to the last one after which the model is still accurate.

    Args:
        parameters: all that a stage may change.
        stages: each changes some of them in place.
        accurate: asked after each stage.

    Returns:
        how many stages were kept.
    """
    kept = 0
    for stage in stages:
        before = [parameter.clone() for parameter in parameters]
        stage()
        if not accurate():
            for parameter, earlier in zip(parameters, before, strict=True):
                parameter.copy_(earlier)
            break
        kept += 1
    return kept


def still_accurate(model: nn.Module, held: Dataset, run: Run, tolerance: float) -> Callable[[], bool]:
    """Asks whether accuracy on held-out examples has fallen by no more than a tolerance since this call."""
    floor = run.accuracy(model, held).value - tolerance
    return lambda: run.accuracy(model, held).value >= floor


@torch.no_grad()
def silence_(norm: _BatchNorm, dead: Tensor, *, bias: bool = True) -> None:
    """Fold away channels of a BatchNorm, in place: weight to zero, and where `bias`, what they add regardless.

    Args:
        norm: with a weight.
        dead: which channels, (channels,), bool.
        bias: zero the bias, too; else a channel becomes constant.
    """
    norm.weight[dead] = 0
    if bias:
        norm.bias[dead] = 0


class ByMask(Protocol):
    """A method that learns a mask and prunes below a threshold of it.

    Attributes:
        tolerance: how much accuracy on held-out clean examples may fall by pruning.
        threshold: of the mask; None searches it.
    """

    @property
    def tolerance(self) -> float: ...

    @property
    def threshold(self) -> float | None: ...


def prune_below_(
    method: ByMask,
    model: nn.Module,
    clean: Dataset,
    run: Run,
    learn: Callable[[nn.Module, Dataset, Run], Sequence[Tensor]],
) -> None:
    """Learn a mask and prune channels by it, in place, at the largest threshold that clean accuracy allows.

    Thresholds go up from 0 to 0.95 by 0.05, until accuracy on a fifth of the clean examples, which the mask has not
    seen, falls by more than the tolerance. With a threshold given, the mask is learned on all of them. As in the papers
    of both methods that learn masks, a channel's weight becomes zero and its bias stays.

    Args:
        method: named in the note.
        model: with BatchNorm layers.
        clean: to learn the mask on and to choose the threshold with.
        run: measures accuracy and takes notes.
        learn: of model, clean examples and run to the mask of each BatchNorm in module order, (channels,) in [0, 1];
            leaves the model as it was.

    Raises:
        UnbackdoorError: no BatchNorm, or a mask that is not finite.
    """
    layers, name = list(norms(model, method).values()), type(method).__name__
    seen, held = (clean, clean) if method.threshold is not None else run.hold_out(clean)
    masks = learn(model, seen, run)

    def prune_(threshold: float) -> None:
        for layer, mask in zip(layers, masks, strict=True):
            silence_(layer, mask <= threshold, bias=False)

    if not all(mask.isfinite().all() for mask in masks):
        raise UnbackdoorError(f"{name} learned a mask with non-finite values. Lower its rates.")
    lowest = min(float(mask.min()) for mask in masks)
    if method.threshold is None:
        thresholds = [step / 20 for step in range(20)]
        kept = as_far_as_accurate_(
            [layer.weight for layer in layers],
            [partial(prune_, threshold) for threshold in thresholds],
            still_accurate(model, held, run, method.tolerance),
        )
        threshold = thresholds[kept - 1] if kept else -1.0
        way_out = f"clean accuracy on {len(held)} held-out examples allows none to go. Raise its tolerance."
        if lowest > thresholds[-1]:
            way_out = f"no mask fell to {thresholds[-1]:g} or below. Learn it for longer, or at a higher rate."
    else:
        threshold = method.threshold
        prune_(threshold)
        way_out = "none has so low a mask. Raise its threshold."
    total = sum(map(len, masks))
    pruned = sum(int((mask <= threshold).sum()) for mask in masks)
    if pruned:
        run.note(f"{name} pruned {pruned} of {total} channels, those with a mask of at most {threshold:g}.")
    else:
        run.warn(f"{name} pruned nothing of {total} channels: {way_out}")
