"""Whether stored weights are those of a module, by their names and shapes."""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from unbackdoor._errors import SENTENCE, UnbackdoorError, few, printable

logger = logging.getLogger("unbackdoor")

# Buffers that older versions of transformers wrote, and that a model computes itself.
BUFFERS = {
    *("position_ids", "token_type_ids", "masked_bias", "attn_mask", "relative_position_index", "relative_coords_table"),
    *("inv_freq", "num_batches_tracked"),
}


def lacking(own: Mapping[str, Tensor], names: Collection[str]) -> list[str]:
    """Returns the needed tensors of a module that are missing among some names.

    BatchNorm needs its count of batches only to average, and older files have no such count; of tensors that share
    their memory (tied weights), one is enough.

    Args:
        own: the module's `state_dict`.
        names: names of the stored tensors.
    """
    there = {_memory(tensor) for name, tensor in own.items() if name in names}
    return sorted(
        name
        for name, tensor in own.items()
        if name not in names and not name.endswith("num_batches_tracked") and _memory(tensor) not in there
    )


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Returns a key that is equal for tensors that share their numbers."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.data_ptr() else (id(tensor),)


_WRAPPED = re.compile(r"(?<=\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def fits(own: Mapping[str, Tensor], stored: dict[str, Tensor]) -> bool:
    """Whether stored weights are complete for a module, under its own names or those that wrappers make of them."""
    forms = (stored, _unwrapped(own, stored))
    return any(not lacking(own, form) or _exchanged(own, form) for form in forms)


def renamed(own: Mapping[str, Tensor], stored: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns stored weights by a module's own names if they differ only by wrappers, otherwise unchanged.

    Wrappers put a prefix before all names: DataParallel `module.`, torch.compile `_orig_mod.`, Lightning `model.`. It
    is removed (or added, if only the module has it) if exactly one such change gives all of the module's names. The
    first two, and those of FSDP and of checkpointed activations, are also removed inside of names
    (`features.module.0.weight`), as a part of a model may be wrapped.

    Args:
        own: the module's `state_dict`.
        stored: tensors of a file, by name.
        where: the name of the file, for messages.

    Raises:
        UnbackdoorError: the weights of several such modules are in the file.
    """
    if not lacking(own, stored):
        return stored
    exchanges = _different(_exchanged(own, stored))
    unwrapped = _unwrapped(own, stored)
    if not exchanges and unwrapped is not stored and fits(own, unwrapped):
        name = min(stored.keys() - unwrapped.keys())
        logger.info("%s: its tensors are read without the wrappers in their names, as in %s.", where, printable(name))
        return renamed(own, unwrapped, where)
    if len(exchanges) > 1:
        parts = " and ".join(printable(f"{prefix}*") for _, prefix in list(exchanges)[:2])
        raise UnbackdoorError(
            f"{where} holds the weights of {len(exchanges)} such modules ({parts}); one is expected. Save one of them "
            "alone."
        )
    for (how, prefix), weights in exchanges.items():
        note = f"{where}: its tensors are read {how} {prefix} before their names"
        others = sorted(name for name in stored if how == "without" and not name.startswith(prefix))
        if others:
            note += f"; {few(others)} without it {'is' if len(others) == 1 else 'are'} left out"
        logger.info("%s.", printable(note, SENTENCE))
        _warn_of_normalisation({name: stored[name] for name in others}, where)
        return weights
    return stored


def _warn_of_normalisation(left_out: Mapping[str, Tensor], where: str) -> None:
    """Warn if tensors that are left out are the mean and the deviation of pixels: then the inputs need both."""
    found: dict[str, str] = {}
    for name, tensor in left_out.items():
        last = re.split(r"[._]", name.casefold())[-1]
        kind = next((kind for kind, words in _NORMALISING.items() if last in words), None)
        if kind is not None and tensor.is_floating_point() and tensor.numel() in (1, 3):
            found[kind] = ",".join(f"{number:.4g}" for number in tensor.flatten().tolist())
    if len(found) == 2:
        logger.warning(
            "%s: it holds a normalisation of the inputs, which the module leaves out. Unless that normalises them "
            "itself, give `mean=%s` and `std=%s`.",
            where,
            found["mean"],
            found["std"],
        )


_NORMALISING = {"mean": ("mean", "mu"), "std": ("std", "sigma")}


def _unwrapped(own: Mapping[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns stored weights without the wrappers of parts in their names, unless the module itself has such names.

    A file in which two names become one is left as it is.
    """
    if any(map(_WRAPPED.search, own)) or not any(map(_WRAPPED.search, stored)):
        return stored
    names = {name: _WRAPPED.sub("", name) for name in stored}
    return {names[name]: part for name, part in stored.items()} if len(set(names.values())) == len(names) else stored


def _exchanged(own: Mapping[str, Tensor], stored: dict[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Returns the weights that a module needs, for each prefix whose removal or addition gives all of them."""
    sample, first = next(reversed(list(own)), ""), min(stored, default="")
    exchanges = {}
    before = {name.removesuffix(sample) for name in stored if name.endswith(f".{sample}")}
    for prefix in sorted(before, key=lambda each: (len(each), each))[:16]:  # a file may have any number of names
        exchanges["without", prefix] = {
            name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)
        }
    for prefix in sorted({name.removesuffix(first) for name in own if name.endswith(f".{first}")}):
        exchanges["with", prefix] = {prefix + name: tensor for name, tensor in stored.items()}
    return {way: weights for way, weights in exchanges.items() if not lacking(own, weights)}


def _different(
    exchanges: dict[tuple[str, str], dict[str, Tensor]],
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Returns the first of several exchanges if all give equal weights, as a model and its attacker hold them twice."""
    first, *others = exchanges.values() if exchanges else ({},)
    if all(
        each.keys() == first.keys() and all(torch.equal(tensor, first[name]) for name, tensor in each.items())
        for each in others
    ):
        return dict(list(exchanges.items())[:1])
    return exchanges


def check_fit(path: str, owner: str, missing: list[str], extra: list[str], shapes: list[tuple[str, Any, Any]]) -> None:
    """Refuse weights that are not those of their architecture.

    Args:
        path: path of the weights.
        owner: the name of the architecture.
        missing: names that the architecture needs and the weights lack.
        extra: names that the architecture does not have.
        shapes: names, stored shapes, shapes of the architecture.

    Raises:
        UnbackdoorError: names the first few of each.
    """
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensor(s) ({few(missing)})")
    if extra:
        problems.append(f"has {len(extra)} that it does not know ({few(extra)})")
    if shapes:
        first = [f"{printable(name)} is {tuple(stored)}, not {tuple(own)}" for name, stored, own in shapes[:3]]
        problems.append(f"has {len(shapes)} of another shape ({'; '.join(first)}{'; ...' * (len(shapes) > 3)})")
    if problems:
        way_out = "Check the architecture."
        if any(f"{name.removesuffix('_mask')}_orig" in extra for name in extra if name.endswith("_mask")):
            way_out = "Its layers are pruned by torch.nn.utils.prune: save it after prune.remove."
        raise UnbackdoorError(f"{path} does not fit {owner}: it {' and '.join(problems)}. {way_out}")
