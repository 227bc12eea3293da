"""The modes of torch that a caller may have set, such as that nothing gets a gradient."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def in_own_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function compute gradients, and in its own precision, whatever modes its caller has set.

    Without gradients (`torch.set_grad_enabled(False)` at the top of a notebook) a search would find nothing. Within
    autocast, torch keeps the weights that it has cast to bfloat16 until the end, so that tuning would have no effect.
    On another default device, tensors would lie apart from those that name the processor.
    """

    @functools.wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            if torch.get_default_device().type != "cpu":
                modes.enter_context(torch.device("cpu"))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    modes.enter_context(torch.autocast(device, enabled=False, cache_enabled=False))
            return function(*arguments, **named)

    return run
