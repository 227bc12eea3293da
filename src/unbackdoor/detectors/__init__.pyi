"""Written by tests/registry/stubs.py from _registry/detectors.py."""

import unbackdoor._registry.entries

from .patch import Patch as Patch

REGISTRY: tuple[unbackdoor._registry.entries.Entry, ...]
