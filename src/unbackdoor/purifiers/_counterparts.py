"""The weights of a pre-trained base, by the names of the suspect's tensors."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError, few
from unbackdoor._mixing.ancestry import doubts, split_output
from unbackdoor._models.calling import embeddings
from unbackdoor._models.matching import Matching, Shape, matched, task_head
from unbackdoor._purification.run import Run

Weights = dict[str, Tensor]


def distinct(model: nn.Module) -> Weights:
    """Returns the tensors of a model by name, in its memory.

    A head that is the matrix of the embeddings as well, as in many language models, is not named a second time.
    """
    twice = _output(model) if _tied(model) else None
    return {name: tensor for name, tensor in model.state_dict().items() if name != twice}


def _tied(model: nn.Module) -> bool:
    """Whether the output matrix of a model is that of its embeddings."""
    head = _output_layer(model)
    return head is not None and head.weight is embeddings(model).weight


def _output_layer(model: nn.Module) -> Any:
    get: Any = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def _output(model: nn.Module) -> str | None:
    """The name of the output matrix of a model, if it has one."""
    head = _output_layer(model)
    return next((f"{name}.weight" for name, layer in model.named_modules() if layer is head), None)


def heads(suspect: Weights, run: Run) -> set[str]:
    """Returns the names of the tensors of the task head, which no pre-trained model has."""
    if not run.task.own_head:
        return set()
    return task_head(suspect) | {name for name in suspect if name.startswith(f"{run.head_name or None}.")}


def counterparts(suspect: Weights, run: Run, method: object) -> Weights:
    """Returns the pre-trained weights by the suspect's names, without those of the task head; see `names_in_base`."""
    names, theirs = names_in_base(suspect, run, method), pretrained(run.needed("base", method))
    return {name: theirs[other].to(suspect[name].device) for name, other in names.items()}


def names_in_base(suspect: Weights, run: Run, method: object) -> dict[str, str]:
    """Returns the base's names of tensors by the suspect's, without those of the task head.

    Notes which tensors match, and warns if the base is not an ancestor or has another depth.

    Args:
        suspect: the suspect's weights by name.
        run: holds the base.
        method: named in the error if there is no base.

    Raises:
        UnbackdoorError: there is no base, it does not fit, or nothing but a head would be left.
    """
    base = run.needed("base", method)
    theirs = pretrained(base)
    ours, shapes = ({name: tensor.shape for name, tensor in each.items()} for each in (suspect, theirs))
    matching = _with_output(matched(ours, shapes), base, ours).without(heads(suspect, run))
    if not matching.pairs:
        raise UnbackdoorError(
            f"{type(method).__name__} needs a model with more than a head: nothing else has a counterpart in the base. "
            "Try fst."
        )
    run.note(matching.report())
    pairs = ((name, suspect[name].cpu(), theirs[other].cpu()) for name, other in matching.pairs.items())
    for doubt in doubts(pairs, matching, ours, shapes):
        run.warn(doubt)
    output = _output(base)
    if output in matching.base_only and not torch.equal(theirs[output], embeddings(base).weight):
        run.warn(split_output(output))
    return matching.pairs


def of_proxy(suspect: Weights, names: Collection[str], run: Run, method: object) -> Weights:
    """Returns the weights of the proxy by the suspect's names.

    Args:
        suspect: the suspect's weights by name.
        names: the suspect's names of those that are needed.
        run: holds the proxy.
        method: named in the error if there is no proxy.

    Raises:
        UnbackdoorError: there is no proxy, or it lacks one of them.
    """
    proxy = run.needed("proxy", method)
    theirs = pretrained(proxy)
    ours, shapes = ({name: tensor.shape for name, tensor in each.items()} for each in (suspect, theirs))
    try:
        pairs = _with_output(matched(ours, shapes), proxy, ours).pairs
    except UnbackdoorError:
        raise UnbackdoorError(
            f"`proxy` is a {type(proxy).__name__} with other tensors than the suspect. Take a model that was tuned "
            "from the same base."
        ) from None
    lacking = [name for name in names if name not in pairs]
    if lacking:
        raise UnbackdoorError(
            f"`proxy` lacks {few(lacking)}, which suspect and base have. Take a model that was tuned from the same "
            "base."
        )
    return {name: theirs[pairs[name]] for name in names}


def _with_output(matching: Matching, base: nn.Module, suspect: Mapping[str, Shape]) -> Matching:
    """The same matching; if the base's output matrix is its embeddings, with the suspect's own output matrix."""
    output = _output(base)
    if output is None or not _tied(base):
        return matching
    words = embeddings(base).weight
    name = next(name for name, tensor in base.state_dict().items() if tensor.data_ptr() == words.data_ptr())
    return matching.with_output(output, name, suspect)


def pretrained(base: nn.Module) -> Weights:
    """Returns the weights of a base by name, without those that its files lack (see `_models.classifiers.body`)."""
    absent: frozenset[str] = getattr(base, "absent_weights", frozenset())
    return {name: tensor for name, tensor in distinct(base).items() if name not in absent}
