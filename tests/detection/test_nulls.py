"""The rank of a score among clean models, by hand."""

import json

from unbackdoor._artifacts.null_table import CleanModel, NullTable
from unbackdoor._artifacts.operating_point import MeasuredPoint, OperatingPointTable
from unbackdoor._detection.nulls import Null, measured, null_for, operating_point, shipped

SETTINGS = {"patch": {"steps": 100}, "margin": {}}


def clean_model(number: int, *, arch: str = "resnet", classes: int = 10, **scores: float) -> CleanModel:
    return CleanModel(
        arch=arch, width=8, data="digits", modality="images", classes=classes, recipe="", seed=number, accuracy=0.9,
        scores=scores or {"patch": float(number), "margin": 0.0},
    )  # fmt: skip


def table(*models: CleanModel) -> NullTable:
    return NullTable(provenance="made by hand", detectors=SETTINGS, models=list(models))


def test_a_p_value_is_a_rank_and_never_zero() -> None:
    null = Null(tuple(clean_model(number) for number in range(39)), ("patch",), "")
    assert null.p_value(100.0) == 1 / 40
    assert null.p_value(38.0) == 2 / 40  # an equal one counts as at least as strong
    assert null.p_value(0.0) == 1.0


def test_the_largest_score_over_all_detectors_counts() -> None:
    models = tuple(clean_model(number, patch=0.0, margin=float(number)) for number in range(19))
    both = Null(models, ("patch", "margin"), "")
    assert both.p_value(18.5) == 1 / 20
    assert both.p_value(5.0) == 15 / 20
    assert Null(models, ("patch",), "").p_value(5.0) == 1 / 20


def test_only_models_that_can_be_compared_are_in_the_null() -> None:
    models = [clean_model(number) for number in range(19)]
    assert null_for("images", "resnet", 10, SETTINGS, table(*models)) is not None
    assert null_for("images", "resnet", 10, SETTINGS, table(*models[1:])) is None, "18 cannot reach 5 %"
    assert null_for("text", "resnet", 10, SETTINGS, table(*models)) is None
    assert null_for("images", "resnet", 2, SETTINGS, table(*models)) is None, "two classes are another matter"
    assert null_for("images", "resnet", 19, SETTINGS, table(*models)) is not None
    assert null_for("images", "resnet", 20, SETTINGS, table(*models)) is None, "twice as many are as well"
    other = {**SETTINGS, "patch": {"steps": 50}}
    compared = null_for("images", "resnet", 10, other, table(*models))
    assert compared is not None
    assert compared.detectors == ("margin",), "another search has another null"
    assert null_for("images", "resnet", 10, {"patch": {"steps": 50}}, table(*models)) is None


def test_words_are_compared_with_those_of_models_of_any_number_of_classes() -> None:
    models = [
        clean_model(number, classes=2 + number % 3).model_copy(update={"modality": "text"}) for number in range(19)
    ]
    null = null_for("text", "bert", 20, SETTINGS, table(*models))
    assert null is not None
    assert len(null.models) == 19


def test_networks_of_the_same_architecture_are_preferred_if_there_are_enough() -> None:
    own = [clean_model(number, arch="vit") for number in range(39)]
    others = [clean_model(number) for number in range(5)]
    chosen = null_for("images", "vit", 10, SETTINGS, table(*own, *others))
    assert chosen is not None
    assert len(chosen.models) == 39
    mixed = null_for("images", "vit", 10, SETTINGS, table(*own[:38], *others))
    assert mixed is not None
    assert len(mixed.models) == 43


def test_the_table_of_the_package_is_readable() -> None:
    assert json.loads(shipped().model_dump_json())["provenance"]
    assert isinstance(measured().points, list)


def test_rates_hold_for_the_detectors_and_settings_that_they_were_measured_with() -> None:
    part = {"value": 0.0, "n": 59, "low": 0.0, "high": 0.06}
    point = MeasuredPoint(
        detectors=SETTINGS, modality="images", false_alarms=part, detections=part, models="59 clean ones"
    )
    table = OperatingPointTable(points=[point])
    found = operating_point("images", dict(reversed(SETTINGS.items())), table)
    assert found == {"false_alarms": part, "detections": part, "models": "59 clean ones"}
    assert operating_point("text", SETTINGS, table) is None
    assert operating_point("images", {"patch": SETTINGS["patch"]}, table) is None, "fewer detectors, other rates"
    assert operating_point("images", {**SETTINGS, "patch": {"steps": 50}}, table) is None
