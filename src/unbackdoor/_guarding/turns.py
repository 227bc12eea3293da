"""Turns: guards watch and change a model while it runs, so that of several threads one at a time may use it."""

import threading
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


def turn(model: nn.Module) -> threading.RLock:
    """Returns the lock of a model, to be held while a guard works with it; a thread may hold it several times."""
    with _MAKING:
        return _LOCKS.setdefault(model, threading.RLock())
