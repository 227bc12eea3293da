"""Remove backdoors from neural networks that somebody else trained.

    import unbackdoor as ub

    model, encode = ub.load("path/or/hub-name")
    clean = ub.Dataset.load("clean.parquet", encode)
    result = ub.purify(model, clean, ub.purifiers.FST(alpha=0.1), seed=0)
    score = ub.evaluate(result.model, test, attack=ub.attacks.Blended(ratio=0.2, target=0))

Importing this module imports neither torch nor transformers; the names below do when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from unbackdoor._errors import UnbackdoorError as UnbackdoorError

if TYPE_CHECKING:
    from unbackdoor import archs as archs
    from unbackdoor import attacks as attacks
    from unbackdoor import purifiers as purifiers
    from unbackdoor import testing as testing
    from unbackdoor._data.dataset import Dataset as Dataset
    from unbackdoor._data.images import ImageEncoder as ImageEncoder
    from unbackdoor._evaluation.evaluate import evaluate as evaluate
    from unbackdoor._mixing.stream import purify_stream as purify_stream
    from unbackdoor._models.loading import load as load
    from unbackdoor._models.loading import save as save
    from unbackdoor._poisoning.poison import poison as poison
    from unbackdoor._poisoning.trigger import Trigger as Trigger
    from unbackdoor._purification.purify import Purified as Purified
    from unbackdoor._purification.purify import purify as purify
    from unbackdoor._purification.run import Run as Run
    from unbackdoor._stress.result import Stress as Stress
    from unbackdoor._stress.stress import stress as stress
    from unbackdoor._tasks.proportion import Proportion as Proportion
    from unbackdoor._tasks.score import Score as Score

_HOMES = {
    "Trigger": "_poisoning.trigger",
    "poison": "_poisoning.poison",
    "Dataset": "_data.dataset",
    "Proportion": "_tasks.proportion",
    "Score": "_tasks.score",
    "evaluate": "_evaluation.evaluate",
    "ImageEncoder": "_data.images",
    "load": "_models.loading",
    "save": "_models.loading",
    "Purified": "_purification.purify",
    "Run": "_purification.run",
    "purify": "_purification.purify",
    "purify_stream": "_mixing.stream",
    "Stress": "_stress.result",
    "stress": "_stress.stress",
}
_MODULES = ("archs", "attacks", "purifiers", "testing")

__all__ = ["UnbackdoorError", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"unbackdoor.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"unbackdoor.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'unbackdoor' has no attribute {name!r}")
