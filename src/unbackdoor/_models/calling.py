"""Calling a model: its class scores, the number and names of its classes, its device."""

import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbackdoor._data.conversation_encoder import AnswerTokens
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.pair_encoder import PairTokens
from unbackdoor._data.texts import TextEncoder, Tokens
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.hooks import removing
from unbackdoor._models.offloading import scored_on
from unbackdoor._models.pair_scores import pair_scores

logger = logging.getLogger("unbackdoor")

Inputs = Tensor | Tokens

_SCORES = 2**28  # entries of the scores of a batch of prompts, (batch, length, vocabulary): 1 GiB in float32


# The positions of the class scores for models that return several arrays, in training mode and in eval mode.
_answers: WeakKeyDictionary[nn.Module, dict[bool, tuple[int, ...]]] = WeakKeyDictionary()


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Returns class scores (batch, classes) from any kind of output.

    For `AnswerTokens`, these are the scores of each next token, (batch, length, vocabulary); for `PairTokens`, those of
    each image and each caption, (images, captions).

    If the output has several arrays of shape (batch, n), such as `(features, logits)`, or a dictionary of them without
    `logits`, the scores are the one that a linear layer computes from the others, see `_answer`; in training mode, the
    one that is the answer in eval mode, or all whose mean is.

    Raises:
        UnbackdoorError: there are no scores, or several arrays could be the scores.
        RuntimeError: the inputs require gradients, and the scores do not; `needing_gradients` explains it.
    """
    if isinstance(inputs, PairTokens):
        return pair_scores(model, inputs)
    output = _forward(model, inputs)
    scores = output
    if not isinstance(output, Tensor):
        scores = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    what = type(output).__name__
    output = _arrays(output)
    if scores is None and isinstance(output, tuple | list):
        candidates = _candidates(output, len(inputs))
        if len(candidates) > 1:
            known = _answers.setdefault(model, {})
            if model.training not in known:
                known[model.training] = (_answers_in_training if model.training else _answer)(model, inputs)
                output = _arrays(_forward(model, inputs))  # hooks of callers must see this pass last
            scores = _mean([output[place] for place in known[model.training]])
        else:
            scores = output[candidates[0]] if candidates else next(iter(output), None)
    of_tokens = isinstance(inputs, AnswerTokens)
    rank = 3 if of_tokens else 2
    if isinstance(scores, Tensor):
        what = f"shape {tuple(scores.shape)}" + (f" for {len(inputs)} inputs" if scores.ndim == rank else "")
        if scores.ndim == rank and len(scores) == len(inputs):
            if scores.layout != torch.strided or scores.device.type == "meta":
                what = "a tensor that is sparse, or without numbers"
            elif scores.is_floating_point():
                if isinstance(inputs, Tensor) and inputs.requires_grad and torch.is_grad_enabled():
                    check_gradients(scores)  # a search over inputs that gets none would find nothing, in silence
                return scores
            else:
                what = f"{str(scores.dtype).removeprefix('torch.')}, not floating-point numbers"
    wanted = (
        "token scores of shape (batch, length, vocabulary)" if of_tokens else "class scores of shape (batch, classes)"
    )
    way_out = _shared_hook(model) or "Wrap it in a module that does."
    raise UnbackdoorError(f"{type(model).__name__} must return {wanted}, got {what}. {way_out}")


def _shared_hook(model: nn.Module) -> str:
    """Returns what to do about a hook that a copy of a model may share with it; nothing if it has no hooks."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    own = ("unbackdoor.", "torch.nn.utils.")  # those of this program, and of normalised or pruned weights
    if all(str(getattr(hook, "__module__", "")).startswith(own) for hook in hooks):
        return ""
    return (
        "It has a hook, which a copy of it shares if it is a function made within another one: let it be a method of "
        "the module."
    )


def _forward(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, AnswerTokens):
        return model(**inputs, use_cache=False)
    # A copy: a module may change its inputs in place, which others read after it.
    return model(**inputs) if isinstance(inputs, Tokens) else model(inputs.clone())


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(dim=0)


def _arrays(output: Any) -> Any:
    """Returns the entries of a plain dictionary; those of transformers have names that mean more, and stay."""
    return list(output.values()) if type(output) in (dict, OrderedDict) else output


def _candidates(output: Sequence[Any], count: int) -> list[int]:
    """Returns the positions in an output of arrays that could be class scores: real numbers, (batch, n)."""
    return [
        place
        for place, part in enumerate(output)
        if isinstance(part, Tensor) and part.ndim == 2 and len(part) == count and part.is_floating_point()
    ]


def _answer(model: nn.Module, inputs: Inputs) -> tuple[int]:
    """Finds the position of the class scores among the arrays that a model returns in eval mode, by running it.

    An array is features if an array of another width is computed from it. Among the others, scores are the output of a
    linear layer (or its log-softmax); if there are several, the one that is computed from all others.

    Raises:
        UnbackdoorError: no array is left, or several.
    """
    linear_outputs: list[Any] = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output: linear_outputs.append(output))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with removing(hooks), evaluating(model), torch.enable_grad():
            parts: Sequence[Any] = _arrays(_forward(model, inputs))
            candidates = _candidates(parts, len(inputs))
            leads = {
                (place, other)
                for place in candidates
                for other in candidates
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
        for place in candidates
        if not any((place, other) in leads and parts[other].shape != parts[place].shape for other in candidates)
    ]
    scores = [
        place
        for place in left
        if any(
            output.shape == parts[place].shape
            and any(
                torch.allclose(each.to(parts[place].dtype), parts[place], rtol=1e-4, atol=1e-5)
                for each in (output, output.log_softmax(1))
            )
            for output in linear_outputs
            if isinstance(output, Tensor) and output.ndim == 2
        )
    ]
    left = scores or left
    last = [place for place in left if not any((place, other) in leads for other in left)]
    if len(last) != 1:
        shapes = " and ".join(f"(batch, {parts[place].shape[1]})" for place in candidates)
        raise UnbackdoorError(
            f"{type(model).__name__} returns {len(candidates)} arrays, of shapes {shapes}, and it is unclear which of "
            "them is the class scores. Wrap it in a module that returns the class scores alone."
        )
    return (last[0],)


@torch.no_grad()
def _answers_in_training(model: nn.Module, inputs: Inputs) -> tuple[int, ...]:
    """Finds the positions of the class scores among the arrays that a model returns in training mode, by running it.

    It may return others than in eval mode: an auxiliary classifier's as well, or those of two heads in place of their
    mean. Layers stay in eval mode, so that nothing is drawn, and only modules that hold others are in training mode.

    Raises:
        UnbackdoorError: neither one of the arrays, nor the mean of all, is the answer in eval mode.
    """
    with evaluating(model):
        answer = logits(model, inputs)
        for module in model.modules():
            module.training = any(True for _ in module.children()) and not _of_torch(module)
        parts: Sequence[Any] = _arrays(_forward(model, inputs))
    places = _candidates(parts, len(inputs)) if isinstance(parts, tuple | list) else []
    alike = tuple(place for place in places if parts[place].shape == answer.shape)
    gaps = {
        tried: float((_mean([parts[place] for place in tried]) - answer).abs().max())
        for tried in (*((place,) for place in alike), alike)
        if tried
    }
    rounding = max(1e-4, 4 * torch.finfo(answer.dtype).eps) * float(answer.abs().max())
    nearest = min(gaps, key=lambda tried: gaps[tried], default=())
    if nearest and gaps[nearest] <= rounding:
        return nearest
    eval_places = _answers.get(model, {}).get(False)
    if eval_places is not None and eval_places[0] in alike:  # something is drawn at random all the same
        return eval_places
    raise UnbackdoorError(
        f"{type(model).__name__} returns {len(places)} arrays in training mode, and neither one of them nor their mean "
        "is its answer in eval mode. Wrap it in a module that returns the class scores alone."
    )


def _of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, such as attention; containers do not count."""
    containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, containers)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's parameters; of one that lies in several places, that of its inputs."""
    if (fixed := scored_on(model)) is not None:
        return fixed
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def like_inputs(model: nn.Module) -> Tensor:
    """Returns a parameter whose device and type inputs need: the first of real numbers, as counts are parameters too.

    A model without one gets inputs in float32, on the CPU.
    """
    return next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))


def embeddings(model: nn.Module) -> nn.Embedding:
    """Returns the layer of a text model whose rows are the embeddings of the tokens.

    Raises:
        UnbackdoorError: there is no such layer.
    """
    model = unwrapped(model)
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        layer = None if get is None else get()
    except NotImplementedError:  # models that read characters or pixels
        layer = None
    if not isinstance(layer, nn.Embedding):
        what = "nothing" if layer is None else f"a layer of the class {type(layer).__name__}"
        raise UnbackdoorError(
            f"{type(model).__name__} must give its word embeddings (get_input_embeddings) as an nn.Embedding, got "
            f"{what}: models that read characters, such as CANINE, and I-BERT are not supported. Take one that has "
            "such a layer, as BERT and most models of transformers."
        )
    return layer


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module within wrappers that run it on several devices; any other as it is."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def scored_at_once(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> int:
    """Returns the examples in a batch without gradients; of prompts fewer, since each token has scores of its own."""
    if data.modality != "conversations":
        return arithmetic.evaluation_batch
    longest = int(data.conversations.tokens.lengths.max())
    return min(max(_SCORES // (longest * embeddings(model).num_embeddings), 1), 32)


def probe(model: nn.Module, data: Dataset) -> Inputs:
    """Returns a few encoded examples, on the device and in the type of the model; see also `TextEncoder.unpadded`."""
    like = like_inputs(model)
    if isinstance(data.encode, TextEncoder) and data.encode.unpadded:
        lengths = data.texts.lengths
        return data.inputs((lengths == lengths[0]).nonzero().flatten()[:8]).to(like.device, like.dtype)
    return data.inputs(slice(8)).to(like.device, like.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a block, and each of its parts back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def checked_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Returns class scores of a first batch; its errors explain why model and data do not fit each other.

    Raises:
        UnbackdoorError: the model cannot take the inputs, has one output, or answers with values that are not finite.
    """
    owner = type(model).__name__
    try:
        with evaluating(model):
            scores = logits(model, inputs)
    except (UnbackdoorError, KeyboardInterrupt):
        raise
    except BaseException as problem:  # a user's own module may do anything, such as call sys.exit
        raise _unfit(model, inputs, problem) from None
    if scores.shape[1] < 2:
        raise UnbackdoorError(
            f"{owner} has one output; a classifier with at least 2 classes is expected (regression is not supported). "
            "If it tells two classes apart by a logit x, wrap it in a module that returns torch.cat([0 * x, x], dim=1)."
        )
    if not torch.isfinite(scores).all():
        raise UnbackdoorError(
            f"{owner} answers with values that are not finite, although its weights are. Check the buffers (a negative "
            "running_var, say) and the preprocessing."
        )
    return scores


def _unfit(model: nn.Module, inputs: Inputs, problem: BaseException) -> UnbackdoorError:
    owner = type(model).__name__
    way_out = (
        "Take the tokenizer that it was trained with, or lower `max_length`."
        if isinstance(inputs, Tokens)
        else "Take data of the size and the channels that it was trained on, or give `image_size`."
    )
    if isinstance(problem, TypeError) and "required positional argument" in str(problem):
        way_out = "Wrap it in a module that takes these alone."
    if hook := _shared_hook(model):
        way_out = hook if isinstance(problem, LookupError) else f"{way_out} {hook}"
    return UnbackdoorError(f"{owner} cannot take inputs of shape {tuple(inputs.shape)} ({_reason(problem)}). {way_out}")


def _reason(problem: BaseException) -> str:
    return printable(" ".join(str(problem)[:1000].split()), 200) or type(problem).__name__


@contextmanager
def explained(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Explain in one sentence why a model fails on a batch after the first one that it took.

    It may read longer texts than it has positions for, fail in training mode, or not compute in bf16. That memory is
    short is left to others.

    Args:
        model: the model that is called in the block.
        inputs: its inputs.

    Raises:
        UnbackdoorError: the call failed.
    """
    try:
        yield
    except (UnbackdoorError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # the module comes from somebody else
        if "memory" in str(problem):
            raise
        owner, reason = type(model).__name__, _reason(problem)
        if "BFloat16" in reason:
            raise UnbackdoorError(f"{owner} cannot compute in bf16 ({reason}). Give `precision='fp32'`.") from problem
        if model.training:
            raise UnbackdoorError(
                f"{owner} answers, but fails in training mode ({reason}), so it cannot be tuned. Take inputs that it "
                "was trained on, or another model."
            ) from problem
        raise _unfit(model, inputs, problem) from problem


def check_gradients(scores: Tensor) -> None:
    """Stop where no gradient can flow through class scores; `needing_gradients` explains it.

    Raises:
        RuntimeError: the model computes without gradients.
    """
    if not scores.requires_grad:
        raise RuntimeError("the class scores do not require grad")


@contextmanager
def needing_gradients(model: nn.Module) -> Iterator[None]:
    """Explain in one sentence why no gradient reaches the weights or the inputs of a model.

    Raises:
        UnbackdoorError: the model computes without gradients, or recomputes its activations where that cannot be.
    """
    try:
        yield
    except RuntimeError as problem:
        if "torch.utils.checkpoint" in str(problem):
            raise UnbackdoorError(
                f"{type(model).__name__} recomputes its activations by torch.utils.checkpoint, which this computation "
                "does not allow. Switch that off in its module."
            ) from problem
        if not without_gradients(problem):
            raise
        raise UnbackdoorError(
            f"{type(model).__name__} answers without gradients, so it cannot be tuned or searched. Take torch.no_grad, "
            "torch.inference_mode and detach out of its forward."
        ) from problem


def without_gradients(problem: Exception) -> bool:
    """Whether an error says that a model computes without gradients."""
    return isinstance(problem, RuntimeError) and _GRADIENT_ERRORS.search(str(problem)) is not None


_GRADIENT_ERRORS = re.compile("do(es)? not require grad|not to have been used in the graph|[Ii]nference tensor")

_reported: WeakSet[nn.Module] = WeakSet()  # models of which a warning was given


@torch.no_grad()
def check_repeatable(model: nn.Module, inputs: Inputs, scores: Tensor) -> None:
    """Refuse a model that answers at random, and warn of one whose answers depend on the rest of a batch.

    Args:
        model: any classifier.
        inputs: a batch.
        scores: the class scores of that batch, in eval mode.

    Raises:
        UnbackdoorError: two calls give different scores.
    """
    half = max(len(inputs) // 2, 1)
    rows, part = torch.arange(half), inputs[:half] if isinstance(inputs, Tensor) else inputs
    if isinstance(inputs, Tokens):  # the shortest texts, without the padding that the longer ones asked for
        lengths = inputs["attention_mask"].sum(dim=1)
        rows = (lengths == lengths.min()).nonzero().flatten()[:half].cpu()
        shown = inputs["attention_mask"][rows].any(dim=0)
        part = Tokens({name: each[rows][:, shown] for name, each in inputs.items()})
    with evaluating(model):
        first, second = logits(model, part), logits(model, part)

    def differs(others: Tensor) -> bool:  # by more than half precision rounds
        return not torch.allclose(first, others, rtol=0.05, atol=0.05 * float(scores.std()))

    owner = type(model).__name__
    if differs(second):
        raise UnbackdoorError(
            f"{owner} answers the same inputs in another way each time; in eval mode, nothing may be drawn. Give "
            "F.dropout and the like training=self.training."
        )
    if differs(scores[rows]) and model not in _reported:
        _reported.add(model)
        logger.warning(
            "%s: its answer to an example depends on the other examples of the batch (a BatchNorm that keeps no "
            "statistics, or counts in eval mode, does that, and a model that reads padding), and so do its scores.",
            owner,
        )


def class_count(model: nn.Module, data: Dataset) -> int:
    """Returns the number of classes of the model.

    Raises:
        UnbackdoorError: model and data do not fit, or it has one output or answers at random.
    """
    inputs = probe(model, data)
    scores = checked_logits(model, inputs)
    check_repeatable(model, inputs, scores)
    return scores.shape[1]


def check_modules(owner: str, *, in_parts: bool = False, **models: object) -> None:
    """Refuse a path, or the result of `load`, in place of a module, and one whose weights are not in memory.

    Args:
        owner: the function that takes them, for messages.
        in_parts: take a language model that lies in several places, see `offloading`.
        models: models by the names of their parameters; None for one that was not given, but not for `model`.

    Raises:
        UnbackdoorError: says how to load a module.
    """
    for field, model in models.items():
        if not isinstance(model, nn.Module) and (model is not None or field == "model"):
            loaded = (
                "transformers.AutoModel.from_pretrained(PATH)" if field == "base" else "unbackdoor.load(PATH).model"
            )
            raise UnbackdoorError(
                f"{owner} takes {field} as a module, got {type(model).__name__}. Load it with {loaded}."
            )
        if isinstance(model, nn.Module) and not hasattr(model, "peft_config"):
            check_state(model, f"{owner} takes {field}")
        tensors = [] if not isinstance(model, nn.Module) else [*model.named_parameters(), *model.named_buffers()]
        empty = next((name for name, each in tensors if is_lazy(each)), None)
        if empty is not None:
            raise UnbackdoorError(
                f"{owner} takes {field} with all its weights, but {printable(empty)} of {type(model).__name__} has no "
                "size yet, as in a lazy layer. Call the module once on a batch, and load its weights, before."
            )
        if not isinstance(model, nn.Module) or (in_parts and scored_on(model) is not None):
            continue
        if any(each.is_meta for each in model.parameters()):
            raise UnbackdoorError(
                f"{owner} takes {field} with all its weights in memory, but some of {type(model).__name__} are not "
                "(on the device meta), as of a model that was loaded in parts. Load it without `device_map` and "
                "`offload`; what is larger than memory is scored by evaluate and mixed on disk by purify_stream."
            )


def check_state(model: nn.Module, owner: str) -> None:
    """Refuse a module that keeps more than tensors in its state dict, which no file of weights can hold.

    Args:
        model: any module.
        owner: the beginning of the sentence, such as `purify takes model`.

    Raises:
        UnbackdoorError: names the first such entry.
    """
    other = next((name for name, part in model.state_dict().items() if not isinstance(part, Tensor)), None)
    if other is not None:
        quantised = "_packed_params" in other
        way_out = "Take get_extra_state out of its modules."
        raise UnbackdoorError(
            f"{owner} with nothing but tensors in its state dict, got {printable(other)} in {type(model).__name__}. "
            f"{'Give the model as it was before it was quantised.' if quantised else way_out}"
        )


def check_partner(option: str, other: nn.Module, data: Dataset, encode: Encoder | None, classes: int) -> None:
    """Refuse a second model that cannot take the data, or that has another number of classes than the first.

    Args:
        option: the option that named it.
        other: a control or a surrogate.
        data: examples that both get.
        encode: makes its inputs, if they are not made as the first model's.
        classes: number of classes of the first model.

    Raises:
        UnbackdoorError: the second model does not fit.
    """
    try:
        others = class_count(other, data if encode is None else data.encoded_by(encode))
    except UnbackdoorError as problem:
        raise UnbackdoorError(f"{option}: {problem}") from None
    if others != classes:
        raise UnbackdoorError(f"{option} must answer with {classes} classes as the model does, got {others}.")


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """Returns the class names of a Hugging Face config; None if it has none, or only LABEL_0, LABEL_1, ...

    Also returns None if their numbers do not count from 0: then it is unknown which class has no name.
    """
    names = getattr(getattr(unwrapped(model), "config", None), "id2label", None)
    if not isinstance(names, dict) or all(str(name) == f"LABEL_{index}" for index, name in names.items()):
        return None
    order = sorted(names, key=int)
    return (
        tuple(str(names[index]) for index in order)
        if [int(index) for index in order] == list(range(len(order)))
        else None
    )
