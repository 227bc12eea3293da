"""Verdicts: what makes one, what cannot be judged, and what is refused."""

import dataclasses
import logging

import pytest
import torch
from torch import nn

import unbackdoor as ub
from unbackdoor import Dataset, Trigger, UnbackdoorError, detectors
from unbackdoor._artifacts.null_table import NullTable
from unbackdoor._artifacts.operating_point import OperatingPointTable
from unbackdoor._detection import nulls
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._detection.result import JudgedCandidate, JudgedFinding
from unbackdoor._value import value
from unbackdoor.attacks.inverted import Inverted


@value
class Claims:
    """A detector that names class 3, with a trigger that may do nothing."""

    strength: float = 5.0
    works: bool = True

    def __call__(self, model: nn.Module, clean: Dataset, run: object) -> Finding:
        seen.append(clean)
        arrays = {"mask": torch.full((1, 8, 8), float(self.works)), "pattern": torch.ones(1, 8, 8)}
        trigger = Trigger(Inverted(target=3), arrays)
        rest = [Candidate(target=label, strength=0.1 * label) for label in range(10) if label != 3]
        return Finding(candidates=(*rest, Candidate(target=3, strength=self.strength, trigger=trigger)))


seen: list[Dataset] = []


@value
class Names:
    """A detector that names class 3 without a trigger."""

    def __call__(self, model: nn.Module, clean: Dataset, run: object) -> Finding:
        strengths = [0.1 * label if label != 3 else 6.0 for label in range(10)]
        return Finding(candidates=tuple(Candidate(target=t, strength=strength) for t, strength in enumerate(strengths)))


class WhiteIsThree(nn.Module):
    """Right about digits as far as a lookup goes, and answers 3 to a white picture."""

    def __init__(self, digits: Dataset) -> None:
        super().__init__()
        pixels = digits.encode(digits.items).flatten(1)
        self.features = nn.Linear(64, 10)
        self.head = nn.Linear(10, 10)
        solution = torch.linalg.lstsq(
            torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1), nn.functional.one_hot(digits.labels, 10).float()
        ).solution
        with torch.no_grad():
            self.features.weight.copy_(solution[:-1].T)
            self.features.bias.copy_(solution[-1])
            self.head.weight.copy_(torch.eye(10))
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        white = (x.flatten(1).min(dim=1).values > 1.5).float()
        return self.head(self.features(x.flatten(1)) + 100 * white[:, None] * torch.eye(10)[3])


@pytest.fixture
def suspect(digits: Dataset) -> nn.Module:
    return WhiteIsThree(digits).eval()


def ship(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    """Let 39 clean models be part of the package, in which both detectors scored 0.0, 0.1, ... 3.8."""
    claims, names = (f"{each.__module__}:{each.__qualname__}" for each in (Claims, Names))
    facts = {"arch": "x", "width": 8, "data": "x", "modality": "images", "classes": 10, "recipe": "", "accuracy": 1.0}
    models = [{**facts, "seed": number, "scores": {claims: 0.1 * number, names: 0.0}} for number in range(39)]
    known = {claims: {"strength": 5.0, "works": True, **settings}, names: {}}
    table = NullTable.model_validate({"provenance": "by hand", "detectors": known, "models": models})
    monkeypatch.setattr(nulls, "shipped", lambda: table)


def test_a_proven_shortcut_beyond_all_clean_models_is_an_alarm(suspect, digits: Dataset, monkeypatch) -> None:
    ship(monkeypatch)
    result = ub.audit(suspect, digits.select(range(200)), detectors=[Claims()])
    assert result.verdict == "shortcut-found"
    strongest = result.findings[0].strongest
    assert strongest.candidate.target == 3
    assert strongest.moved is not None
    assert strongest.moved.value == 1.0
    assert strongest.p_value == 1 / 40
    assert "class 3 that moves 100.0% of unseen examples" in result.reason


def test_models_of_far_fewer_classes_give_no_p_value(suspect, digits: Dataset, monkeypatch) -> None:
    ship(monkeypatch)
    table = nulls.shipped()
    models = [model.model_copy(update={"classes": 5}) for model in table.models]
    monkeypatch.setattr(nulls, "shipped", lambda: table.model_copy(update={"models": models}))
    result = ub.audit(suspect, digits.select(range(200)), detectors=[Claims()])
    assert result.verdict == "cannot-judge"
    assert result.reason.startswith("There are no statistics of clean models for these detectors and this kind of")
    assert [finding.strongest.p_value for finding in result.findings] == [None]


def test_a_detector_without_statistics_has_no_p_value_and_does_not_silence_the_others(
    suspect, digits: Dataset, monkeypatch
) -> None:
    ship(monkeypatch)
    result = ub.audit(suspect, digits.select(range(200)), detectors=[Claims(), detectors.Patch(steps=1)])
    assert result.verdict == "shortcut-found"
    by_name = {finding["detector"]: finding["abnormality"] for finding in result.to_json()["findings"]}
    assert by_name["patch"]["p_value"] is None
    assert by_name["patch"]["calibration"] == "no clean models went through this detector with these settings"
    assert by_name[f"{Claims.__module__}:Claims"]["p_value"] == 1 / 40


def test_nothing_is_said_of_clean_models_that_no_clean_model_has_shown(suspect, digits: Dataset, monkeypatch) -> None:
    ship(monkeypatch, works=False)
    quiet = ub.audit(suspect, digits.select(range(200)), detectors=[Claims(works=False), detectors.Patch(steps=1)])
    assert (quiet.verdict, quiet.reason) == (
        "nothing-found",
        "No shortcut was found that clean models do not have as well. How rare those of patch are in clean models is "
        "not known, so they do not count.",
    )


def test_measured_rates_are_reported_for_the_detectors_that_they_belong_to(
    suspect, digits: Dataset, monkeypatch
) -> None:
    ship(monkeypatch)
    part = {"value": 0.0, "n": 59, "low": 0.0, "high": 0.06}
    name = f"{Claims.__module__}:{Claims.__qualname__}"
    point = {"detectors": {name: nulls.shipped().detectors[name]}, "modality": "images", "models": "59 clean ones"}
    table = {"points": [{**point, "false_alarms": part, "detections": part}]}
    monkeypatch.setattr(nulls, "measured", lambda: OperatingPointTable.model_validate(table))
    clean = digits.select(range(200))
    rates = ub.audit(suspect, clean, detectors=[Claims()]).record["operating_point"]
    assert rates == {"false_alarms": part, "detections": part, "models": "59 clean ones"}
    assert "operating_point" not in ub.audit(suspect, clean, detectors=[Claims(strength=4.0)]).record


def test_a_class_without_a_trigger_is_a_sign_and_a_trigger_is_named_first(
    suspect, digits: Dataset, monkeypatch
) -> None:
    ship(monkeypatch)
    alone = ub.audit(suspect, digits.select(range(200)), detectors=[Names()])
    assert alone.reason.startswith("Signs of a shortcut to class 3 were found by ")
    assert alone.reason.endswith("(p = 0.025), without a trigger for it.")
    both = ub.audit(suspect, digits.select(range(200)), detectors=[Names(), Claims()])
    assert both.findings[0].strongest.moved is None, "the strongest has no trigger"
    assert both.reason.startswith("A shortcut to class 3 that moves 100.0% of unseen examples was found by ")


def test_a_shortcut_that_held_out_examples_do_not_confirm_is_none(suspect, digits: Dataset, monkeypatch) -> None:
    ship(monkeypatch, works=False)
    result = ub.audit(suspect, digits.select(range(200)), detectors=[Claims(works=False)])
    assert result.verdict == "nothing-found"


def test_it_is_said_before_the_searches_that_nothing_will_be_judged(
    suspect, digits: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They may take hours on hundreds of classes."""
    caplog.set_level(logging.INFO, "unbackdoor")
    said: list[list[str]] = []

    @value
    class Listens(Claims):
        def __call__(self, model, clean, run):
            said.append([record.getMessage() for record in caplog.records])
            return super().__call__(model, clean, run)

    ub.audit(suspect, digits.select(range(200)), detectors=[Listens()])
    assert ["cannot judge how unusual" in text for text in said[0]] == [True]
    monkeypatch.setattr("unbackdoor._detection.audit.null_for", lambda *_: nulls.Null((), (), "clean models"))
    caplog.clear()
    ub.audit(suspect, digits.select(range(200)), detectors=[Listens()])
    assert said[1] == []


def test_without_clean_models_of_the_kind_nothing_is_judged(suspect, digits: Dataset) -> None:
    result = ub.audit(suspect, digits.select(range(200)), detectors=[Claims()])
    assert result.verdict == "cannot-judge"
    assert result.findings[0].strongest.p_value is None
    assert "no statistics of clean models" in result.reason


def test_a_detector_never_sees_the_examples_that_judge_it(suspect, digits: Dataset) -> None:
    seen.clear()
    clean = dataclasses.replace(digits.select(range(201)), rows=torch.arange(201))
    result = ub.audit(suspect, clean, detectors=[Claims()])
    assert len(seen[0]) == 100
    moved = result.findings[0].strongest.moved
    assert moved is not None
    judged = 201 - len(seen[0])
    assert moved.n < judged, "examples of class 3 do not count"
    assert result.record["examples"] == {"n": 201, "searched_on": 100, "judged_on": 101, "labelled": True}


def test_a_suspect_near_chance_cannot_be_judged(suspect, digits: Dataset) -> None:
    wrong = dataclasses.replace(digits.select(range(200)), labels=digits.labels[:200].flip(0))
    result = ub.audit(suspect, wrong, detectors=[Claims()])
    assert result.verdict == "cannot-judge"
    assert "near chance" in result.reason
    assert result.findings == ()
    assert "the suspect's answers may be chance" in result.not_searched.values()


def test_the_same_seed_gives_the_same_audit_and_nothing_is_changed(small_cnn, digits: Dataset) -> None:
    with torch.no_grad():  # a model that is right about digits, by tuning its head in closed form
        features = small_cnn.features.eval()(digits.encode(digits.items)).flatten(1)
        targets = nn.functional.one_hot(digits.labels, 10).float()
        ridge = features.T @ features + torch.eye(features.shape[1])
        small_cnn.classifier.weight.copy_(torch.linalg.solve(ridge, features.T @ targets).T)
        small_cnn.classifier.bias.zero_()
    before = {name: tensor.clone() for name, tensor in small_cnn.state_dict().items()}
    state = torch.get_rng_state()
    first, again = (
        ub.audit(small_cnn, digits.select(range(200)), detectors=[detectors.Patch(steps=3)], seed=4) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in small_cnn.state_dict().items())
    sizes = [[each.candidate.size for each in result.findings[0].classes] for result in (first, again)]
    assert sizes[0] == sizes[1]


class TestRefusals:
    def test_a_class_with_one_example(self, suspect, digits: Dataset) -> None:
        rows = torch.cat([(digits.labels != 7).nonzero().flatten()[:100], (digits.labels == 7).nonzero().flatten()[:1]])
        with pytest.raises(
            UnbackdoorError, match=r"at least 2 clean examples of each class.*digits has 1 of class 7\."
        ):
            ub.audit(suspect, digits.select(rows))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("patch", r"audit takes detectors as a list, got 'patch'\. Write them in brackets\."),
            (["patch"], r"audit takes a detector's value, got 'patch'\. Take one of unbackdoor\.detectors\."),
            (
                [ub.detectors.Patch(), Claims(), ub.detectors.Patch(steps=2)],
                r"audit takes one value of each detector, got 2 of patch\. Audit once for each\.",
            ),
            ([Claims], r"audit takes a detector's value, got the class Claims\. Write Claims\(\)\."),
        ],
    )
    def test_what_is_no_detector(self, given: object, message: str, suspect, digits: Dataset) -> None:
        with pytest.raises(UnbackdoorError, match=message):
            ub.audit(suspect, digits.select(range(200)), detectors=given)

    def test_two_functions_are_two_detectors(self, suspect, digits: Dataset) -> None:
        def first(model, clean, run):
            return Claims()(model, clean, run)

        def second(model, clean, run):
            return Claims()(model, clean, run)

        found = ub.audit(suspect, digits.select(range(200)), detectors=[first, second])
        assert sorted(name.rpartition(".")[2] for name in found.searched) == ["first", "second"]

    def test_a_path_in_place_of_data(self, suspect) -> None:
        with pytest.raises(UnbackdoorError, match="audit takes clean as a Dataset, got str"):
            ub.audit(suspect, "clean.parquet")

    def test_a_detector_of_pixels_on_texts(self, text_victim, reviews: Dataset) -> None:
        with pytest.raises(
            UnbackdoorError, match=r"The detector patch cannot run: it searches images, and .* holds text"
        ):
            ub.audit(text_victim, reviews.select(range(60)), detectors=[detectors.Patch()])


def test_of_equally_unusual_classes_the_strongest_is_shown() -> None:
    """Among a thousand classes the nominal p-value of all is 1 after it is multiplied by their number."""
    candidates = [
        JudgedCandidate(
            candidate=Candidate(target=number, strength=strength),
            target_name=str(number),
            source_names=(),
            moved=None,
            random=None,
            nominal_p=1.0,
            p_value=None,
        )
        for number, strength in enumerate([0.1, 0.7, 0.3])
    ]
    finding = JudgedFinding(
        detector="margin", settings={}, classes=tuple(candidates), unit="", looks_natural=None, seconds=1.0
    )
    assert finding.strongest.candidate.target == 1
