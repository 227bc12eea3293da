"""The trainers: their registry, and the classes, imported on first use."""

import lazy_loader

from unbackdoor._registry.trainers import REGISTRY as REGISTRY

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
