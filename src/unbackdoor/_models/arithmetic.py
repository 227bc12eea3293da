"""The device, the precision and the memory layout of the arithmetic."""

import copy
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from unbackdoor._data.pair_encoder import PairTokens
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.offloading import scored_on
from unbackdoor._models.weight_norms import copied_tensors

Precision = Literal["auto", "bf16", "fp32"]

HALF = (torch.float16, torch.bfloat16)

# Instruction sets that oneDNN can be limited to, with which it only emulates bfloat16.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


@dataclass(frozen=True)
class Arithmetic:
    """A device, with the precision and memory layout of computations on it.

    Args:
        device: device of the computation.
        bf16: forward passes under bfloat16 autocast; weights, gradients and losses stay in float32.
        channels_last: convolutions on NHWC memory, which is the faster layout for both kinds of hardware.
        dtype: type of the inputs and the model.
        widen: whether a copy in float32 replaces a model in half precision, which is many times slower on a CPU.
    """

    device: torch.device
    bf16: bool
    channels_last: bool
    dtype: torch.dtype = torch.float32
    widen: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context for forward passes."""
        if self.bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext() if self.channels_last or self.device.type != "cpu" else _faulty_ones_contiguous()

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and layout, in place; one that lies in several places stays there."""
        if scored_on(model) is not None:
            return model
        model.to(self.device)
        if not self.channels_last:
            relayout_(model, torch.contiguous_format)
        elif any(isinstance(module, nn.Conv2d) for module in model.modules()):
            relayout_(model, torch.channels_last)
        return model

    @contextmanager
    def placed(self, model: nn.Module) -> Iterator[nn.Module]:
        """Place the model on the device and in the layout while the block runs, then back on its own device.

        A block inside of another one gets the copy that was widened there.
        """
        if self.widen and any(parameter.dtype in HALF for parameter in model.parameters()):
            yield self.place(copy.deepcopy(model, copied_tensors(model)).float())
            return
        if scored_on(model) is not None:
            yield model
            return
        home = next((parameter.device for parameter in model.parameters()), self.device)
        kernels = [parameter for parameter in model.parameters() if parameter.ndim == 4]
        contiguous = all(kernel.is_contiguous() for kernel in kernels)
        try:
            yield self.place(model)
        finally:
            relayout_(model.to(home), torch.contiguous_format if contiguous else torch.channels_last)

    def lay(self, inputs: Tensor | Tokens) -> Tensor | Tokens:
        """Inputs in the type and layout of the model; token ids are returned unchanged."""
        if isinstance(inputs, PairTokens):
            return PairTokens({**inputs, "pixel_values": self._laid(inputs.pixels)})
        if isinstance(inputs, Tokens):
            return inputs
        return self._laid(inputs)

    def _laid(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype)
        if inputs.ndim != 4:
            return inputs
        if self.channels_last:
            return inputs.contiguous(memory_format=torch.channels_last)
        # Not `contiguous`: with one channel both layouts are the same, and it would keep the NHWC strides.
        return inputs.to(memory_format=torch.contiguous_format)

    @property
    def evaluation_batch(self) -> int:
        """Examples per forward pass without gradients: few enough for a CPU's caches, or enough to fill a GPU."""
        return 128 if self.device.type == "cpu" else 1024

    def gradient_batch(self, size: tuple[int, int]) -> int:
        """Pictures per pass that keeps all activations for a gradient: fewer above 64x64, as each keeps more.

        Args:
            size: (height, width) at which the model gets them.
        """
        return max(1, min(self.evaluation_batch, self.evaluation_batch * 64 * 64 // (size[0] * size[1])))


def relayout_(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Bring all 4-dimensional weights into a memory layout, in place; into channels_last those of convolutions alone.

    A module may view others by their memory, as a filter of complex numbers that is stored as pairs of real ones.
    """
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    for part in [model] if layout == torch.contiguous_format else convolutions:
        part.to(memory_format=layout)  # type: ignore[call-overload]
    return model


def faulty_in_channels_last(model: nn.Module) -> bool:
    """Whether a layer of the model is trained wrongly on a processor in channels_last.

    There are two faults. One is of GroupNorm: if its weights get a gradient and its inputs need none, as those of a
    first layer or of a search over weights, torch's backward pass writes the gradient of the inputs all the same, where
    there is no memory, and the process ends. Seen with torch 2.13.0; no issue is known.

    The other is oneDNN issue 6035 (https://github.com/uxlfoundation/oneDNN/issues/6035): the float32 gradient of the
    weights of a 1x1 convolution with a stride writes past its workspace if it has fewer input channels than a block
    of the instruction set has, 8 under AVX2 and 16 under AVX-512. Memory is overwritten: wrong gradients, crashes,
    endless loops. A transposed convolution swaps inputs and outputs, so its output channels count; in both it is the
    second dimension of the weight. One channel and groups were never seen to fail, but are treated in the same way:
    this costs a little speed in networks that are hardly used. If a convolution is not a module, its weight does not
    show its stride, so the shape of the weight decides.

    Seen with torch 2.13.0 (oneDNN 3.12.0). Check again when torch has a oneDNN in which that issue is closed:
    `tests/models/test_layout.py` shows the fault.
    """
    return any(_faulty_in_channels_last(module) for module in model.modules())


@contextmanager
def _faulty_ones_contiguous() -> Iterator[None]:
    """Make the inputs of all faulty layers contiguous: a model may permute its activations itself."""

    def relaid(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...] | None:
        layers = nn.Conv2d | nn.ConvTranspose2d | nn.GroupNorm
        if not isinstance(module, layers) or not _faulty_in_channels_last(module):
            return None
        return tuple(
            each.to(memory_format=torch.contiguous_format) if isinstance(each, Tensor) else each for each in inputs
        )

    hook = register_module_forward_pre_hook(relaid)  # type: ignore[arg-type]  # its stub knows hooks of None only
    try:
        yield
    finally:
        hook.remove()


def _faulty_in_channels_last(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return module.kernel_size == (1, 1) and module.stride != (1, 1) and module.weight.shape[1] < 16
    if isinstance(module, nn.GroupNorm):
        return module.affine
    own = (parameter.shape for parameter in module.parameters(recurse=False) if parameter.ndim == 4)
    return any(shape[2:] == (1, 1) and 1 < shape[1] < 16 for shape in own)


def choose(model: nn.Module, device: str | torch.device | None = None, precision: Precision = "auto") -> Arithmetic:
    """Returns the fastest arithmetic of the hardware that does not cost accuracy.

    Args:
        model: any model; float64, and on a GPU float16 and bfloat16, are computed in their own type.
        device: None uses a GPU if there is one.
        precision: `auto` is channels_last (except for a model that is faulty in it), and bfloat16 autocast if the
            hardware multiplies bfloat16; `bf16` always uses autocast, `fp32` switches both off.

    Raises:
        UnbackdoorError: the device is unknown or absent, or there is no such precision, or it does not work with the
            model; or the model lies in several places, and its inputs go to another device.
    """
    if precision not in get_args(Precision):
        raise UnbackdoorError(f"`precision` must be auto, bf16 or fp32, got {precision!r}.")
    fixed = scored_on(model)
    if device is None:
        device = fixed or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.ones(1, device=where).item()  # fails on a device that holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).split("\n")[0][:100]
        raise UnbackdoorError(f"`device` {device} cannot be used here ({reason}). Try `device='cpu'`.") from None
    if fixed is not None and where.type != fixed.type:
        raise UnbackdoorError(
            f"`device` must be {fixed.type} for {type(model).__name__}, which was loaded in parts to be scored there, "
            f"got {device}. Leave it out, or load the model for that device."
        )
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        return Arithmetic(where, bf16=False, channels_last=False, dtype=torch.float64)
    first = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    # Also if others are in float32: an adapter in half precision on such a base.
    half = any(parameter.dtype in HALF for parameter in model.parameters())
    widen = where.type == "cpu" and half and fixed is None
    if first in HALF and not widen:
        return Arithmetic(where, bf16=False, channels_last=precision != "fp32", dtype=first)
    overflows = (
        getattr(getattr(model, "config", None), "model_type", "") == "deberta"
    )  # masks by float32's least number
    if precision == "bf16" and overflows:
        raise UnbackdoorError(f"`precision='bf16'` does not work with {type(model).__name__}. Take auto or fp32.")
    fast = precision == "bf16" or (precision == "auto" and _multiplies_bf16(where) and not overflows)
    safe = where.type != "cpu" or not faulty_in_channels_last(model)
    return Arithmetic(where, bf16=fast, channels_last=precision != "fp32" and safe, widen=widen)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    narrowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BF16
    return device.type == "cpu" and "avx512_bf16" in processor()[1] and not narrowed


def processor() -> tuple[str, frozenset[str]]:
    """Returns the processor's model name and its feature flags, as far as the system reports them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    entries = {key.strip(): entry.strip() for key, entry in lines.items()}
    return entries.get("model name", platform.machine()), frozenset(entries.get("flags", "").split())


def description(arithmetic: Arithmetic) -> str:
    """Returns the device for a record: model, cores, memory and precision, without a host name."""
    precision = "bf16 autocast" if arithmetic.bf16 else str(arithmetic.dtype).removeprefix("torch.")
    layout = "channels_last" if arithmetic.channels_last else "contiguous"
    if arithmetic.device.type == "cuda":
        properties = torch.cuda.get_device_properties(arithmetic.device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {precision}, {layout}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    cores = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{processor()[0]}, {cores}, {memory:.0f} GiB, {precision}, {layout}"
