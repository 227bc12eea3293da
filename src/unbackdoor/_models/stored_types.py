"""The types of the weights in the file that a module of a factory came from, for the file that is written of it.

A file in half precision is computed with in the module's own type, and comes out in half precision again. What the two
types are is noted in an attribute of the module, which its copies have as well.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unbackdoor._models.arithmetic import HALF

_KEPT = "_unbackdoor_stored_types"


def keep_stored_types_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Note which tensors of a module came in half precision and are kept in a wider type.

    Args:
        model: a module.
        weights: the tensors of its file, by the module's names; of those that share their memory, one is enough.
    """
    own = model.state_dict()
    halved = {
        own[name].data_ptr(): tensor.dtype
        for name, tensor in weights.items()
        if name in own and tensor.dtype in HALF and own[name].dtype in (torch.float32, torch.float64)
    }
    types = {name: halved[tensor.data_ptr()] for name, tensor in own.items() if tensor.data_ptr() in halved}
    note_stored_types_(model, types)


def note_stored_types_(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Note the types of the tensors that are narrower in a file, by name."""
    if types:
        setattr(model, _KEPT, dict(types))


def stored_types(model: nn.Module) -> dict[str, torch.dtype]:
    """Returns the types of the tensors that are narrower in the file than in the module, by name."""
    types: dict[str, torch.dtype] = getattr(model, _KEPT, {})
    return types
