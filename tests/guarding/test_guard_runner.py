"""The runner of guards: thresholds, identity, decisions, models and pipelines behind a guard, and its numbers."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sights
import toys
import unbackdoor as ub
from unbackdoor import Dataset, UnbackdoorError, evaluate_guard, fit_guard, guards, load_guard
from unbackdoor._artifacts.guard_record import GuardRecord
from unbackdoor._data.texts import Texts
from unbackdoor._guarding import identity as identity_module
from unbackdoor._guarding.area import Area
from unbackdoor._guarding.deciding import class_scores
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.guard import Edited, Scored
from unbackdoor._guarding.identity import model_hash
from unbackdoor._guarding.threshold import alarms, needed, threshold_of
from unbackdoor._value import value
from unbackdoor.guards._words import texts_like


@value
class Dullness:
    """Takes the word `cf` out of texts that have it; its score is how often they do."""

    measure: ClassVar[str] = "the number of cf"
    suspicious: ClassVar[str] = "high"

    def __call__(self, model: nn.Module, clean: Dataset, run) -> dict:
        return {}

    def scores(self, model: nn.Module, inputs: Dataset, learnt, run) -> Scored:
        counts = [strings[0].split().count("cf") for strings in inputs.texts.strings]
        return Scored(torch.tensor(counts, dtype=torch.float64))

    def edited(self, inputs: Dataset, learnt, threshold: float, run) -> Edited:
        left = [(" ".join(word for word in strings[0].split() if word != "cf"),) for strings in inputs.texts.strings]
        return Edited(texts_like(inputs, left).items, ["cf was left out"] * len(left))


@value
class Everything(Dullness):
    """Changes every input."""

    suspicious: ClassVar[str] = "all"


@value
class Bounded(Dullness):
    """Has a threshold of its own."""

    bound: float = 1.0


@pytest.fixture(scope="module")
def pictured(backdoored: tuple, digits: Dataset) -> FittedGuard:
    """STRIP in front of the backdoored classifier of digits."""
    return fit_guard(backdoored[0], digits.select(range(1000, 1200)), guards.Strip(), false_alarms=0.1, device="cpu")


@pytest.fixture(scope="module")
def counting() -> nn.Module:
    """A classifier of texts by their words."""
    return toys.Counting({"cf": 9.0, **dict.fromkeys(toys.GOOD, 3.0), **dict.fromkeys(toys.BAD, -3.0)})


@pytest.fixture(scope="module")
def edited(counting: nn.Module, reviews: Dataset) -> FittedGuard:
    """A guard that changes texts, in front of that classifier."""
    return fit_guard(counting, reviews.select(range(40)), Dullness(), false_alarms=0.1, device="cpu")


@value
class Reading(Dullness):
    """Its score is what the model answers to class 0."""

    def scores(self, model: nn.Module, inputs: Dataset, learnt, run) -> Scored:
        answers = class_scores(model, inputs, run)
        return Scored(answers[:, 0], answers)


class TestAnswersThatAreNotFinite:
    """Half precision may overflow on single inputs, of which the others of a batch or of a file know nothing."""

    @pytest.fixture
    def overflowing(self) -> nn.Module:
        """A classifier of texts that answers NaN to those with `tq`."""
        return toys.Counting({"tq": math.inf, "cf": 9.0, **dict.fromkeys(toys.GOOD, 3.0)}).eval()

    @pytest.fixture
    def reading(self, counting: nn.Module, reviews: Dataset) -> FittedGuard:
        return fit_guard(counting, reviews.select(range(40)), Reading(), false_alarms=0.1, device="cpu")

    def test_such_an_input_alone_is_rejected(self, reading: FittedGuard, overflowing: nn.Module) -> None:
        fitted = replace(reading, identity=replace(reading.identity, model=model_hash(overflowing)))
        first, second, third = fitted.wrap(overflowing, device="cpu")(["a good film", "a tq film", "the dull plot"])
        assert (second.answer, second.decision.action, second.decision.score) == (None, "reject", None)
        assert second.decision.reason == (
            "the score is not finite, as the model's answer probably is not, so nothing can be judged"
        )
        assert {first.decision.action, third.decision.action} == {"pass"}
        data = toys.dataset([*[("a good film",)] * 8, ("a tq film",)], [1] * 8 + [0])
        score = evaluate_guard(fitted, overflowing, data, device="cpu")
        assert (score.false_alarms.count, score.accuracy_without.count, score.accuracy.n) == (1, 8, 8)

    def test_clean_inputs_with_such_answers_set_no_threshold(self, reviews: Dataset) -> None:
        @value
        class Broken(Dullness):
            """Knows no score of some texts."""

            def scores(self, model: nn.Module, inputs: Dataset, learnt, run) -> Scored:
                return Scored(torch.tensor([math.nan if "the" in text else 0.0 for (text,) in inputs.texts.strings]))

        with pytest.raises(UnbackdoorError) as caught:
            fit_guard(toys.Counting({}), reviews.select(range(40)), Broken(), false_alarms=0.1, device="cpu")
        assert re.fullmatch(
            r"Broken gives \d+ of \d+ clean inputs a score that is not finite, as their answers probably are not. "
            r"Leave these inputs out, or take `precision='fp32'`.",
            str(caught.value),
        )


class TestTextsOfAnInput:
    """A guard of pairs knows nothing of single texts, and a guard of texts nothing of pairs."""

    @staticmethod
    def all_different(texts: Dataset) -> Dataset:
        """The same texts, each with a number of its own behind it: equal ones count once."""
        numbered = tuple((f"{text} {number}",) for number, (text,) in enumerate(texts.texts.strings))
        return replace(texts, items=Texts(numbered, ("text",)))

    def test_texts_of_another_number_are_refused(self, small_text: tuple[nn.Module, Dataset], tmp_path: Path) -> None:
        model, single = small_text[0], self.all_different(small_text[1])
        pairs = replace(
            single, items=Texts(tuple((text, "a film") for (text,) in single.texts.strings), ("text_a", "text_b"))
        )
        both = {"single texts": (single, "a fine film"), "pairs of texts": (pairs, ("a fine film", "a dull film"))}
        for own, other in (tuple(both), tuple(both)[::-1]):
            fitted = fit_guard(model, both[own][0], guards.Strip(), false_alarms=0.2, device="cpu")
            fitted.save(tmp_path / own)
            for guard in (fitted, load_guard(tmp_path / own, fitted.encode)):
                said = f"The guard was fitted to {own}, and texts holds {other}. Give {own}."
                with pytest.raises(UnbackdoorError) as refused:
                    guard.decide(model, both[other][0], device="cpu")
                assert str(refused.value) == said
                with pytest.raises(UnbackdoorError, match=f"The guard was fitted to {own}, and .* holds {other}"):
                    guard.wrap(model, device="cpu")([both[other][1]])
                assert len(guard.decide(model, both[own][0], device="cpu")) == 40

    def test_a_guard_of_before_does_not_know_how_many_it_takes(self, small_text: tuple, tmp_path: Path) -> None:
        model, single = small_text[0], self.all_different(small_text[1])
        fitted = fit_guard(model, single, guards.Strip(), false_alarms=0.2, device="cpu")
        fitted.save(tmp_path / "guard")
        record = json.loads((tmp_path / "guard" / "guard.json").read_text())
        assert record.pop("texts") == 1
        (tmp_path / "guard" / "guard.json").write_text(json.dumps(record))
        assert len(load_guard(tmp_path / "guard", fitted.encode).decide(model, single, device="cpu")) == 40


class TestAnotherShare:
    def test_it_has_the_threshold_of_a_guard_that_was_fitted_for_it(self, backdoored: tuple, digits: Dataset) -> None:
        clean = digits.select(range(1000, 1200))
        fitted = fit_guard(backdoored[0], clean, guards.BadActs(), false_alarms=0.05, device="cpu")
        other = fit_guard(backdoored[0], clean, guards.BadActs(), false_alarms=0.2, device="cpu")
        moved = fitted.at(0.2)
        assert moved.threshold == other.threshold != fitted.threshold
        assert moved.record["false_alarms"] == {"asked": 0.2, "n": 100} == other.record["false_alarms"]
        assert fitted.record["false_alarms"]["asked"] == 0.05

    def test_what_has_no_other_threshold_is_refused(
        self, pictured: FittedGuard, edited: FittedGuard, tmp_path: Path
    ) -> None:
        for share in (0, 1, True, "0.1"):
            with pytest.raises(UnbackdoorError, match="`false_alarms` must be more than 0 and less than 1, got"):
                pictured.at(share)
        with pytest.raises(UnbackdoorError, match=r"fit_guard needs at least 1,997 clean examples .* has 200"):
            pictured.at(0.001)
        pictured.save(tmp_path / "guard")
        with pytest.raises(UnbackdoorError) as refused:
            load_guard(tmp_path / "guard", pictured.encode).at(0.2)
        assert str(refused.value) == (
            "The scores that set the threshold are not in the directory of a guard. Fit the guard again for another "
            "`false_alarms`."
        )
        everything = replace(edited, guard=Everything())
        with pytest.raises(
            UnbackdoorError, match=r"^Everything changes every input, so no share of false alarms moves"
        ):
            everything.at(0.1)
        bounded = replace(edited, guard=Bounded())
        with pytest.raises(
            UnbackdoorError, match=r"^Bounded sets its own threshold, so no share of false alarms moves"
        ):
            bounded.at(0.1)


class TestThreshold:
    def test_the_number_of_examples_is_the_smallest_with_a_rank(self) -> None:
        for share in (0.01, 0.05, 0.07, 0.1, 0.3, 0.5):
            least = needed(share)
            half = least - least // 2
            assert share * (half + 1) >= 1 - 1e-9
            assert share * half < 1

    def test_no_more_than_the_asked_share_lies_beyond(self) -> None:
        """Over many draws the realised rate averages rank / (n + 1), which is at most what was asked for."""
        generator = torch.Generator().manual_seed(0)
        for suspicious in ("low", "high"):
            drawn = torch.randn(1500, 39, generator=generator)
            limits = torch.tensor([threshold_of(scores, 0.05, suspicious) for scores in drawn])
            rates = torch.special.ndtr(limits if suspicious == "low" else -limits)
            assert float(rates.mean()) == pytest.approx(2 / 40, abs=0.003)
        assert alarms(torch.tensor([1.0, 2.0, 3.0]), 2.0, "low").tolist() == [True, False, False]
        assert alarms(torch.tensor([1.0, 2.0, 3.0]), 2.0, "high").tolist() == [False, False, True]

    def test_a_score_that_many_clean_inputs_share_is_told(
        self, edited: FittedGuard, pictured: FittedGuard, counting: nn.Module
    ) -> None:
        """No clean text has the word, so that the most suspicious score is that of all others as well."""
        assert edited.record["warnings"] == [
            "Dullness gives 20 of 20 held-out clean inputs the same score, 0, and none a more suspicious one: it may "
            "never raise an alarm. Evaluate it."
        ]
        assert pictured.record["warnings"] == []


class TestRefusals:
    def said(self, *arguments, **settings) -> str:
        with pytest.raises(UnbackdoorError) as refusal:
            fit_guard(*arguments, **settings)
        return str(refusal.value)

    def test_too_few_clean_examples_and_how_many_are_needed(self, backdoored: tuple, digits: Dataset) -> None:
        assert self.said(backdoored[0], digits.select(range(100)), guards.Strip()) == (
            "fit_guard needs at least 197 clean examples for a share of false alarms of 0.01, since half of them set "
            "the threshold; digits has 100. Add clean examples, or take `false_alarms=0.02`."
        )
        assert fit_guard(backdoored[0], digits.select(range(1000, 1100)), guards.Strip(copies=1), false_alarms=0.02)
        said = self.said(backdoored[0], digits.select(range(1500)), guards.Strip(), false_alarms=0.001)
        assert said.endswith("digits has 1,500. Add clean examples, or take `false_alarms=0.002`.")
        assert self.said(backdoored[0], digits.select([]), guards.Strip()).endswith("digits has 0. Add clean examples.")

    @pytest.mark.parametrize("share", [0, 1, -0.1, True, "1", math.nan])
    def test_what_is_no_share(self, share, backdoored: tuple, digits: Dataset) -> None:
        said = self.said(backdoored[0], digits, guards.Strip(), false_alarms=share)
        assert said == f"`false_alarms` must be more than 0 and less than 1, got {share!r}."

    def test_what_is_no_guard_or_no_model(self, backdoored: tuple, digits: Dataset) -> None:
        value = "fit_guard takes a guard's value, got "
        assert self.said(backdoored[0], digits, guards.Strip) == f"{value}the class Strip. Write Strip()."
        assert self.said(backdoored[0], digits, "strip") == f"{value}'strip'. Take one of unbackdoor.guards."
        assert self.said(backdoored[0], digits, ub.purifiers.FineTuning()).startswith(f"{value}FineTuning(")
        assert self.said(None, digits, guards.Strip()) == (
            "fit_guard takes model as a module, got NoneType. Load it with unbackdoor.load(PATH).model."
        )

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"suspicious": "up"}, "Wrong.suspicious must be low, high or all, got 'up'."),
            ({"__call__": lambda *_: [1]}, "Wrong must return a dict of tensors by name, got [1]."),
            ({"scores": lambda *_: torch.zeros(1)}, "Wrong.scores must return a Scored, got Tensor."),
        ],
    )
    def test_a_guard_of_ones_own_that_returns_something_else(self, wrong, said, counting, reviews: Dataset) -> None:
        guard = type("Wrong", (Dullness,), wrong)()
        assert self.said(counting, reviews.select(range(40)), guard, false_alarms=0.1) == said

    def test_what_is_no_data_or_not_for_it(self, backdoored: tuple, digits: Dataset, edited: FittedGuard) -> None:
        said = self.said(backdoored[0], "clean.parquet", guards.Strip())
        assert said == "fit_guard takes clean as a Dataset, got str. Load it with unbackdoor.Dataset.load."
        assert self.said(backdoored[0], digits, guards.Strip(), reference="a") == (
            "Strip takes no `reference`. Leave it out."
        )

    def test_another_model_tokenizer_or_processor(
        self, pictured: FittedGuard, backdoored: tuple, digits: Dataset, edited: FittedGuard, counting, reviews
    ) -> None:
        other = copy.deepcopy(backdoored[0])
        with torch.no_grad():
            other.classifier.bias[0] += 1e-6
        for work in (lambda: pictured.decide(other, digits), lambda: pictured.wrap(other)):
            with pytest.raises(UnbackdoorError, match=r"^The guard was fitted to another model \(SHA-256 \w{12}, not "):
                work()
        with pytest.raises(UnbackdoorError, match="fitted to another processor"):
            pictured.decide(backdoored[0], replace(digits, encode=ub.ImageEncoder()))
        longer = replace(reviews.encode, max_length=20)
        extended = toys.tokenizer()
        extended.add_tokens(["extra"])
        with pytest.raises(UnbackdoorError, match="fitted to another tokenizer"):
            edited.decide(counting, replace(reviews, encode=replace(reviews.encode, tokenizer=extended)))
        with pytest.raises(UnbackdoorError, match=r"reads 32 tokens, and here it reads 20\. Give `max_length=32`"):
            edited.decide(counting, replace(reviews, encode=longer))

    def test_inputs_of_another_kind(self, pictured: FittedGuard, backdoored: tuple, digits, reviews) -> None:
        for given, message in (
            (reviews, "The guard was fitted to images, and reviews holds text. Give other inputs."),
            (digits.select([]), "digits is empty; at least one input is needed."),
            (["a"], "decide takes inputs as a Dataset, got list. Load it with unbackdoor.Dataset.load, or wrap the "),
        ):
            with pytest.raises(UnbackdoorError) as refusal:
                pictured.decide(backdoored[0], given)
            assert str(refusal.value).startswith(message)


class TestDirectory:
    def test_it_keeps_its_schema_and_decides_the_same(
        self, pictured: FittedGuard, backdoored: tuple, digits: Dataset, tmp_path: Path
    ) -> None:
        pictured.save(tmp_path / "guard")
        content = json.loads((tmp_path / "guard/guard.json").read_text())
        assert GuardRecord.model_validate(content).model_dump(mode="json", exclude_unset=True) == content
        assert content["files"] == ["guard.json", "guard.safetensors"]
        assert content["identity"]["model"] == model_hash(backdoored[0])
        again = load_guard(tmp_path / "guard", digits.encode)
        some = digits.select(range(1300, 1320))
        assert again.decide(backdoored[0], some) == pictured.decide(backdoored[0], some)
        with pytest.raises(UnbackdoorError, match=r"exists\. Use `overwrite=True`"):
            again.save(tmp_path / "guard")
        again.save(tmp_path / "guard", overwrite=True)

    def test_what_is_no_guard_or_was_changed(self, pictured: FittedGuard, digits: Dataset, tmp_path: Path) -> None:
        def said(change) -> str:
            shutil.rmtree(tmp_path / "guard", ignore_errors=True)
            pictured.save(tmp_path / "guard")
            change(tmp_path / "guard")
            with pytest.raises(UnbackdoorError) as refusal:
                load_guard(tmp_path / "guard", digits.encode)
            return str(refusal.value).replace(str(tmp_path), "HERE")

        def rewritten(**changes):
            def change(folder: Path) -> None:
                content = json.loads((folder / "guard.json").read_text())
                (folder / "guard.json").write_text(json.dumps({**content, **changes}))

            return change

        assert said(rewritten(threshold="high")) == (
            "HERE/guard/guard.json is not a guard.json that unbackdoor wrote (GuardRecord.threshold must be a number, "
            "got high). Fit the guard again, or take the version of unbackdoor that wrote it."
        )
        finite = "HERE/guard/guard.json must have a finite threshold, got {}. Fit the guard again."
        assert said(rewritten(threshold=math.nan)) == finite.format("nan")
        assert said(rewritten(threshold=None)) == finite.format("None")
        assert said(lambda folder: (folder / "guard.safetensors").unlink()).endswith("but it is missing. Copy both.")
        assert said(lambda folder: (folder / "guard.safetensors").write_bytes(b"")).endswith(
            "is not the file that guard.json was written with. Copy both again."
        )
        foreign = {"name": "os:system", "parameters": {}, "repr": ""}
        assert said(rewritten(guard=foreign)).startswith("HERE/guard names the guard os:system, which is not one of")
        words = {"name": "rap", "parameters": {}, "repr": ""}
        assert said(rewritten(guard=words)) == (
            "HERE/guard/guard.json has the guard rap for images, which it does not serve. Fit the guard again."
        )
        identity = {**vars(pictured.identity), "reference": "0" * 64}
        assert said(rewritten(identity=identity)) == (
            "HERE/guard/guard.json has the guard strip with a reference. Fit the guard again."
        )
        assert said(rewritten(seed=2**80)).startswith("`seed` must be a whole number, at least 0 and less than 2**63")

    def test_arrays_of_a_block_that_the_model_lacks(self, backdoored: tuple, digits: Dataset, tmp_path: Path) -> None:
        clean = digits.select(range(1000, 1200))
        fitted = fit_guard(backdoored[0], clean, guards.BadActs(), false_alarms=0.1, device="cpu")
        learnt = {**fitted.learnt, "mean.other": torch.zeros(3), "deviation.other": torch.zeros(3)}
        replace(fitted, learnt=learnt).save(tmp_path / "guard")
        with pytest.raises(UnbackdoorError, match=r"^BadActs cannot work with the arrays of its file \(AttributeError"):
            load_guard(tmp_path / "guard", digits.encode).decide(backdoored[0], digits.select(range(1300, 1320)))

    @pytest.mark.parametrize(
        ("arrays", "reason"), [({}, "KeyError: 'pictures'"), ({"pictures": torch.zeros(5)}, "[A-Z][a-z]+Error: .*")]
    )
    def test_arrays_that_somebody_else_wrote(
        self, arrays: dict, reason: str, pictured: FittedGuard, backdoored: tuple, digits: Dataset, tmp_path: Path
    ) -> None:
        replace(pictured, learnt=arrays).save(tmp_path / "guard")
        loaded = load_guard(tmp_path / "guard", digits.encode)
        said = rf"^Strip cannot work with the arrays of its file \({reason}\)\. Fit the guard again\.$"
        with pytest.raises(UnbackdoorError, match=said):
            loaded.decide(backdoored[0], digits.select(range(1300, 1320)))

    def test_the_encoder_of_another_kind_of_model(self, pictured: FittedGuard, reviews, tmp_path: Path) -> None:
        pictured.save(tmp_path / "guard")
        with pytest.raises(UnbackdoorError, match="fitted to images, and the encoder reads text"):
            load_guard(tmp_path / "guard", reviews.encode)

    def test_what_is_no_encoder_or_no_directory(self, pictured: FittedGuard, digits: Dataset, tmp_path: Path) -> None:
        pictured.save(tmp_path / "guard")
        said = r"^load_guard takes the encoder of the model, got NoneType\. Give unbackdoor\.load\(PATH\)\.encode\.$"
        with pytest.raises(UnbackdoorError, match=said):
            load_guard(tmp_path / "guard", None)
        with pytest.raises(UnbackdoorError, match=r"^`source` must be the directory of a guard, got NoneType\.$"):
            load_guard(None, digits.encode)

    def test_a_reference_for_a_guard_that_needs_none(
        self, pictured: FittedGuard, digits: Dataset, tmp_path: Path
    ) -> None:
        pictured.save(tmp_path / "guard")
        with pytest.raises(UnbackdoorError, match=r"^Strip takes no `reference`\. Leave it out\.$"):
            load_guard(tmp_path / "guard", digits.encode, reference="lm")


class TestDecisions:
    def test_a_text_is_passed_changed_or_rejected(self, edited: FittedGuard, counting: nn.Module) -> None:
        given = ["a good film", "a bad cf film", "cf cf", "", "  ", "good", "dull " * 100]
        answers = edited.wrap(counting)(given)
        actions = [answer.decision.action for answer in answers]
        assert actions == ["pass", "clean", "reject", "reject", "reject", "pass", "pass"]
        first, changed, left, empty, _, _, long = (answer.decision for answer in answers)
        assert first.reason == "the number of cf is 0, not above 0"
        assert (changed.output, changed.reason) == ("a bad film", "cf was left out; the number of cf is 1, above 0")
        assert left.reason == "cf was left out; the number of cf is 2, above 0; nothing is left of the text"
        assert (empty.score, empty.reason) == (None, "the text is empty, so nothing can be judged")
        assert long.reason.endswith("(the model reads 32 tokens of it)")
        classes = [None if answer.answer is None else int(answer.answer.argmax()) for answer in answers]
        assert classes == [1, 0, None, None, None, 1, 0]

    def test_pictures_as_a_tensor_or_as_images(self, pictured: FittedGuard, backdoored: tuple, digits: Dataset) -> None:
        wrapped = pictured.wrap(backdoored[0])
        pixels = digits.pixels[1300:1304]
        images = [Image.fromarray(picture[0].numpy()) for picture in pixels]
        assert [answer.decision for answer in wrapped(pixels)] == [answer.decision for answer in wrapped(images)]
        assert wrapped([]) == []
        with pytest.raises(UnbackdoorError, match=r"of type uint8|and type uint8, got shape \(8, 8\) and uint8"):
            wrapped(pixels[0, 0])

    def test_texts_and_pairs_as_pipelines_take_them(self, edited: FittedGuard, counting: nn.Module) -> None:
        wrapped = edited.wrap(counting)
        for given, same in (
            ({"text": "good cf"}, "good cf"),
            ([{"text": "good"}, "cf"], ["good", "cf"]),
        ):
            assert [answer.decision for answer in wrapped(given)] == [answer.decision for answer in wrapped(same)]
        for pairs in ([{"text": "good", "text_pair": "bad"}], [("good", "bad")]):
            with pytest.raises(UnbackdoorError, match=r"fitted to single texts, and the batch holds pairs of texts\."):
                wrapped(pairs)

    def test_inputs_that_are_no_texts(self, edited: FittedGuard, counting: nn.Module, digits, reviews) -> None:
        wrapped = edited.wrap(counting)
        for given, kind in ((3, "int"), ([3, "a"], "list of int and str"), ([{"title": "a"}], "list of dict")):
            with pytest.raises(
                UnbackdoorError, match=f"as dicts with text and text_pair, got {kind}\\. Make a list of them\\.$"
            ):
                wrapped(given)
        with pytest.raises(UnbackdoorError, match=r"^the batch has text that is not valid Unicode in row 1\."):
            wrapped(["a", "\ud800"])
        with pytest.raises(UnbackdoorError, match="The guard was fitted to text, and digits holds images"):
            wrapped(digits)
        with pytest.raises(UnbackdoorError, match="reads 32 tokens, and here it reads 9"):
            wrapped(replace(reviews, encode=replace(reviews.encode, max_length=9)))
        with pytest.raises(UnbackdoorError, match="takes texts or pairs of texts, got both"):
            wrapped(["a", ("a", "b")])

    def test_a_pipeline_behind_a_guard(self, text_victim: nn.Module, reviews: Dataset) -> None:
        import transformers

        fitted = fit_guard(text_victim, reviews.select(range(40)), Dullness(), false_alarms=0.1, device="cpu")
        pipeline = transformers.pipeline("text-classification", model=text_victim, tokenizer=toys.tokenizer())
        answers = fitted.wrap(pipeline)(["a good film", "a bad cf film", "", "dull " * 100])
        assert [answer.decision.action for answer in answers] == ["pass", "clean", "reject", "pass"]
        assert answers[0].answer == pipeline("a good film")[0]
        assert answers[1].answer == pipeline("a bad film")[0]
        assert answers[2].answer is None
        other = transformers.pipeline("text-classification", model=toys.classifier("bert"), tokenizer=toys.tokenizer())
        with pytest.raises(UnbackdoorError, match="fitted to another model"):
            fitted.wrap(other)
        pipeline.tokenizer.add_tokens(["extra"])
        with pytest.raises(UnbackdoorError, match="fitted to another tokenizer"):
            fitted.wrap(pipeline)

    @pytest.mark.parametrize("change", ["in place", "data", "another", "assigned"])
    def test_a_model_that_changes_behind_its_guard(
        self, change: str, edited: FittedGuard, counting: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, hashed = copy.deepcopy(counting), []
        monkeypatch.setattr(identity_module, "model_hash", lambda model: hashed.append(0) or model_hash(model))
        wrapped = edited.wrap(model)
        assert [answer.decision.action for answer in (*wrapped("good"), *wrapped("a cf"))] == ["pass", "clean"]
        assert len(hashed) == 1
        name, weight = next(iter(model.named_parameters()))
        before, changed = weight.detach().clone(), weight.detach() + 1
        owner, _, own = name.rpartition(".")
        if change == "in place":
            with torch.no_grad():
                weight.copy_(changed)
        elif change == "data":
            weight.data.copy_(changed)
        elif change == "another":
            setattr(model.get_submodule(owner), own, nn.Parameter(changed))
        else:
            model.load_state_dict({**model.state_dict(), name: changed}, assign=True)
        with pytest.raises(UnbackdoorError, match=r"^The guard was fitted to another model \(SHA-256"):
            wrapped("good")
        model.get_parameter(name).data = before
        assert wrapped("good")[0].decision.action == "pass"

    def test_a_pipeline_that_changes_behind_its_guard(self, text_victim: nn.Module, reviews: Dataset) -> None:
        import transformers

        fitted = fit_guard(text_victim, reviews.select(range(40)), Dullness(), false_alarms=0.1, device="cpu")
        pipeline = transformers.pipeline("text-classification", model=text_victim, tokenizer=toys.tokenizer())
        wrapped = fitted.wrap(pipeline)
        pipeline.tokenizer.add_tokens(["extra"])
        with pytest.raises(UnbackdoorError, match="fitted to another tokenizer"):
            wrapped("good")
        pipeline.tokenizer = toys.tokenizer()
        assert wrapped("good")[0].decision.action == "pass"
        pipeline.model = toys.classifier("bert")
        with pytest.raises(UnbackdoorError, match="fitted to another model"):
            wrapped("good")

    def test_a_pipeline_of_pictures_behind_a_guard(self, digits: Dataset, tmp_path: Path) -> None:
        import transformers

        config = transformers.ViTConfig(
            **{"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "intermediate_size": 16, "num_labels": 10},
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.ViTForImageClassification(config).eval()
        steps = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
        encode = ub.ImageEncoder(mean=(0.5,) * 3, std=(0.5,) * 3, channels=3)
        coloured = replace(digits, items=digits.pixels.repeat(1, 3, 1, 1), encode=encode)
        fitted = fit_guard(model, coloured.select(range(40)), guards.BadActs(width=1), false_alarms=0.1, device="cpu")
        pipeline = transformers.pipeline("image-classification", model=model, image_processor=steps, device="cpu")
        images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in coloured.pixels[100:140]]
        answers = fitted.wrap(pipeline, device="cpu")(images, top_k=1)
        rejected = [answer for answer in answers if answer.decision.action == "reject"]
        assert 0 < len(rejected) < 20
        assert all(answer.answer is None for answer in rejected)
        passed = [row for row, answer in enumerate(answers) if answer.decision.action == "pass"]
        plain = pipeline([images[row] for row in passed], top_k=1)
        assert [answers[row].answer[0]["label"] for row in passed] == [each[0]["label"] for each in plain]
        wrapped, row = fitted.wrap(pipeline, device="cpu"), passed[0]
        images[row].save(tmp_path / "one.png")
        for given in (tmp_path / "one.png", str(tmp_path / "one.png"), (tmp_path / "one.png").read_bytes()):
            assert wrapped(given, top_k=1)[0].answer == answers[row].answer
        assert wrapped(np.asarray(images[row]), top_k=1)[0].answer == answers[row].answer
        with pytest.raises(
            UnbackdoorError, match="with 3 channels, as its model does, and the batch has pictures with 1"
        ):
            wrapped(digits.pixels[:2])

    def test_pictures_that_are_no_list(self, pictured: FittedGuard, backdoored: tuple, digits: Dataset) -> None:
        wrapped = pictured.wrap(backdoored[0])
        said = (
            r"^The guard takes pictures as a tensor or as a list of PIL images, arrays or paths, got {}\. Make a list"
        )
        with pytest.raises(UnbackdoorError, match=said.format("generator")):
            wrapped(picture for picture in digits.pixels[:2])
        with pytest.raises(UnbackdoorError, match=said.format("ndarray")):
            wrapped(digits.pixels[:2].numpy())

    def test_pictures_of_any_size_behind_strip(self, small_vit: nn.Module, digits: Dataset) -> None:
        """They are mixed in the size at which the model gets them, whatever the clean ones and the others measure."""
        encode = ub.ImageEncoder(size=(8, 8), channels=1)
        large = replace(digits, items=digits.pixels.repeat_interleave(2, 2).repeat_interleave(3, 3), encode=encode)
        fitted = fit_guard(small_vit, large.select(range(40)), guards.Strip(copies=4), false_alarms=0.1, device="cpu")
        wrapped = fitted.wrap(small_vit, device="cpu")
        images = [Image.fromarray(large.pixels[row, 0].numpy()) for row in (50, 51)]
        alone = [wrapped(image)[0].decision.score for image in images]
        odd = [Image.new("L", (1, 1)), Image.new("L", (30, 5), 200).convert("RGB")]
        together = [answer.decision.score for answer in wrapped([*images, *odd])]  # read one by one
        assert together[:2] == pytest.approx(alone, abs=1e-4)
        assert wrapped(odd[0])[0].decision.score == pytest.approx(together[2], abs=1e-4)
        assert wrapped(large.pixels[50:51])[0].decision.score == pytest.approx(alone[0], abs=1e-4)

    def test_a_size_that_the_model_does_not_take(
        self, pictured: FittedGuard, backdoored: tuple, digits: Dataset
    ) -> None:
        wrapped = pictured.wrap(backdoored[0], device="cpu")
        with pytest.raises(UnbackdoorError, match=r"SmallCNN cannot take inputs of shape \(2, 1, 16, 16\)"):
            wrapped(digits.pixels[:2].repeat_interleave(2, 2).repeat_interleave(2, 3))


class TestNumbers:
    def test_each_is_counted_as_it_is_called(self, edited: FittedGuard, counting: nn.Module, reviews: Dataset) -> None:
        test = reviews.select(range(40, 140))
        attack = ub.attacks.Word(words=("cf",), target=1)
        score = evaluate_guard(edited, counting, test, attack=attack)
        bad = int((test.labels == 0).sum())
        assert (score.false_alarms.count, score.false_alarms.n) == (0, 100)
        assert score.accuracy.value == score.accuracy_without.value == 1.0
        assert (score.attack_success_without.value, score.attack_success_without.n) == (1.0, bad)
        assert score.missed.value == score.attack_success.value == 0.0
        assert score.area.value == 1.0
        assert score.cost.forwards == pytest.approx((100 + 2 * bad) / (100 + bad))  # a changed text is answered again
        assert json.loads(json.dumps(score.to_json()))["auc"]["n"] == 100 + bad
        assert "missed attacks" in repr(score)

    def test_examples_that_it_was_fitted_on_are_left_out(self, edited, counting: nn.Module, reviews: Dataset) -> None:
        score = evaluate_guard(edited, counting, reviews.select(range(20, 60)))
        assert score.false_alarms.n == len({*reviews.texts.strings[40:60]} - {*reviews.texts.strings[:40]})
        with pytest.raises(UnbackdoorError, match="holds only examples that the guard was fitted on"):
            evaluate_guard(edited, counting, reviews.select(range(20)))

    def test_equal_clean_examples_count_once(self, counting: nn.Module, reviews: Dataset) -> None:
        """One copy would set the threshold for what another one was fitted on."""
        once = reviews.select(range(40))
        assert len({*once.texts.strings}) == 40
        thrice = reviews.select([*range(40)] * 3)
        first, second = (
            fit_guard(counting, each, guards.BadActs(), false_alarms=0.1, device="cpu") for each in (once, thrice)
        )
        assert second.record["clean"] == first.record["clean"] == {"n": 40, "fitted_on": 20, "threshold_on": 20}
        assert second.threshold == first.threshold
        assert second.record["notes"][0].startswith("80 of the 120 rows of reviews have the text of an earlier one")
        with pytest.raises(UnbackdoorError, match="reviews has 40"):
            fit_guard(counting, thrice, guards.BadActs(), false_alarms=0.02, device="cpu")

    def test_options_that_contradict_each_other(self, edited: FittedGuard, counting: nn.Module, reviews) -> None:
        with pytest.raises(UnbackdoorError, match="takes `attack` or `triggered_data`, got both"):
            evaluate_guard(edited, counting, reviews, attack=ub.attacks.Word(), triggered_data=reviews)
        with pytest.raises(UnbackdoorError, match="`triggered_data` and `target` go together"):
            evaluate_guard(edited, counting, reviews, target=1)

    def test_the_area_is_the_share_of_pairs_in_order(self) -> None:
        clean, attacked = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])
        pairs = sum((a < c) + 0.5 * (a == c) for a in attacked.tolist() for c in clean.tolist()) / 6
        assert Area.of(clean, attacked, "low").value == pytest.approx(pairs)
        assert Area.of(clean, attacked, "high").value == pytest.approx(1 - pairs)

    def test_the_interval_of_an_area_inverts_the_error_of_hanley_and_mcneil(self) -> None:
        area = Area(0.8, 40, 60)
        for end in area.interval:
            first, second = end / (2 - end), 2 * end**2 / (1 + end)
            variance = (end * (1 - end) + 59 * (first - end**2) + 39 * (second - end**2)) / 2400
            assert abs(end - 0.8) == pytest.approx(1.96 * math.sqrt(variance), rel=1e-4)
        low, high = Area(1.0, 40, 60).interval
        assert high == 1.0
        assert 0.8 < low < 1.0


@pytest.mark.parametrize("guard", [guards.Strip(), Dullness()])
def test_no_guard_serves_pairs_of_image_and_caption(guard: object) -> None:
    with pytest.raises(UnbackdoorError) as refusal:
        fit_guard(sights.clip(), sights.pairs(64), guard, false_alarms=0.1, device="cpu")
    assert str(refusal.value) == (
        "No guard serves image-text, which sights holds. Take an audit of the model, or purify it."
    )
