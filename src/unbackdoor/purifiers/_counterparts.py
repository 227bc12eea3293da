"""The weights of a pre-trained base, by the names of the suspect's tensors."""

from typing import Any

from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._mixing.ancestry import doubts
from unbackdoor._models.calling import embeddings
from unbackdoor._models.matching import matched, task_head
from unbackdoor._purification.run import Run

Weights = dict[str, Tensor]


def distinct(model: nn.Module) -> Weights:
    """Returns the tensors of a model by name, in its memory.

    A head that is the matrix of the embeddings as well, as in many language models, is not named a second time.
    """
    get: Any = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    tied = head is not None and head.weight is embeddings(model).weight
    twice = {f"{name}.weight" for name, layer in model.named_modules() if tied and layer is head}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in twice}


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
    theirs = pretrained(run.needed("base", method))
    ours, shapes = ({name: tensor.shape for name, tensor in each.items()} for each in (suspect, theirs))
    matching = matched(ours, shapes).without(heads(suspect, run))
    if not matching.pairs:
        raise UnbackdoorError(
            f"{type(method).__name__} needs a model with more than a head: nothing else has a counterpart in the base. "
            "Try fst."
        )
    run.note(matching.report())
    pairs = ((name, suspect[name].cpu(), theirs[other].cpu()) for name, other in matching.pairs.items())
    for doubt in doubts(pairs, matching, ours, shapes):
        run.warn(doubt)
    return matching.pairs


def pretrained(base: nn.Module) -> Weights:
    """Returns the weights of a base by name, without those that its files lack (see `_models.classifiers.body`)."""
    absent: frozenset[str] = getattr(base, "absent_weights", frozenset())
    return {name: tensor for name, tensor in distinct(base).items() if name not in absent}
