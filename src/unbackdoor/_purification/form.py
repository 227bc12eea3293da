"""The form that a purified model shares with the suspect: keys, number types, modes, device."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.arithmetic import relayout_
from unbackdoor._models.calling import device_of
from unbackdoor._models.offloading import check_copy
from unbackdoor._models.stored_types import note_stored_types_, stored_types
from unbackdoor._models.weight_norms import copied_tensors, redo_weight_norms_, undo_weight_norms_


def all_trained_(model: nn.Module) -> None:
    """Let gradients reach all weights of a model, in place; of an adapter only its own, as its base stays what it is.

    Parameters that count something are whole numbers, which have no gradient.
    """
    adapter = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(not adapter or "lora_" in name)


class Form(NamedTuple):
    """The form of a suspect, which the purified model gets back.

    Args:
        types: types of its weights and buffers, by name.
        stored: narrower types of the file that it came from, by name; values are rounded to these.
        unsaved: types of the buffers that a checkpoint leaves out.
        training: whether each module is in train mode.
        trainable: whether each parameter requires gradients.
        device: device of its weights.
    """

    types: dict[str, torch.dtype]
    stored: dict[str, torch.dtype]
    unsaved: dict[str, torch.dtype]
    training: dict[str, bool]
    trainable: dict[str, bool]
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module) -> "Form":
        """Returns the form of a model."""
        types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        return cls(
            types=types,
            stored=stored_types(model),
            unsaved={name: buffer.dtype for name, buffer in model.named_buffers() if name not in types},
            training={name: module.training for name, module in model.named_modules()},
            trainable={name: parameter.requires_grad for name, parameter in model.named_parameters()},
            device=device_of(model),
        )

    def restore_(self, model: nn.Module, owner: str) -> None:
        """Give a model this form, in place.

        Args:
            model: the result of a method.
            owner: the method, for messages.

        Raises:
            UnbackdoorError: the model has other weights than the suspect, or numbers that its types do not hold.
        """
        redo_weight_norms_(model)
        relayout_(model.to(self.device), torch.contiguous_format)
        state: dict[str, Tensor] = model.state_dict()
        if state.keys() != self.types.keys():
            changed = sorted(state.keys() ^ self.types.keys())
            raise UnbackdoorError(
                f"{owner} must keep the model's weights, but changed the keys {', '.join(changed[:3])}."
            )
        narrowest = self.types | self.stored
        for name, tensor in state.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.to(narrowest[name])).all():
                raise UnbackdoorError(
                    f"{owner} left values in {name} that are too large for the model's {str(narrowest[name])[6:]}. "
                    "Take a base of that type, or give the model in float32."
                )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(narrowest[name]).to(self.types[name])
                parameter.requires_grad_(self.trainable[name])
                parameter.grad = None
            for name, buffer in model.named_buffers():
                buffer.data = buffer.data.to((narrowest | self.unsaved)[name]).to((self.types | self.unsaved)[name])
        note_stored_types_(model, self.stored)
        modes = dict(self.training)
        for name, module in model.named_modules():  # a part that the model made meanwhile (BigBird) is as its parent
            module.training = modes.setdefault(name, modes.get(name.rpartition(".")[0], module.training))


def working_copy(model: nn.Module) -> nn.Module:
    """Returns a copy to tune, in float32 for a model in half precision, which is too coarse for small steps.

    Layers with weight normalisation have plain weights in it; `Form.restore_` gives it back.

    Raises:
        UnbackdoorError: the module holds something that cannot be copied, is compiled, or has no weights; or the copy
            needs more memory than is free.
    """
    script = next((part for part in model.modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if script is not None:
        raise UnbackdoorError(
            f"{type(model).__name__} is TorchScript, which can be scored and not tuned. Give the module that it "
            "was made of, with its state_dict."
        )
    if any(type(part).__name__ == "OptimizedModule" for part in model.modules()):
        raise UnbackdoorError(
            f"{type(model).__name__} is compiled by torch.compile, which hides its layers, so it can be scored and not "
            "tuned or searched. Give the module that it was made of (its `_orig_mod`)."
        )
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise UnbackdoorError(
            f"{type(model).__name__} has no weights of its own, so it can be scored and not tuned or searched. Layers "
            "in a plain list, tuple or dictionary are no part of a module: take nn.ModuleList."
        )
    check_copy(model)
    try:
        working = copy.deepcopy(model, copied_tensors(model))
    except Exception as problem:  # a user's own module may hold anything, such as a lock or an open file
        raise UnbackdoorError(
            f"{type(model).__name__} cannot be copied ({printable(problem, 200)}). Let its module keep nothing but "
            "tensors, modules and plain values."
        ) from None
    undo_weight_norms_(working)
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in working.state_dict().values()):
        working.float()
    return working
