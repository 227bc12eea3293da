"""Models: ask them for logits, and find their head by running them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError, printable


class Head(NamedTuple):
    """The last linear layer of a classifier and its name in the model."""

    name: str
    layer: nn.Linear


Inputs = Tensor | Tokens


_answers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # of models that return several arrays


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Class scores (batch, classes), whatever the model wraps them in.

    Of several arrays of shape (batch, n), as `(features, logits)`, it is the one that a linear layer makes and that
    the others lead to; see `_answer`.

    Raises:
        UnbackdoorError: there are none, or several could be the scores.
    """
    output = _run(model, inputs)
    scores = output
    if not isinstance(output, Tensor):
        scores = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if scores is None and isinstance(output, tuple | list):
        found = _candidates(output, len(inputs))
        if len(found) > 1:
            if model not in _answers:
                _answers[model] = _answer(model, inputs)
                output = _run(model, inputs)  # for whoever watches the layers
            scores = output[_answers[model]]
        else:
            scores = output[found[0]] if found else next(iter(output), None)
    what = type(output).__name__
    if isinstance(scores, Tensor):
        what = f"shape {tuple(scores.shape)}" + (f" for {len(inputs)} inputs" if scores.ndim == 2 else "")
        if scores.ndim == 2 and len(scores) == len(inputs):
            if scores.layout != torch.strided or scores.device.type == "meta":
                what = "a tensor that is sparse, or without numbers"
            elif scores.is_floating_point():
                return scores
            else:
                what = f"{str(scores.dtype).removeprefix('torch.')}, no floating-point numbers"
    raise UnbackdoorError(
        f"{type(model).__name__} must return class scores of shape (batch, classes), got {what}. Wrap it in a "
        "module that does."
    )


def _run(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, Tokens) else model(inputs)


def _candidates(output: Sequence[Any], count: int) -> list[int]:
    """Which parts of an output could be class scores: arrays of real numbers, (batch, n)."""
    return [
        place
        for place, part in enumerate(output)
        if isinstance(part, Tensor) and part.ndim == 2 and len(part) == count and part.is_floating_point()
    ]


def _answer(model: nn.Module, inputs: Inputs) -> int:
    """Which of the arrays that a model returns is the class scores, found by running it.

    Arrays that one of another width is computed from are features. Of the rest, scores are what a linear layer gives
    (or its log-softmax); of several such, the one that is computed from all others.

    Raises:
        UnbackdoorError: that leaves none, or several.
    """
    made: list[Tensor] = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output: made.append(output))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with removing(hooks), evaluating(model), torch.enable_grad():
            parts: Sequence[Any] = _run(model, inputs)
            found = _candidates(parts, len(inputs))
            leads = {
                (place, other)
                for place in found
                for other in found
                if place != other and parts[other].requires_grad and parts[place].requires_grad
                if torch.autograd.grad(parts[other].sum(), parts[place], retain_graph=True, allow_unused=True)[0]
                is not None
            }
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    left = [
        place
        for place in found
        if not any((place, other) in leads and parts[other].shape != parts[place].shape for other in found)
    ]
    scores = [
        place
        for place in left
        if any(
            output.shape == parts[place].shape
            and any(
                torch.allclose(each, parts[place], rtol=1e-4, atol=1e-5) for each in (output, output.log_softmax(1))
            )
            for output in made
            if isinstance(output, Tensor) and output.ndim == 2
        )
    ]
    left = scores or left
    last = [place for place in left if not any((place, other) in leads for other in left)]
    if len(last) != 1:
        shapes = " and ".join(f"(batch, {parts[place].shape[1]})" for place in found)
        raise UnbackdoorError(
            f"{type(model).__name__} returns {len(found)} arrays, of shapes {shapes}, and which of them is the class "
            "scores is not told. Wrap it in a module that returns the class scores alone."
        )
    return last[0]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def perturbed_logits(model: nn.Module, inputs: Inputs, perturbation: Tensor) -> Tensor:
    """Class scores under a perturbation, which a gradient flows through.

    Args:
        model: any classifier; a text model must be one of transformers.
        inputs: a batch.
        perturbation: added to pixels as the model sees them, (batch, channels, height, width); or to the output of the
            model's embedding layer, (batch, length, width). A batch of 1 perturbs all examples alike.

    Raises:
        UnbackdoorError: a text model that does not tell its embedding layer.
    """
    if not isinstance(inputs, Tokens):
        return logits(model, inputs + perturbation)

    def perturbed(_layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        # XLNet has the places of a text before the texts of a batch.
        turned = bool(given) and not torch.equal(given[0], inputs["input_ids"])
        turned = turned and torch.equal(given[0], inputs["input_ids"].t())
        return output + (perturbation.transpose(0, 1) if turned else perturbation)

    # An encoder and its decoder may look words up by layers of their own that share one weight.
    weight = embeddings(model).weight
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Embedding) and layer.weight is weight]
    with removing([layer.register_forward_hook(perturbed) for layer in layers]):
        return logits(model, inputs)


def perturbation_shape(model: nn.Module, inputs: Inputs) -> tuple[int, ...]:
    """The shape of a perturbation of each example of a batch: that of pixels, or (batch, length, width) of embeddings.

    Raises:
        UnbackdoorError: a text model that does not tell its embedding layer.
    """
    return (*inputs.shape, embeddings(model).embedding_dim) if isinstance(inputs, Tokens) else tuple(inputs.shape)


def perturbation_unit(model: nn.Module, data: Dataset) -> Tensor:
    """What a perturbation of 1 is, in the numbers that the model sees; multiply by it.

    Of images the whole range of a pixel, black to white, (1 or channels, 1, 1). Of texts the root mean square of all
    entries of the word embeddings, (): a word is about as long as a perturbation with 1 in each entry.

    Raises:
        UnbackdoorError: a text model that does not tell its embedding layer.
    """
    if data.modality == "text":
        return embeddings(model).weight.detach().square().mean().sqrt()
    assert isinstance(data.encode, ImageEncoder)
    like = next(model.parameters())
    std = torch.tensor(data.encode.std, device=like.device, dtype=like.dtype)
    return (255 * data.encode.scale / std).view(-1, 1, 1)


def embeddings(model: nn.Module) -> nn.Embedding:
    """The layer of a text model that token ids look their rows up in.

    Raises:
        UnbackdoorError: there is none.
    """
    ask: Any = getattr(model, "get_input_embeddings", None)
    try:
        found = None if ask is None else ask()
    except NotImplementedError:  # models that read characters or pixels
        found = None
    if not isinstance(found, nn.Embedding):
        raise UnbackdoorError(
            f"{type(model).__name__} does not tell its word embeddings (get_input_embeddings). Take a model of "
            "transformers."
        )
    return found


def probe(model: nn.Module, data: Dataset) -> Inputs:
    """A few encoded examples, on the device and in the type of the model."""
    parameter = next(model.parameters(), torch.empty(0))
    return data.encode(data.items[:8]).to(parameter.device, parameter.dtype)  # type: ignore[arg-type]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each part of the model back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def weights_kept(weights: Iterable[Tensor]) -> Iterator[None]:
    """Whatever happens to the weights while the block runs is taken back, in place."""
    before = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in before:
                weight.copy_(kept)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises as it does in its mode, but learns no running statistics."""
    learning = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    for module in learning:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in learning:
            module.track_running_stats = True


@torch.no_grad()
def _probed(model: nn.Module, inputs: Inputs) -> Tensor:
    """Class scores of a first batch, which is where model and data turn out not to fit."""
    owner = type(model).__name__
    try:
        with evaluating(model):
            scores = logits(model, inputs)
    except (UnbackdoorError, KeyboardInterrupt):
        raise
    except BaseException as problem:  # a module may be anybody's, and do anything: sys.exit, say
        reason = printable(" ".join(str(problem)[:1000].split()), 200) or type(problem).__name__
        way_out = (
            "Take the tokenizer that it was trained with, or lower --max-length."
            if isinstance(inputs, Tokens)
            else "Take data of the size and the channels that it was trained on, or give --image-size."
        )
        raise UnbackdoorError(
            f"{owner} cannot take inputs of shape {tuple(inputs.shape)} ({reason}). {way_out}"
        ) from None
    if scores.shape[1] < 2:
        raise UnbackdoorError(
            f"{owner} has one output; a classifier with at least 2 classes is expected (regression is not supported)."
        )
    if not torch.isfinite(scores).all():
        raise UnbackdoorError(
            f"{owner} answers with values that are not finite, although its weights are. Check the buffers (a negative "
            "running_var, say) and the preprocessing."
        )
    return scores


def class_count(model: nn.Module, data: Dataset) -> int:
    """How many classes the model answers with.

    Raises:
        UnbackdoorError: model and data do not fit, or it has one output.
    """
    return _probed(model, probe(model, data)).shape[1]


def check_modules(owner: str, **given: object) -> None:
    """Refuse a path, or what `load` returns, where a module is taken; None stands for one that was not given.

    Raises:
        UnbackdoorError: says how a module comes of a path.
    """
    for field, model in given.items():
        if model is not None and not isinstance(model, nn.Module):
            loaded = (
                "transformers.AutoModel.from_pretrained(PATH)" if field == "base" else "unbackdoor.load(PATH).model"
            )
            raise UnbackdoorError(
                f"{owner} takes {field} as a module, got {type(model).__name__}. Load it with {loaded}."
            )


def check_partner(option: str, other: nn.Module, data: Dataset, classes: int) -> None:
    """Refuse a second model that takes other inputs, or answers with other classes, than the first.

    Args:
        option: that named it.
        other: a control or a surrogate.
        data: encoded as it takes it.
        classes: of the first model.

    Raises:
        UnbackdoorError: it does not fit.
    """
    try:
        others = class_count(other, data)
    except UnbackdoorError as problem:
        raise UnbackdoorError(f"{option}: {problem}") from None
    if others != classes:
        raise UnbackdoorError(f"{option} must answer with {classes} classes as the model does, got {others}.")


@torch.no_grad()
def head(model: nn.Module, inputs: Inputs, name: str | None = None) -> Head:
    """The linear layer that makes the logits, found by running a batch and comparing each layer's output with them.

    Args:
        model: any classifier.
        inputs: a batch of model inputs.
        name: take this layer instead.

    Raises:
        UnbackdoorError: no linear layer makes the logits, the model answers with probabilities or has one output, or
            the inputs do not fit it.
    """
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output, key=key: outputs.__setitem__(key, output))
        for key, layer in layers.items()
    ]
    with removing(hooks):
        scores = _probed(model, inputs)
    owner = type(model).__name__
    if name is not None:
        if name not in layers:
            some = ", ".join(list(layers)[-5:]) or "none"
            raise UnbackdoorError(f"--head must name a linear layer of {owner}, got {name}; its last ones are {some}.")
        if layers[name].out_features != scores.shape[1]:
            raise UnbackdoorError(
                f"--head {name} has {layers[name].out_features} outputs, but {owner} answers with {scores.shape[1]} "
                "classes. Name the layer that makes the logits."
            )
        return Head(name, layers[name])
    tensors = {key: output for key, output in outputs.items() if isinstance(output, Tensor)}  # a router gives a tuple
    same = {key: found for key, output in tensors.items() if (found := _at_answer(output, scores)) is not None}
    for key in reversed(list(same)):
        if torch.allclose(same[key], scores, rtol=1e-4, atol=1e-6):
            return Head(key, layers[key])
    for key in reversed(list(same)):
        if torch.allclose(same[key].log_softmax(1), scores, rtol=1e-4, atol=1e-5):
            return Head(key, layers[key])
        for squashed in (same[key].softmax(1), same[key].sigmoid()):
            if torch.allclose(squashed, scores, rtol=1e-4, atol=1e-5):
                raise UnbackdoorError(
                    f"{owner} answers with probabilities; class scores (logits) are expected. Wrap it without its last "
                    "activation."
                )
    raise UnbackdoorError(
        f"{owner} has no final linear layer that makes its {scores.shape[1]} logits. Name one with --head "
        "(head= in Python), or end the model in an nn.Linear."
    )


def _at_answer(output: Tensor, scores: Tensor) -> Tensor | None:
    """A layer's output where it could be the logits: (batch, classes), of (batch, length, classes) the best token's."""
    if output.shape == scores.shape:
        return output
    if output.ndim != 3 or output.shape[0] != len(scores) or output.shape[2] != scores.shape[1]:
        return None
    nearest = (output - scores[:, None]).abs().amax(dim=2).argmin(dim=1)  # decoders answer at their last token
    return output[torch.arange(len(scores)), nearest]


@torch.no_grad()
def features(model: nn.Module, inputs: Inputs, found: Head) -> Tensor:
    """What the head sees, (batch, in_features); of a decoder (batch, length, in_features)."""
    with watching(found.layer) as seen:
        logits(model, inputs)
    return seen[0]


@contextmanager
def removing(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Take hooks off when the block ends, however it ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watching(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer is given in the latest forward pass, the one entry of a list; a gradient flows through it."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen[:] = given[:1]

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The class names of a Hugging Face config; None where it has none, or only LABEL_0, LABEL_1 and so on.

    None also where the names do not count from 0: then nothing tells which class has none.
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, dict) or all(str(name) == f"LABEL_{index}" for index, name in names.items()):
        return None
    order = sorted(names, key=int)
    return (
        tuple(str(names[index]) for index in order)
        if [int(index) for index in order] == list(range(len(order)))
        else None
    )
