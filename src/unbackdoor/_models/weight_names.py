"""Whether stored weights are those of a module, by their names and shapes."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from unbackdoor._errors import SENTENCE, UnbackdoorError, few, printable

logger = logging.getLogger("unbackdoor")


def lacking(own: Mapping[str, Tensor], names: Collection[str]) -> list[str]:
    """Which of a module's tensors are missing among some names, and are needed.

    BatchNorm counts its batches only to average, and older files have no such count; of tensors that share their
    memory (tied weights), one is enough.

    Args:
        own: the module's `state_dict`.
        names: that there are.
    """
    there = {_memory(tensor) for name, tensor in own.items() if name in names}
    return sorted(
        name
        for name, tensor in own.items()
        if name not in names and not name.endswith("num_batches_tracked") and _memory(tensor) not in there
    )


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are one and the same numbers."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.data_ptr() else (id(tensor),)


def fits(own: Mapping[str, Tensor], stored: dict[str, Tensor]) -> bool:
    """Whether stored weights have all that a module needs, under its own names or with one prefix more or less."""
    return not lacking(own, stored) or bool(_exchanged(own, stored))


def renamed(own: Mapping[str, Tensor], stored: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Stored weights by a module's own names, where one prefix makes the difference; as they are where none does.

    Wrappers put one before all names: `module.` DataParallel, `_orig_mod.` torch.compile, `model.` Lightning. It is
    taken off (or put on, where the module has it and the file does not) if all of the module's names come of it, and in
    one way only.

    Args:
        own: the module's `state_dict`.
        stored: tensors of a file, by name.
        where: they were, for messages.

    Raises:
        UnbackdoorError: the weights of several such modules are in the file.
    """
    if not lacking(own, stored):
        return stored
    made = _exchanged(own, stored)
    if len(made) > 1:
        parts = " and ".join(printable(f"{prefix}*") for _, prefix in list(made)[:2])
        raise UnbackdoorError(
            f"{where} holds the weights of {len(made)} such modules ({parts}); one is expected. Save one of them alone."
        )
    for (how, prefix), weights in made.items():
        told = f"{where}: its tensors are read {how} {prefix} before their names"
        others = sorted(name for name in stored if how == "without" and not name.startswith(prefix))
        if others:
            told += f"; {few(others)} without it {'is' if len(others) == 1 else 'are'} left out"
        logger.info("%s.", printable(told, SENTENCE))
        return weights
    return stored


def _exchanged(own: Mapping[str, Tensor], stored: dict[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The weights that a module needs, once a prefix is taken off or put on: all ways by which they come out."""
    sample, first = next(reversed(list(own)), ""), min(stored, default="")
    made = {}
    before = {name.removesuffix(sample) for name in stored if name.endswith(f".{sample}")}
    for prefix in sorted(before, key=lambda each: (len(each), each))[:16]:  # a file may have any number of names
        made["without", prefix] = {
            name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)
        }
    for prefix in sorted({name.removesuffix(first) for name in own if name.endswith(f".{first}")}):
        made["with", prefix] = {prefix + name: tensor for name, tensor in stored.items()}
    return {way: weights for way, weights in made.items() if not lacking(own, weights)}


def check_fit(path: str, owner: str, missing: list[str], extra: list[str], shapes: list[tuple[str, Any, Any]]) -> None:
    """Refuse weights that are not those of their architecture; names the first few."""
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensor(s) ({few(missing)})")
    if extra:
        problems.append(f"has {len(extra)} that it does not know ({few(extra)})")
    if shapes:
        odd = [f"{printable(name)} is {tuple(came)}, not {tuple(wanted)}" for name, came, wanted in shapes[:3]]
        problems.append(f"has {len(shapes)} of another shape ({'; '.join(odd)}{'; ...' * (len(shapes) > 3)})")
    if problems:
        raise UnbackdoorError(f"{path} does not fit {owner}: it {' and '.join(problems)}. Check the architecture.")
