"""adapter_bank.json: its schema. Statistics of adapters' weights, which `audit` compares an adapter with."""

from typing import Annotated, Literal

from pydantic import Field

from unbackdoor._artifacts.entries import Count, JsonObject, Share


class BankAdapter(JsonObject):
    """An adapter that was trained for the bank.

    Args:
        part: `bank`, which an adapter is compared with, or `test`, on which that comparison was measured.
        attack: what was planted; null for a benign one.
        seed: of the training.
        accuracy: on clean test examples.
        attack_success: null for a benign one.
        statistics: for each kind of layer the mean of each statistic over the layers.
    """

    part: Literal["bank", "test"]
    attack: str | None
    seed: Count
    accuracy: Share
    attack_success: Share | None
    statistics: dict[str, dict[str, float]]


class Shape(JsonObject):
    """The layers of one kind: how many have matrices, and their sides."""

    layers: Annotated[int, Field(ge=1)]
    outputs: Annotated[int, Field(ge=1)]
    inputs: Annotated[int, Field(ge=1)]


class BankArea(JsonObject):
    """How well the distance from the benign adapters of the bank separates those of the test.

    Args:
        value: the probability that a backdoored one is farther than a benign one.
        low: of the 95 % interval.
        high: of the 95 % interval.
    """

    value: Share
    low: Share
    high: Share


class AdapterBank(JsonObject):
    """The bank as numbers; no weights.

    Args:
        provenance: who measured it, and with what.
        trained: how all of these adapters were trained, in words.
        arch: `model_type` of their base.
        rank: of all their matrices.
        layers: the kinds of layers that have matrices.
        adapters: the adapters.
        area: under the curve of the test.
    """

    provenance: str
    trained: str
    arch: str
    rank: Annotated[int, Field(ge=1)]
    layers: dict[str, Shape]
    adapters: list[BankAdapter]
    area: BankArea
