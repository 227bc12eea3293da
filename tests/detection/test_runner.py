"""The runner of an audit: which examples and detectors it takes, and what it refuses."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from fixtures import SmallCNN
from pictures import write_pictures
from unbackdoor import Dataset, UnbackdoorError, audit, detectors

QUICK = detectors.Patch(steps=2, batch_size=16)


def shown(data: Dataset, rows: Sequence[int]) -> Dataset:
    """Some of the examples without their labels."""
    return replace(data.select(rows), labels=torch.full((len(rows),), -1))


class TestWithoutLabels:
    def test_the_answers_of_the_suspect_stand_for_the_classes(self, backdoored: tuple, digits: Dataset) -> None:
        rows = range(1400, 1480)
        found = audit(backdoored[0], detectors=[QUICK], unlabelled=shown(digits, rows))
        assert found.record["examples"] == {"n": 80, "searched_on": 40, "judged_on": 40, "labelled": False}
        assert found.record["suspect_accuracy_on_clean"] is None
        assert found.record["unlabelled"] == 80
        assert "Without labels nothing says how well the model does its task" in found.record["notes"][0]
        with torch.no_grad():
            answers = backdoored[0](digits.encode(digits.pixels[list(rows)])).argmax(dim=1)
        held_out = found.held_out
        assert torch.equal(held_out.data.labels, answers[held_out.data.rows - 1400])
        for judged in found.findings[0].classes:
            assert judged.moved.n == int((held_out.data.labels != judged.candidate.target).sum())

    def test_a_detector_that_needs_labels_does_not_run(
        self, backdoored: tuple, digits: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from unbackdoor._detection import audit as runner
        from unbackdoor._registry.entries import Entry, Need

        entry = Entry("patch", "unbackdoor.detectors.patch:Patch", "", needs=(Need.CLEAN,))
        monkeypatch.setattr(runner, "REGISTRY", (entry,))
        found = audit(backdoored[0], unlabelled=shown(digits, range(1400, 1440)))
        reason = "it needs `clean`, labelled examples, and only unlabelled ones were given"
        assert (found.verdict, found.searched, found.not_searched) == ("cannot-judge", (), {"patch": reason})
        with pytest.raises(UnbackdoorError) as refusal:
            audit(backdoored[0], detectors=[QUICK], unlabelled=shown(digits, range(1400, 1440)))
        assert str(refusal.value) == f"The detector patch cannot run: {reason}. Leave it out."

    def test_a_detector_that_was_asked_for_and_refuses_takes_no_other_one_with_it(
        self, backdoored: tuple, digits: Dataset
    ) -> None:
        """Hours of another search would be lost; but without it nothing is judged to be free of shortcuts."""
        from unbackdoor._detection import audit as runner

        class Refusing:
            def __call__(self, model, clean, run):
                raise UnbackdoorError("It needs what is not there. Leave it out.")

        clean = digits.select(range(1400, 1440))
        found = audit(backdoored[0], clean, detectors=[QUICK, Refusing()])
        alone = audit(backdoored[0], clean, detectors=[QUICK])
        assert found.searched == alone.searched == ("patch",)
        assert found.findings[0].strongest.p_value == alone.findings[0].strongest.p_value
        (name,) = set(found.not_searched) - set(alone.not_searched)
        assert found.not_searched[name] == "It needs what is not there. Leave it out."
        clean_models = object()
        quiet = runner._verdict(list(found.findings), clean_models, 10, [])
        assert quiet[0] == "nothing-found"
        gate = runner._verdict(list(found.findings), clean_models, 10, [name])
        assert gate == ("cannot-judge", f"{quiet[1]} But {name} could not search, and was asked to.")
        with pytest.raises(UnbackdoorError, match=r"^It needs what is not there\."):
            audit(backdoored[0], clean, detectors=[Refusing()])

    @pytest.mark.parametrize(
        "problem",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"),
            MemoryError(),
        ],
    )
    def test_a_detector_without_enough_memory_takes_no_other_one_with_it(
        self, problem: Exception, backdoored: tuple, digits: Dataset
    ) -> None:
        class Large:
            def __call__(self, model, clean, run):
                raise problem

        class Faulty:
            def __call__(self, model, clean, run):
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        clean = digits.select(range(1400, 1440))
        found = audit(backdoored[0], clean, detectors=[QUICK, Large()])
        assert found.searched == ("patch",)
        (reason,) = (why for why in found.not_searched.values() if "memory" in why)
        assert reason == "it ran out of memory; take a smaller `image_size`, or another `device`"
        with pytest.raises(type(problem)):  # nothing else is lost, and the command has its own sentence
            audit(backdoored[0], clean, detectors=[Large()])
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            audit(backdoored[0], clean, detectors=[QUICK, Faulty()])

    def test_next_to_clean_examples_they_are_for_detectors_that_take_more(
        self, backdoored: tuple, digits: Dataset
    ) -> None:
        seen = []

        class Counting:
            def __call__(self, model, clean, run):
                seen.append((len(clean), len(run.unlabelled), int(run.unlabelled.labels.max())))
                return QUICK(model, clean, run)

        audit(
            backdoored[0],
            digits.select(range(1400, 1440)),
            detectors=[Counting()],
            unlabelled=shown(digits, range(1440, 1500)),
        )
        assert seen == [(20, 60, -1)]

    def test_those_that_are_clean_ones_as_well_are_left_out(self, backdoored: tuple, digits: Dataset) -> None:
        """A detector would search on the examples that judge what it found."""
        seen = []

        class Counting:
            def __call__(self, model, clean, run):
                seen.append(run.unlabelled.rows.tolist())
                return QUICK(model, clean, run)

        clean = digits.select(range(1400, 1440))
        audit(backdoored[0], clean, detectors=[Counting()], unlabelled=shown(digits, range(1430, 1450)))
        assert seen == [list(range(1440, 1450))]

    def test_a_model_that_takes_all_for_one_class(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        with torch.no_grad():
            small_cnn.classifier.bias[7] += 1e6
        with pytest.raises(UnbackdoorError) as refusal:
            audit(small_cnn, unlabelled=shown(digits, range(40)))
        assert str(refusal.value) == (
            "audit needs examples of several classes, but the model takes all of digits for 7. Give other examples, or "
            "look at the preprocessing."
        )


def test_progress_says_which_detector_of_how_many_it_is(
    backdoored: tuple, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unbackdoor._detection import audit as runner

    said: list[str] = []

    def bar(description: str, steps: int):
        said.append(description)
        return nullcontext(lambda: None)

    monkeypatch.setattr(runner, "bar", bar)
    audit(
        backdoored[0],
        digits.select(range(1400, 1440)),
        detectors=[QUICK, detectors.Noise(steps=1, examples=2)],
        progress=True,
    )
    assert said == [
        "patch (1 of 2): inverting triggers",
        "noise (2 of 2): searching noise",
        "judging patch",
        "judging noise",
    ]


class TestEqualExamples:
    """Of a picture that was given twice, one copy was searched on and the other judged what was found as unseen."""

    @pytest.mark.parametrize("labelled", [True, False])
    def test_they_are_used_once(self, labelled: bool, backdoored: tuple, digits: Dataset) -> None:
        rows = torch.arange(1400, 1460)
        given = digits.select(rows.repeat(5)) if labelled else shown(digits, rows.repeat(5).tolist())
        kind = {"clean": given} if labelled else {"unlabelled": given}
        found = audit(backdoored[0], detectors=[QUICK], **kind)
        assert found.record["examples"] == {"n": 60, "searched_on": 30, "judged_on": 30, "labelled": labelled}
        assert "240 of the 300 rows of digits have the picture of an earlier one" in found.record["notes"][0]
        once = audit(backdoored[0], detectors=[QUICK], **{next(iter(kind)): given.select(range(60))})
        assert [each.strongest.moved for each in found.findings] == [each.strongest.moved for each in once.findings]

    def test_a_class_needs_two_that_differ(self, backdoored: tuple, digits: Dataset) -> None:
        four = (digits.labels == 4).nonzero().flatten()
        others = (digits.labels != 4).nonzero().flatten()[:90]
        with pytest.raises(
            UnbackdoorError, match=r"at least 2 clean examples of each class.* digits has 1 of class 4\."
        ):
            audit(backdoored[0], digits.select(torch.cat([others, four[:1].repeat(6)])), detectors=[QUICK])


class TestReadingWithoutLabels:
    def test_a_table_without_a_label_column(self, digits: Dataset, tmp_path: Path) -> None:
        path = write_pictures(digits.select(range(6)), tmp_path / "pictures.parquet")
        bare = Dataset.load(path, digits.encode, columns={"label": "absent"}, labelled=False)
        assert torch.equal(bare.pixels, digits.pixels[:6])
        assert bare.labels.tolist() == [-1] * 6

    def test_texts(self, tmp_path: Path) -> None:
        (tmp_path / "texts.csv").write_text("text\na film\na plot\n")
        bare = Dataset.load(tmp_path / "texts.csv", toys.reviews(1).encode, classes=("bad", "good"), labelled=False)
        assert bare.texts.strings == (("a film",), ("a plot",))
        assert (bare.labels.tolist(), bare.classes) == ([-1, -1], ("bad", "good"))

    def test_pictures_of_a_folder_at_any_depth(self, digits: Dataset, tmp_path: Path) -> None:
        from PIL import Image

        for place, row in (("a.png", 0), ("one/b.png", 1), ("one/two/c.png", 2)):
            (tmp_path / place).parent.mkdir(exist_ok=True)
            Image.fromarray(digits.pixels[row, 0].numpy()).save(tmp_path / place)
        bare = Dataset.load(tmp_path, digits.encode, labelled=False)
        assert torch.equal(bare.pixels, digits.pixels[:3])

    def test_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / "texts.csv").write_text("text\n")
        with pytest.raises(UnbackdoorError, match="has no rows; at least one example is needed"):
            Dataset.load(tmp_path / "texts.csv", toys.reviews(1).encode, labelled=False)


class TestBadInput:
    def test_no_examples_at_all(self, backdoored: tuple) -> None:
        with pytest.raises(UnbackdoorError) as refusal:
            audit(backdoored[0])
        expected = "audit needs `clean`, labelled examples without a trigger, or at least `unlabelled` ones."
        assert str(refusal.value) == expected

    def test_a_path_instead_of_examples(self, backdoored: tuple) -> None:
        with pytest.raises(UnbackdoorError, match="audit takes unlabelled as a Dataset, got str"):
            audit(backdoored[0], unlabelled="x.parquet")

    def test_too_few_examples_of_a_class(self, backdoored: tuple, digits: Dataset) -> None:
        rows = [row for row in range(100) if digits.labels[row] != 4]
        four = (digits.labels == 4).nonzero().flatten().tolist()
        for count in (0, 1):
            with pytest.raises(UnbackdoorError) as refusal:
                audit(backdoored[0], digits.select([*rows, *four[:count]]), detectors=[QUICK])
            assert str(refusal.value) == (
                "audit needs at least 2 clean examples of each class, one to search on and one to judge on, but digits "
                f"has {count} of class 4. Add clean examples."
            )

    def test_a_suspect_near_chance_is_not_judged(self, small_cnn: SmallCNN, digits: Dataset) -> None:
        found = audit(small_cnn, digits.select(range(60)))
        assert (found.verdict, found.findings) == ("cannot-judge", ())
        assert found.reason.startswith("The suspect is near chance on digits (")
        assert found.not_searched["patch"] == "the suspect's answers may be chance"
        assert (found.calibrated_on, found.to_json()["operating_point_note"]) == ("nothing was searched",) * 2

    def test_a_base_of_another_kind(self, backdoored: tuple, digits: Dataset) -> None:
        with pytest.raises(UnbackdoorError, match="Take the pre-trained model that it came from as `base`"):
            audit(backdoored[0], digits.select(range(60)), base=nn.Sequential(nn.Conv2d(1, 8, 3), nn.Linear(8, 2)))
        same = copy.deepcopy(backdoored[0])
        assert audit(backdoored[0], digits.select(range(1400, 1440)), base=same, detectors=[QUICK]).findings
