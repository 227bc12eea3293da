"""The first blocks of a transformer as a model of their own."""

import copy

import torch
from torch import nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import Inputs, evaluating, logits
from unbackdoor._models.hooks import removing


def first_blocks(model: nn.Module, count: int, inputs: Inputs, owner: str) -> nn.Module:
    """Returns a copy of a model that ends after its first blocks; the layers behind the last block stay.

    Args:
        model: a transformer; it is not changed. One with an encoder and a decoder keeps the first blocks of each; one
            that runs the same block again and again, as ALBERT does, runs it as often.
        count: number of blocks, at least 1.
        inputs: a few examples, to try the result.
        owner: name of the class that asks, for messages.

    Raises:
        UnbackdoorError: the model has no list of blocks, or too few, or does not run without the others.
    """
    short = copy.deepcopy(model)
    lists = _stacks(short)
    longest = max(lists, key=len, default=[])
    shared = len(longest) == 1
    blocks = (_passes(short, longest[0], inputs) or 0) if shared else len(longest)
    if blocks < 2:
        raise UnbackdoorError(
            f"{owner} needs a model with a list of blocks, which {type(model).__name__} does not have. Take a BERT, "
            "for example."
        )
    if count >= blocks:
        raise UnbackdoorError(f"{owner}.blocks must be less than the {blocks} blocks of the model, got {count}.")
    for names in lists:
        for name in reversed(names[count:]):
            part, _, place = name.rpartition(".")
            del short.get_submodule(part)[int(place)]  # type: ignore[operator]
    if shared:
        short.config.num_hidden_layers = count  # type: ignore[union-attr]
    passes = _passes(short, longest[0], inputs)
    if passes is None or (shared and passes != count):
        raise UnbackdoorError(
            f"{owner} cannot run the first blocks of {type(model).__name__} without the others. Take a BERT, for "
            "example."
        )
    return short


def _stacks(model: nn.Module) -> list[list[str]]:
    """The names of the blocks of each outermost list of a model: blocks of one type that have layers."""
    found: dict[str, list[str]] = {}
    for name, part in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if inner or not isinstance(part, nn.ModuleList):
            continue
        members = {f"{name}.{place}": member for place, member in part.named_children()}
        if all(isinstance(member, nn.ModuleList) for member in members.values()):  # the stages of Funnel
            members = {
                f"{outer}.{place}": each for outer, member in members.items() for place, each in member.named_children()
            }
        if len({type(each) for each in members.values()}) == 1 and all(
            any(True for _ in each.children()) for each in members.values()
        ):
            found[name] = list(members)
    return list(found.values())


@torch.no_grad()
def _passes(model: nn.Module, block: str, inputs: Inputs) -> int | None:
    """How often a block is called in a forward pass; None if that fails."""
    calls: list[None] = []
    hook = model.get_submodule(block).register_forward_hook(lambda *_: calls.append(None))
    with removing([hook]), evaluating(model):
        try:
            logits(model, inputs)
        except (IndexError, KeyError, RuntimeError, ValueError, TypeError, AttributeError):
            return None
    return len(calls)
