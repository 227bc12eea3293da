"""The pre-trained base of a suspect: which of its tensors belongs to which of the suspect's."""

from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._mixing.ancestry import doubts
from unbackdoor._models.matching import matched, task_head
from unbackdoor._purification.run import Run

Weights = dict[str, Tensor]


def heads(suspect: Weights, run: Run) -> set[str]:
    """The names of the tensors that make the task head, which no pre-trained model has."""
    return task_head(suspect) | {name for name in suspect if name.startswith(f"{run.head_name or None}.")}


def counterparts(suspect: Weights, run: Run, method: object) -> Weights:
    """The pre-trained weights by the suspect's names, without the task head's.

    Says what matched, and warns where the base is no ancestor or of another depth.

    Args:
        suspect: its weights by name.
        run: has the base.
        method: named where there is none.

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
    base = {name: theirs[other].to(suspect[name].device) for name, other in matching.pairs.items()}
    pairs = ((name, suspect[name].cpu(), weight.cpu()) for name, weight in base.items())
    for doubt in doubts(pairs, matching, ours, shapes):
        run.warn(doubt)
    return base


def pretrained(base: nn.Module) -> Weights:
    """The weights of a base by name, without those that its files lack (see `_hugging_face.body`)."""
    absent: frozenset[str] = getattr(base, "absent_weights", frozenset())
    return {name: tensor for name, tensor in base.state_dict().items() if name not in absent}
