"""Written by tests/registry/stubs.py from _registry/trainers.py."""

import unbackdoor._registry.entries

from .abl import ABL as ABL
from .dpoe import DPoE as DPoE
from .musclelora import MuScleLoRA as MuScleLoRA
from .plain import Plain as Plain
from .token_unlearning import TokenUnlearning as TokenUnlearning

REGISTRY: tuple[unbackdoor._registry.entries.Entry, ...]
