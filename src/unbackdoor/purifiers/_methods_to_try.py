"""The methods that `Auto` tries, in order, by the kind of data."""

from collections.abc import Callable
from dataclasses import replace

from unbackdoor._data.dataset import Dataset
from unbackdoor._purification.method import Method, method_name
from unbackdoor._purification.run import Run
from unbackdoor.purifiers.adaptive_unlearning import AdaptiveUnlearning
from unbackdoor.purifiers.fine_tuning import FineTuning
from unbackdoor.purifiers.mixing_distillation import MixingDistillation
from unbackdoor.purifiers.scale_invariant_fst import ScaleInvariantFST
from unbackdoor.purifiers.word_distillation import WordDistillation

# The second shift of images, for networks that need longer to learn their features again; the first is at the defaults.
LONGER = 120

# These change a model whatever its trigger is; the others unlearn what a search finds.
WITHOUT_A_SEARCH = ScaleInvariantFST, MixingDistillation


def _for_images(clean: Dataset, shortcut: bool, run: Run) -> list[Method]:
    shift = ScaleInvariantFST(strength=1)
    shifts: list[Method] = [shift, replace(shift, epochs=LONGER)]
    unlearning = AdaptiveUnlearning()
    # To unlearn what the evidence shows is cheaper; the audit of the result says whether that was all.
    first = [unlearning, *shifts] if shortcut else [*shifts, unlearning]
    return [*first, FineTuning()]


def _for_texts(clean: Dataset, shortcut: bool, run: Run) -> list[Method]:
    based = [MixingDistillation()] if run.base is not None else []
    return [*based, *([WordDistillation()] if shortcut else []), FineTuning()]


METHODS: dict[str, Callable[[Dataset, bool, Run], list[Method]]] = {"images": _for_images, "text": _for_texts}


def methods_to_try(clean: Dataset, shortcut: bool, run: Run) -> list[Method]:
    """Returns the methods to try, in order, by the kind of data.

    Args:
        clean: the examples that the methods get.
        shortcut: whether the audit of the suspect found one that counts.
        run: of the purification; texts with its base have a further method.
    """
    return METHODS[clean.modality](clean, shortcut, run)


def method_label(method: Method) -> str:
    """Returns the name of a method, with its passes, learning rate and batch size if they are not the defaults."""
    fields = {field: getattr(method, field, None) for field in ("epochs", "learning_rate", "batch_size")}
    usual = type(method)()
    chosen = ", ".join(
        f"{field}={setting:g}"
        for field, setting in fields.items()
        if setting is not None and setting != getattr(usual, field)
    )
    return method_name(method) + (f" ({chosen})" if chosen else "")
