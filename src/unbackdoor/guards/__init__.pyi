"""Written by tests/registry/stubs.py from _registry/guards.py."""

import unbackdoor._registry.entries

from .badacts import BadActs as BadActs
from .cleangen import CleanGen as CleanGen
from .demonstrations import Demonstrations as Demonstrations
from .onion import Onion as Onion
from .psim import Psim as Psim
from .rap import Rap as Rap
from .strip import Strip as Strip
from .weightwatch import WeightWatch as WeightWatch

REGISTRY: tuple[unbackdoor._registry.entries.Entry, ...]
