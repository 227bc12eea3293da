"""nulls.json: its schema. The scores of clean models, which an audit compares a suspect with."""

from typing import Annotated, Any, Literal

from pydantic import Field

from unbackdoor._artifacts.entries import Count, JsonObject, Share


class CleanModel(JsonObject):
    """A clean model of the zoo.

    Args:
        arch: its architecture.
        width: channels of its first stage; None for a model of text.
        data: the name of its training data.
        modality: of the data.
        classes: how many it has.
        recipe: how it was trained, if otherwise than the recipe of victims says.
        seed: of the training.
        accuracy: on the test examples.
        scores: for each detector, -log10 of the smallest nominal p-value of a proven shortcut.
    """

    arch: str
    width: int | None
    data: str
    modality: Literal["images", "text"]
    classes: Annotated[int, Field(ge=2)]
    recipe: str
    seed: Count
    accuracy: Share
    scores: dict[str, Annotated[float, Field(ge=0)]]


class NullTable(JsonObject):
    """The zoo of clean models as numbers.

    Args:
        provenance: who measured it, with what and when, in words.
        detectors: all settings of each detector that was run.
        models: the clean models.
    """

    provenance: str
    detectors: dict[str, dict[str, Any]]
    models: list[CleanModel]
