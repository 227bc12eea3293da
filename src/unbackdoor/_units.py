"""Units that can be pruned: channels behind a BatchNorm, and neurons that a linear layer reads.

No list of architectures is needed: layers are found by their kind, by module order, or by running a batch.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from unbackdoor._data import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models import Inputs, evaluating, logits, removing, watching
from unbackdoor._precision import Arithmetic
from unbackdoor._purify import Run
from unbackdoor._text import Tokens


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


def channels(model: nn.Module, method: object) -> list[Channels]:
    """Convolutions followed by a BatchNorm in module order: data-free, so that no forward pass tells.

    A BatchNorm belongs to the last convolution before it that has as many output channels.

    Raises:
        UnbackdoorError: there is none; names the method.
    """
    pairs, last = [], None
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            last = layer
        elif isinstance(layer, _BatchNorm) and layer.affine and layer.track_running_stats and last is not None:
            if last.out_channels == layer.num_features:
                pairs.append(Channels(name, last, layer))
            last = None
    if not pairs:
        raise _absent("convolutions followed by BatchNorm with weights and statistics", model, method)
    return pairs


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
