"""Auto: which method it keeps, by trials whose numbers are given, and on a network with a known backdoor."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import toys
from fixtures import SmallCNN
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._artifacts.card import purified
from unbackdoor._artifacts.record import ChoiceEntry
from unbackdoor._detection.finding import Candidate
from unbackdoor._detection.judging import ExactShare
from unbackdoor._detection.nulls import Null
from unbackdoor._detection.result import Audit, JudgedCandidate, JudgedFinding
from unbackdoor._purification.run import Run
from unbackdoor._reports.page import facts_of
from unbackdoor._value import value
from unbackdoor.purifiers import auto
from unbackdoor.purifiers._choice import choice
from unbackdoor.purifiers._methods_to_try import LONGER, method_label, methods_to_try
from unbackdoor.purifiers._shortcuts import Shortcut, counting
from unbackdoor.purifiers._trial import Trial


def judged(moved: int = 48, random: int = 2, nominal_p: float = 0.01, p_value: float | None = None) -> JudgedCandidate:
    """A shortcut to class 1; shares are of 50 examples."""
    return JudgedCandidate(
        candidate=Candidate(target=1, strength=1.0),
        target_name="one",
        source_names=(),
        moved=ExactShare(moved, 50),
        random=ExactShare(random, 50),
        nominal_p=nominal_p,
        p_value=p_value,
    )


def an_audit(*candidates: JudgedCandidate, looks_natural: bool | None = None) -> Audit:
    finding = JudgedFinding(
        detector="patch", settings={}, classes=candidates, unit="pixels", looks_natural=looks_natural, seconds=1.0
    )
    return Audit(verdict="cannot-judge", reason="No null.", findings=(finding,))


class TestShortcutsThatCount:
    """Without clean models to compare with, each condition on its own decides."""

    def test_one_that_stands_out(self) -> None:
        (one,) = counting(an_audit(judged(), judged(nominal_p=1.0)))
        assert one.sentence == "patch found one to class one, which moves 96% of unseen examples"

    @pytest.mark.parametrize(
        "other",
        [judged(moved=20), judged(nominal_p=0.06), judged(random=45)],
        ids=["it moves too few", "classes differ as much", "a random one moves as many"],
    )
    def test_one_that_does_not(self, other: JudgedCandidate) -> None:
        assert counting(an_audit(other)) == []

    def test_one_that_looks_natural(self) -> None:
        assert counting(an_audit(judged(), looks_natural=True)) == []

    def test_next_to_clean_models_only_an_alarm_counts(self) -> None:
        """A detector that they did not go through has no p-value, and its classes say little."""
        null = Null((), ("patch",), "clean models")
        assert counting(replace(an_audit(judged()), calibration=null)) == []
        assert len(counting(replace(an_audit(judged(p_value=0.05)), calibration=null))) == 1
        assert counting(replace(an_audit(judged(p_value=0.06)), calibration=null)) == []

    def test_an_audit_that_was_not_possible(self) -> None:
        assert counting("audit needs more examples") == []


def trial(method: object, lost: float, left: int | None = None) -> Trial:
    """A trial with a loss, and a shortcut that moves `left` of 50 examples, of which a random trigger moves 2."""
    remains = () if left is None else ((Shortcut("patch", judged()), ExactShare(left, 50), ExactShare(2, 50)),)
    return Trial(method=method, model=nn.Linear(1, 1), lost=lost, left=remains)


class TestTheAuditOfAResult:
    @pytest.mark.parametrize(
        ("found", "known", "left"),
        [
            (judged(moved=40, random=2), {1}, 0.76),
            (judged(moved=40, random=2), {0}, 0.0),
            (judged(moved=40, random=2, p_value=0.02), {0}, 0.0),
            (judged(moved=10, random=2), {1}, 0.0),
        ],
        ids=["to a known class", "to another", "to another, with an alarm", "it moves too few"],
    )
    def test_what_counts(self, found: JudgedCandidate, known: set[int], left: float) -> None:
        result = replace(trial(TUNE, 0.01, 3), audit=an_audit(found), known=frozenset(known))
        assert result.most_left == pytest.approx(max(left, 1 / 50))
        assert ("its audit found a shortcut again: patch found one to class one" in result.sentence(50)) == (left > 0)

    def test_a_sign_without_a_trigger_counts_in_full(self) -> None:
        found = replace(judged(p_value=0.02), moved=None, random=None)
        assert replace(trial(TUNE, 0.01, 3), audit=an_audit(found), known=frozenset({1})).most_left == 1

    def test_a_method_whose_result_has_it_again_does_not_pass(
        self, small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The audits are given: of the suspect, of the first result, of the second."""
        audits = iter([an_audit(judged()), an_audit(judged()), an_audit(judged(moved=10))])
        monkeypatch.setattr(auto, "audited", lambda *_: next(audits))
        tune = purifiers.FineTuning(epochs=1)
        monkeypatch.setattr(auto, "methods_to_try", lambda *_: [tune, replace(tune, epochs=2), tune])
        result = purify(small_cnn, digits.select(range(60)), purifiers.Auto(max_loss=100), seed=0, device="cpu")
        choice = ChoiceEntry.model_validate(result.record["choice"])
        assert [each.method.model_dump()["parameters"]["epochs"] for each in choice.tried] == [1, 2]
        assert [len(each.audit.shortcuts) for each in choice.tried if each.audit] == [1, 0]
        assert (choice.kept, choice.kept_number, choice.passed) == ("fine-tuning (epochs=2)", 1, True)
        assert result.record["usable"] is True
        older = {key: entry for key, entry in result.record["choice"].items() if key != "kept_number"}
        assert ChoiceEntry.model_validate({**older, "kept": "fine-tuning"}).kept_number is None
        assert (
            dict(facts_of({"method": {"repr": "Auto()"}, "choice": older}, 1, None))["Kept"] == "fine-tuning (epochs=2)"
        )
        assert choice.audit_of_the_result is not None
        assert choice.audit_of_the_result.shortcuts == []
        assert ["its audit found a shortcut again" in note for note in result.record["notes"]].count(True) == 1


def test_a_result_that_keeps_the_shortcuts_is_not_usable(
    small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each audit finds the same shortcut: the best result is kept, but no program may take it for purified."""
    monkeypatch.setattr(auto, "audited", lambda *_: an_audit(judged()))
    monkeypatch.setattr(auto, "methods_to_try", lambda *_: [purifiers.FineTuning(epochs=1)])
    clean = digits.select(range(60))
    record = purify(small_cnn, clean, purifiers.Auto(max_loss=100), seed=0, device="cpu").record
    assert (record["choice"]["kept"], record["choice"]["passed"]) == ("fine-tuning (epochs=1)", False)
    assert record["usable"] is False
    assert record["warnings"][0].startswith("The result did not pass its tests: no method that lost at most 100 points")
    card = purified({**record, "source": {"model": "net"}, "scores": None, "scores_note": "not measured"})
    assert "# Model that did not pass its tests" in card
    assert card.count("The result did not pass its tests") == 1
    both = purifiers.Then(purifiers.Auto(max_loss=100), purifiers.FineTuning(epochs=1))
    assert purify(small_cnn, clean, both, seed=0, device="cpu").record["usable"] is True


CONTRAST, SHIFT, TUNE = purifiers.ContrastiveUnlearning(), purifiers.ScaleInvariantFST(), purifiers.FineTuning()


@pytest.mark.parametrize(
    ("trials", "kept", "warning"),
    [
        ([trial(CONTRAST, 0.01, 3)], CONTRAST, None),
        ([trial(CONTRAST, 0.01, 40), trial(SHIFT, 0.08, 4)], SHIFT, None),
        ([trial(CONTRAST, 0.01, 20), trial(SHIFT, 0.2, 2), trial(TUNE, 0.0, 45)], CONTRAST, "still moves 36% more"),
        (
            [replace(trial(SHIFT, 0.01, 3), audit=an_audit(judged()), known=frozenset({1})), trial(TUNE, 0.2)],
            SHIFT,
            "The result did not pass its tests: no method that lost at most 10 points of accuracy removed the "
            "shortcuts; scale-invariant-fst left the least of them: an audit of its result found one again. Do not "
            "take it for purified. Give more clean examples, raise `max_loss`, or try another method.",
        ),
        ([trial(SHIFT, 0.2), trial(TUNE, 0.1)], TUNE, "leaves most backdoors that the audit cannot see"),
        ([trial(SHIFT, 0.05)], SHIFT, None),
        (
            [trial(SHIFT, 0.2), trial(CONTRAST, 0.1)],
            CONTRAST,
            "no trigger of the audit to test it with, and what it does not find may stay",
        ),
        (
            [trial(SHIFT, 0.2), trial(TUNE, 0.12), replace(trial(CONTRAST, 0.11), lost_a_class=True)],
            None,
            "Nothing was purified: no method lost at most 10 points of accuracy on 50 held-out examples, so the "
            "suspect is handed back as it was, with any backdoor that it has. Give more clean examples, or raise "
            "`max_loss`: fine-tuning lost least, 12.0 points.",
        ),
        (
            [replace(trial(SHIFT, 0.05), lost_a_class=True)],
            None,
            "the suspect is handed back as it was, with any backdoor that it has. Give more clean examples, or raise "
            "`max_loss`.",
        ),
    ],
    ids=[
        "the first",
        "the shortcut stayed",
        "it stayed in all",
        "it came back",
        "only tuning is cheap enough",
        "nothing to test the shift with",
        "nothing to test a search with",
        "all are too dear",
        "it lost a class",
    ],
)
def test_the_method_that_is_kept(trials: list[Trial], kept: object, warning: str | None) -> None:
    run = toys.a_run()
    chosen, reason = choice(trials, 50, 10, run)
    assert (None if chosen is None else chosen.method) == kept
    assert reason
    said = [*run.warnings, *([] if run.failure is None else [run.failure])]
    assert len(said) == (warning is not None)
    assert warning is None or warning in said[0]
    stayed = chosen is not None and chosen.most_left > 0.1
    assert (run.failure is not None) == (kept is None or stayed)


@pytest.mark.parametrize(("shortcut", "place"), [(True, 0), (False, 2)])
def test_evidence_is_unlearned_first_and_last_where_there_is_none(shortcut: bool, place: int, digits: Dataset) -> None:
    names = [method_label(each) for each in methods_to_try(digits, shortcut, toys.a_run())]
    assert names.index("adaptive-unlearning") == place
    assert [each for each in names if each != "adaptive-unlearning"] == [
        "scale-invariant-fst",
        f"scale-invariant-fst (epochs={LONGER})",
        "fine-tuning",
    ]


@pytest.mark.thorough
def test_without_a_shortcut_it_is_scale_invariant_fst_on_four_fifths(small_cnn: SmallCNN, digits: Dataset) -> None:
    clean = digits.select(range(100))
    result = purify(
        small_cnn, clean, purifiers.Auto(max_loss=100, detectors=()), seed=3, device="cpu", precision="fp32"
    )
    run = toys.a_run(seed=3, model=small_cnn)
    tuned, _ = run.hold_out(clean)
    expected = run.arithmetic.place(copy.deepcopy(small_cnn))
    shift = purifiers.ScaleInvariantFST(strength=1)
    expected = shift(expected, tuned, run)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name
    choice = ChoiceEntry.model_validate(result.record["choice"])
    assert (choice.kept, choice.kept_number, choice.not_tried, choice.held_out) == (
        "scale-invariant-fst",
        0,
        [f"scale-invariant-fst (epochs={LONGER})", "adaptive-unlearning", "fine-tuning"],
        20,
    )
    assert choice.audit.reason.startswith("The suspect is near chance on digits")
    assert choice.passed is None
    assert result.record["notes"][0].startswith("audit of the suspect: The suspect is near chance on digits")
    assert result.record["clean"]["held_out"] == 20


def test_a_suspect_that_cannot_be_audited_is_purified_with_a_warning(small_cnn: SmallCNN, digits: Dataset) -> None:
    """A class without clean examples: no shortcut is searched, so none tests the result."""
    clean = digits.select(range(100))
    record = purify(
        small_cnn, clean.select(clean.labels != 4), purifiers.Auto(max_loss=100, detectors=("margin",)), device="cpu"
    ).record
    assert [each for each in record["warnings"] if "audited" in each] == [
        "neither the suspect nor a result can be audited, so nothing shows what stayed: audit needs at least 2 clean "
        "examples of each class, one to search on and one to judge on, but digits has 0 of class 4. Add clean examples."
    ]
    assert record["choice"]["audit"]["verdict"] == "cannot-judge"


def test_a_detector_for_other_data_is_refused(small_cnn: SmallCNN, digits: Dataset) -> None:
    message = r"^Auto\.detectors must serve images, got lone-word, which serves text\. See unbackdoor list detectors\.$"
    with pytest.raises(UnbackdoorError, match=message):
        purify(small_cnn, digits.select(range(100)), purifiers.Auto(detectors=("patch", "lone-word")), device="cpu")


@value
class Silence:
    """A method that ruins every model: it answers the same for all examples."""

    def __call__(self, model: nn.Module, clean: Dataset, run: object) -> nn.Module:
        nn.init.zeros_(model.classifier.weight)
        return model


def test_the_suspect_comes_back_if_every_method_ruins_it(
    backdoored: tuple, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backdoored[0]
    monkeypatch.setattr(auto, "methods_to_try", lambda *_: [Silence(), Silence()])
    result = purify(model, digits.select(range(100)), purifiers.Auto(detectors=()), seed=0, device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name
    choice = ChoiceEntry.model_validate(result.record["choice"])
    assert (len(choice.tried), choice.kept, choice.kept_number, choice.audit_of_the_result) == (2, None, None, None)
    assert choice.passed is False
    assert min(each.lost or 0 for each in choice.tried) > 0.5
    assert result.record["warnings"] == [
        "Nothing was purified: no method lost at most 10 points of accuracy on 20 held-out examples, so the suspect is "
        "handed back as it was, with any backdoor that it has. Give more clean examples, or raise `max_loss`: "
        "test_auto:Silence lost least, 90.0 points."
    ]
    assert result.record["usable"] is False
    card = purified({**result.record, "source": {"model": "net"}, "scores": None, "scores_note": "not measured"})
    assert "# Model that was handed back as it was" in card
    assert "`net` was not changed by `Auto(" in card
    assert (
        "Methods tried: 2. Kept: none of them. Why this result: no method lost at most 10 points of accuracy on 20 "
        "held-out examples." in card
    )
    assert "A backdoor that the suspect has is still there." in card
    assert "purification" not in card


def test_a_suspect_that_comes_back_between_two_methods_is_a_warning(
    backdoored: tuple, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other method purified it, so the result is not the suspect."""
    monkeypatch.setattr(auto, "methods_to_try", lambda *_: [Silence()])
    methods = purifiers.Then(purifiers.Auto(detectors=()), purifiers.FineTuning(epochs=1))
    record = purify(backdoored[0], digits.select(range(100)), methods, seed=0, device="cpu").record
    assert record["usable"] is True
    assert "Nothing was purified: no method lost" in record["warnings"][0]
    card = purified({**record, "source": {"model": "net"}, "scores": None, "scores_note": "not measured"})
    assert "# Purified model" in card


def test_a_method_that_refuses_is_passed_over(
    small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        auto, "methods_to_try", lambda *_: [purifiers.WordDistillation(), purifiers.FineTuning(epochs=1)]
    )
    method = purifiers.Auto(max_loss=100, detectors=())
    choice = purify(small_cnn, digits.select(range(60)), method, device="cpu").record["choice"]
    assert choice["tried"][0]["refused"] == (
        "WordDistillation searches words of texts, but the data holds images. Try fine-tuning."
    )
    assert (choice["kept"], choice["kept_number"]) == ("fine-tuning (epochs=1)", 1)


@value
class TooLarge:
    """Needs more memory than there is."""

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes.")


def test_a_method_that_runs_out_of_memory_takes_no_work_of_others_with_it(
    small_cnn: SmallCNN, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "methods_to_try", lambda *_: [TooLarge(), purifiers.FineTuning(epochs=1)])
    method = purifiers.Auto(max_loss=100, detectors=())
    record = purify(small_cnn, digits.select(range(60)), method, device="cpu").record
    assert record["choice"]["tried"][0]["refused"] == "it ran out of memory"
    assert record["choice"]["kept"] == "fine-tuning (epochs=1)"
    # What is said of a method that Auto runs names no option, as `purify auto` has none of that method.
    note = next(note for note in record["notes"] if "batches of the usual size" in note)
    assert note.startswith("fine-tuning: batches of the usual size make few steps: 48 examples in batches of 128")
    assert note.endswith("Try batch_size=8 as well.")
    monkeypatch.setattr(auto, "methods_to_try", lambda *_: [TooLarge()])
    record = purify(small_cnn, digits.select(range(60)), method, device="cpu").record
    assert record["usable"] is False
    assert "no method could run; " in record["warnings"][0]
    assert record["warnings"][0].endswith(
        "says: it ran out of memory, so the suspect is handed back as it was, with "
        "any backdoor that it has. Take smaller inputs or another `device`."
    )


def test_an_unknown_detector_is_refused(small_cnn: SmallCNN, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError, match=r"^There is no detector 'patsh'\. Did you mean 'patch'\?"):
        purify(small_cnn, digits.select(range(60)), purifiers.Auto(detectors=("patsh",)))
