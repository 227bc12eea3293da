"""Language models larger than memory: refused, or, to be scored, left in part on disk until a pass needs the part."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._memory import check_memory, free, shown
from unbackdoor._models.weight_files import WeightFiles

logger = logging.getLogger("unbackdoor")

_FILLED = 0.9  # of what is free: the rest is for activations
_WIDENED = 2  # a copy in float32 of a model in half precision is twice as large
_WHERE = {"cpu": "lie in memory", "disk": "lie on disk"}

_in_parts: WeakSet[nn.Module] = WeakSet()  # models that `spread_` got


def check_fits(path: Path, weights: WeightFiles) -> None:
    """Refuse a model whose weights do not fit into memory."""
    check_memory(
        f"{path} needs",
        weights.extent.bytes,
        "Take a machine with more, or a smaller model. A whole model that is larger than memory can be scored "
        "(evaluate, or unbackdoor.load(PATH, offload='auto')), and models and adapters can be mixed on disk "
        "(unbackdoor purify fine-mixing --stream).",
    )


def check_copy(model: nn.Module) -> None:
    """Refuse a model that cannot be copied in float32, in which methods work, with what is free."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cpu"]
    wide = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    check_memory(
        f"{type(model).__name__} is worked on as a copy{' in float32' if wide else ''}, which needs",
        sum(tensor.numel() * max(tensor.element_size(), 4 if wide else 1) for tensor in tensors),
        "Take a machine with more, or a smaller model; language models can also be mixed on disk "
        "(unbackdoor purify fine-mixing --stream).",
    )


def rooms(weights: WeightFiles, device: str) -> dict[int | str, int] | None:
    """Returns how many bytes of a model each place may hold while it is scored; None if it fits as it is.

    Args:
        weights: its weights.
        device: the device that scores it, or `auto`: a GPU if there is one.
    """
    codes = [location for each in weights.locations.values() for location in each.values()]
    half = sum(location.end - location.begin for location in codes if location.code in ("F16", "BF16"))
    left, needed = free(), weights.extent.bytes
    gpu = _gpu(device)
    if left is None:
        return None
    if gpu is None:
        fits = needed + _WIDENED * half <= _FILLED * left
        return None if fits else {"cpu": int(_FILLED * left)}
    on_gpu = torch.cuda.mem_get_info(gpu)[0]
    fits = needed <= _FILLED * left and needed <= _FILLED * on_gpu
    return None if fits else {gpu: int(_FILLED * on_gpu), "cpu": int(_FILLED * left)}


def _gpu(device: str) -> int | None:
    """The number of a GPU; None for the processor."""
    if not torch.cuda.is_available() or not device.startswith(("auto", "cuda")):
        return None
    return torch.device(device).index or 0 if device != "auto" else torch.cuda.current_device()


def placing(path: Path, weights: WeightFiles, rooms: dict[int | str, int]) -> dict[str, Any]:
    """Returns what transformers must be told to spread a model over these places and the disk.

    Raises:
        UnbackdoorError: accelerate is not installed, or the weights are pickles, which can only be read whole.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise UnbackdoorError(
            f"{path} is larger than memory, and is read in parts by accelerate; get it with: pip install "
            '"unbackdoor[llm]"'
        )
    if weights.pickled:
        raise UnbackdoorError(
            f"{path} is larger than memory and has its weights in a pickle, which can only be read whole. Save it as "
            "safetensors."
        )
    return {"device_map": "auto", "max_memory": rooms}


def misfits(model: Any, weights: WeightFiles) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Returns name, stored and own shape of tensors that do not fit; transformers compares none that stay on disk.

    Args:
        model: a model with its weights in several places.
        weights: its files; some name tensors without the prefix of the body.
    """
    stored = {name: location.shape for each in weights.locations.values() for name, location in each.items()}
    prefix = f"{model.base_model_prefix}."
    named = ((name, stored.get(name, stored.get(name.removeprefix(prefix)))) for name in model.state_dict())
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return [(name, shape, own[name]) for name, shape in named if shape is not None and shape != own[name]]


def spread_(path: Path, model: Any) -> None:
    """Note that a model was loaded in parts, and say in one line where these lie.

    Args:
        path: its directory.
        model: as transformers loaded it with what `placing` says.
    """
    _in_parts.add(model)
    sizes: dict[str, int] = {}
    places = getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device.type}
    for name, parameter in model.named_parameters():
        where = _WHERE.get(_place(places, name), "lie on the GPU")
        sizes[where] = sizes.get(where, 0) + parameter.numel() * parameter.element_size()
    order = ["lie on the GPU", *_WHERE.values()]
    parts = " and ".join(f"{shown(sizes[where])} {where}" for where in order if where in sizes)
    slow = ", from where every pass reads them" if _WHERE["disk"] in sizes else ""
    logger.info("%s is too large to be scored as usual: of its weights, %s%s. It takes longer.", path, parts, slow)


def _place(places: Mapping[str, Any], name: str) -> str:
    """The place of a parameter, by the longest beginning of its name that has one."""
    return str(places[max((each for each in places if f"{name}.".startswith(f"{each}." if each else "")), key=len)])


def scored_on(model: nn.Module) -> torch.device | None:
    """Returns the device that the inputs of a model go to which lies in several places; None for any other model.

    Such a model is neither moved nor copied.
    """
    named = getattr(model, "hf_device_map", None)
    places = list(named.values()) if isinstance(named, dict) else []
    if model not in _in_parts and len(set(places)) < 2:
        return None
    if not places:
        return next(model.parameters()).device
    return torch.device(next((place for place in places if place not in ("cpu", "disk")), "cpu"))
