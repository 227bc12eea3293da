"""What a purifier is, and what messages and records call it."""

from typing import Protocol

import torch
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._purification.run import Run
from unbackdoor._registry.entries import name_of, steps_of
from unbackdoor._registry.purifiers import REGISTRY


class Method(Protocol):
    """A purifier: a frozen value that can be called. There is nothing to inherit from."""

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Change the model, which is the method's own copy, and give it back."""


def needs_clean(method: Method) -> bool:
    """Whether a method uses clean examples; one that does not says `needs_clean = False`."""
    return bool(getattr(method, "needs_clean", True))


def asking(method: Method) -> str:
    """The class that uses clean examples: a method's own, or of a composition the first such step's."""
    return next((type(step).__name__ for step in steps_of(method) if needs_clean(step)), type(method).__name__)


def owner_of(method: Method) -> str:
    """What messages name: a method's class, of a composition those of its steps (`EPUR+FST`), a function's name."""
    return "+".join(getattr(step, "__name__", type(step).__name__) for step in steps_of(method))


def method_name(method: Method) -> str:
    """The command-line name of a method."""
    return name_of(method, REGISTRY)


def applied(method: Method, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
    """What a method makes of a model, in place, be it alone or as a step of several.

    Raises:
        UnbackdoorError: it is no model, or has values that are not finite.
    """
    run.unseen = run.cross_validated = None  # what one step held out, the next one sees
    purified = method(model, clean, run)
    if not isinstance(purified, nn.Module):
        raise UnbackdoorError(
            f"{owner_of(method)} must return the model, got {type(purified).__name__}. End it in return model."
        )
    for name, tensor in purified.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnbackdoorError(f"{owner_of(method)} left non-finite values in {name}. Lower its learning rate.")
    return purified
