"""Where the arithmetic runs and in which precision and memory layout."""

import copy
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._text import Tokens

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Arithmetic:
    """A device, and how to compute on it.

    Args:
        device: where.
        bf16: forward passes under bfloat16 autocast; weights, gradients and losses stay in float32.
        channels_last: convolutions on NHWC memory, which is the faster layout for both kinds of hardware.
        dtype: of the inputs, which is that of the model.
        widen: the model is in half precision, in which processors are many times slower than in float32; a copy in
            float32 is computed in its place.
    """

    device: torch.device
    bf16: bool
    channels_last: bool
    dtype: torch.dtype = torch.float32
    widen: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """The context for forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and layout, in place."""
        model.to(self.device)
        if self.channels_last and any(isinstance(module, nn.Conv2d) for module in model.modules()):
            relayout_(model, torch.channels_last)
        return model

    @contextmanager
    def placed(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model on the device and in the layout while the block runs, and back where it was afterwards."""
        if self.widen:
            yield self.place(copy.deepcopy(model).float())
            return
        home = next((parameter.device for parameter in model.parameters()), self.device)
        kernels = [parameter for parameter in model.parameters() if parameter.ndim == 4]
        contiguous = all(kernel.is_contiguous() for kernel in kernels)
        try:
            yield self.place(model)
        finally:
            model.to(home)
            if contiguous:
                relayout_(model, torch.contiguous_format)

    def lay(self, inputs: Tensor | Tokens) -> Tensor | Tokens:
        """Inputs in the type and layout of the model; token ids have neither."""
        if isinstance(inputs, Tokens):
            return inputs
        inputs = inputs.to(self.dtype)
        if self.channels_last and inputs.ndim == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    @property
    def evaluation_batch(self) -> int:
        """Examples per forward pass without gradients: what stays in a CPU's caches, or fills a GPU."""
        return 128 if self.device.type == "cpu" else 1024


def relayout_(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Bring all 4-dimensional weights into a memory layout, in place."""
    return model.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


def choose(model: nn.Module, device: str | torch.device | None = None, precision: Precision = "auto") -> Arithmetic:
    """The fastest arithmetic that the hardware has and that accuracy does not suffer from.

    Args:
        model: one in float64 is computed as it is, and so is one in float16 or bfloat16 on a GPU.
        device: None takes a GPU where there is one.
        precision: `auto` is channels_last, and bfloat16 autocast where the hardware multiplies bfloat16; `bf16`
            insists on it, `fp32` switches both off.

    Raises:
        UnbackdoorError: an unknown or absent device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        torch.ones(1, device=where).item()  # fails on a device that holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).split("\n")[0][:100]
        raise UnbackdoorError(f"--device {device} cannot be used here ({reason}). Try --device cpu.") from None
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        return Arithmetic(where, bf16=False, channels_last=False, dtype=torch.float64)
    first = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    widen = first in (torch.float16, torch.bfloat16) and where.type == "cpu"
    if first in (torch.float16, torch.bfloat16) and not widen:
        return Arithmetic(where, bf16=False, channels_last=precision != "fp32", dtype=first)
    overflows = (
        getattr(getattr(model, "config", None), "model_type", "") == "deberta"
    )  # masks by float32's least number
    if precision == "bf16" and overflows:
        raise UnbackdoorError(f"--precision bf16 is more than {type(model).__name__} can do. Take auto or fp32.")
    fast = precision == "bf16" or (precision == "auto" and _multiplies_bf16(where) and not overflows)
    return Arithmetic(where, bf16=fast, channels_last=precision != "fp32", widen=widen)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "avx512_bf16" in processor()[1]


def processor() -> tuple[str, frozenset[str]]:
    """The processor's model name and its feature flags, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    entries = {key.strip(): entry.strip() for key, entry in lines.items()}
    return entries.get("model name", platform.machine()), frozenset(entries.get("flags", "").split())


def description(arithmetic: Arithmetic) -> str:
    """The device for a record: model, cores, memory, precision; no host name."""
    precision = "bf16 autocast" if arithmetic.bf16 else str(arithmetic.dtype).removeprefix("torch.")
    layout = "channels_last" if arithmetic.channels_last else "contiguous"
    if arithmetic.device.type == "cuda":
        properties = torch.cuda.get_device_properties(arithmetic.device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {precision}, {layout}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    cores = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{processor()[0]}, {cores}, {memory:.0f} GiB, {precision}, {layout}"
