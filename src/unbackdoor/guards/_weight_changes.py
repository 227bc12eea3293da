"""The directions in which a fine-tuning changed the matrices of a language model that write into its states."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.adapters import carries_adapter
from unbackdoor._models.decoder_blocks import decoder_blocks

# What the matrices that add to the states are called, the output of attention and that of the feed-forward layers.
_WRITING = {
    *("o_proj", "down_proj", "c_proj", "out_proj", "fc2", "fc_out", "dense", "dense_4h_to_h", "wo", "w2"),
}
_NOTHING = 1e-3  # of the largest singular value of a matrix: a smaller one is not a direction of the change
_MORE = 8  # vectors that the randomised decomposition computes besides those that are wanted


def changed_blocks(learnt: Mapping[str, Tensor]) -> list[int]:
    """Returns the numbers of the blocks that have directions, as `directions_of_change` names them."""
    return [int(name.removeprefix("directions.")) for name in learnt if name.startswith("directions.")]


def written_matrices(block: nn.Module) -> list[tuple[str, Any]]:
    """Returns the layers of a block that write into the states, by their names in the block, in module order."""
    return [
        (name, layer)
        for name, layer in block.named_modules()
        if name.rpartition(".")[2] in _WRITING and isinstance(getattr(layer, "weight", None), Tensor)
    ]


def directions_of_change(model: nn.Module, base: nn.Module | None, count: int, owner: object) -> dict[str, Tensor]:
    """Returns the largest left singular vectors of the changes, by block.

    Args:
        model: the suspect.
        base: the model that it was tuned from; not needed if the model is an adapter on its base.
        count: of vectors of each matrix.
        owner: the guard, for messages.

    Returns:
        `directions.B`, (directions, width), of unit length, and `matrix.B`, (directions,), the number of the matrix
        that each belongs to, for each block B that changed.

    Raises:
        UnbackdoorError: the base has other blocks or shapes, or nothing changed.
    """
    learnt: dict[str, Tensor] = {}
    for block, changes in enumerate(_changes(model, base, owner)):
        vectors = [_directions(change, count) for change in changes]
        if not sum(map(len, vectors)):
            continue
        learnt[f"directions.{block}"] = torch.cat(vectors)
        learnt[f"matrix.{block}"] = torch.cat([torch.full((len(each),), number) for number, each in enumerate(vectors)])
    if not learnt:
        raise UnbackdoorError(
            f"{type(owner).__name__} finds no change between {type(model).__name__} and `base`, so there is nothing to "
            "watch. Give the model that the suspect was tuned from."
        )
    return learnt


def _changes(model: nn.Module, base: nn.Module | None, owner: object) -> Iterator[list[Tensor]]:
    """Yields the changes of the matrices of each block, (width, inputs) each, float32, on the CPU."""
    blocks = decoder_blocks(model, owner, instead="cleangen")
    if not written_matrices(blocks[0]):
        raise UnbackdoorError(
            f"{type(owner).__name__} knows no matrix of {type(model).__name__} that writes into its states. Try "
            "cleangen."
        )
    if carries_adapter(model):
        for block in blocks:
            yield [_of_adapter(layer) for _, layer in written_matrices(block)]
        return
    assert base is not None
    others = decoder_blocks(base, owner, instead="cleangen")
    if len(others) != len(blocks):
        raise _misfit(owner, f"the suspect has {len(blocks)} blocks, the base {len(others)}")
    for number, (block, other) in enumerate(zip(blocks, others, strict=True)):
        layers = dict(written_matrices(other))
        changes = []
        for name, layer in written_matrices(block):
            before = getattr(layers.get(name), "weight", None)
            shape = None if before is None else tuple(before.shape)
            if shape != tuple(layer.weight.shape):
                of_base = "is missing in the base" if shape is None else f"{shape} in the base"
                raise _misfit(
                    owner, f"{name} of block {number} is {tuple(layer.weight.shape)} in the suspect and {of_base}"
                )
            change = layer.weight.detach().cpu().float() - layers[name].weight.detach().cpu().float()
            changes.append(_outputs_first(layer, change))
        yield changes


def _of_adapter(layer: Any) -> Tensor:
    """The matrix that an adapter adds to a layer; nothing for a layer without one."""
    if not hasattr(layer, "get_delta_weight"):
        return _outputs_first(layer, torch.zeros(layer.weight.shape))
    change: Tensor = layer.get_delta_weight("default").detach().cpu().float()
    return _outputs_first(layer.base_layer, change)


def _outputs_first(layer: nn.Module, change: Tensor) -> Tensor:
    """The change as (outputs, inputs); the linear layers of GPT-2 hold it the other way round."""
    return change if isinstance(layer, nn.Linear) else change.T


def _directions(change: Tensor, count: int) -> Tensor:
    """The largest left singular vectors of a matrix, (directions, outputs), without those that are next to nothing."""
    if change.numel() == 0 or not bool(change.any()):
        return torch.zeros(0, len(change))
    vectors, sizes, _ = torch.svd_lowrank(change, q=min(count + _MORE, *change.shape), niter=2)
    kept = sizes[:count] > _NOTHING * sizes[0]
    return vectors[:, :count][:, kept].T.contiguous()


def _misfit(owner: object, difference: str) -> UnbackdoorError:
    return UnbackdoorError(
        f"{type(owner).__name__} needs a `base` of the same shapes: {difference}. Give the model that the suspect was "
        "tuned from."
    )
