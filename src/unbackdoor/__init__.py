"""Remove backdoors from neural networks that somebody else trained.

    import unbackdoor as ub

    model, encode = ub.load("path/or/hub-name")
    clean = ub.Dataset.load("clean.parquet", encode)
    result = ub.purify(model, clean, ub.purifiers.FST(alpha=0.1), seed=0)
    score = ub.evaluate(result.model, test, attack=ub.attacks.Blended(ratio=0.2, target=0))

Importing this module imports neither torch nor transformers; the names below do when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
