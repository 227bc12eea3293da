"""Written by tests/registry/stubs.py from _registry/trainers.py."""

import unbackdoor._registry.entries

from .abl import ABL as ABL
from .plain import Plain as Plain

REGISTRY: tuple[unbackdoor._registry.entries.Entry, ...]
