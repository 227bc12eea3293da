"""The protocol of purifiers, their names in messages and records, and the call of one."""

from typing import Protocol

import torch
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import needing_gradients
from unbackdoor._purification.run import Run
from unbackdoor._registry.entries import entry_of, name_of, steps_of
from unbackdoor._registry.purifiers import REGISTRY


class Method(Protocol):
    """A purifier: a frozen value that can be called. There is no base class."""

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Change the model, which is the method's own copy, and return it."""


def needs_clean(method: Method) -> bool:
    """Whether a method uses clean examples; a method that uses none declares `needs_clean = False`."""
    return bool(getattr(method, "needs_clean", True))


def needs_head(method: Method) -> bool:
    """Whether a step of a method refuses a model without a last linear layer at once; it declares `needs_head = True`.

    Others refuse it when they ask for that layer (`run.head`), and many never do.
    """
    return any(bool(getattr(step, "needs_head", False)) for step in steps_of(method))


def uses_unlabelled(method: Method) -> bool:
    """Whether a step of a method uses examples without labels; one that does declares `uses_unlabelled = True`.

    Of a function, or a value without that declaration that is not registered, nothing is known: it may.
    """
    return any(bool(getattr(step, "uses_unlabelled", entry_of(step, REGISTRY) is None)) for step in steps_of(method))


def asking(method: Method) -> str:
    """Returns the class name of the method that uses clean examples: its own, or a composition's first such step."""
    return next((type(step).__name__ for step in steps_of(method) if needs_clean(step)), type(method).__name__)


def owner_of(method: Method) -> str:
    """Returns the name in messages: of a method's class, of a composition's steps (`EPUR+FST`), or of a function."""
    return "+".join(getattr(step, "__name__", type(step).__name__) for step in steps_of(method))


def method_name(method: Method) -> str:
    """Returns the command-line name of a method."""
    return name_of(method, REGISTRY)


def applied(method: Method, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
    """Applies a method, alone or as a step of several, which changes the model in place.

    Raises:
        UnbackdoorError: the result is not a model, or has values that are not finite.
    """
    run.unseen = run.cross_validated = None  # the next step sees the examples that this one held out
    with needing_gradients(model):
        purified = method(model, clean, run)
    if not isinstance(purified, nn.Module):
        raise UnbackdoorError(
            f"{owner_of(method)} must return the model, got {type(purified).__name__}. End it in return model."
        )
    for name, tensor in purified.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnbackdoorError(f"{owner_of(method)} left non-finite values in {name}. Lower its learning rate.")
    return purified
