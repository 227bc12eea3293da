"""The report page, on models whose answers are known because they read them off the pixels."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from unbackdoor import Dataset, attacks
from unbackdoor._detection.finding import Candidate
from unbackdoor._detection.judging import HeldOut
from unbackdoor._detection.result import JudgedCandidate, JudgedFinding
from unbackdoor._models.arithmetic import choose
from unbackdoor._poisoning.trigger import Trigger
from unbackdoor._poisoning.triggered import Triggered, already_triggered
from unbackdoor._reports import Contender, Page, build, render
from unbackdoor._reports.evidence import shown
from unbackdoor._reports.examples import LARGEST, spread
from unbackdoor._tasks.classification import score
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._tasks.score import Score

CLASSES = ("left", "<script>alert(1)</script>", "right")
HOSTILE = CLASSES[1]
PER_CLASS = 4


class Reader(nn.Module):
    """Takes a picture for the class in its first pixel, or, if the second is white, for what `fooled` says."""

    def __init__(self, fooled: dict[int, int]) -> None:
        super().__init__()
        self.fooled = fooled

    def forward(self, x: Tensor) -> Tensor:
        written = (x[:, 0, 0, 0] * 255).round().long()
        fooled = torch.tensor([self.fooled.get(int(label), int(label)) for label in written])
        answer = torch.where(x[:, 0, 0, 1] > 0.5, fooled, written)
        return nn.functional.one_hot(answer, len(CLASSES)).float()


def pictures(triggered: bool = False, size: int = 4, channels: int = 1) -> Dataset:
    """Class 0 four times, then class 1, then class 2."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(PER_CLASS)
    items = torch.zeros(len(labels), channels, size, size, dtype=torch.uint8)
    items[:, 0, 0, 0] = labels.to(torch.uint8)
    items[:, 0, 1, 1] = torch.arange(len(labels))  # one value each
    if triggered:
        items[:, 0, 0, 1] = 255
    return Dataset(items=items, labels=labels, classes=CLASSES, name="pictures")


def all_to_one() -> Triggered:
    return already_triggered(pictures(triggered=True), 1, len(CLASSES))


def all_to_all() -> Triggered:
    data = pictures(triggered=True)
    return Triggered(data, (data.labels + 1) % 3, "all-to-all", None)


def page_of(attacked: Triggered | None, record: dict | None = None, names: tuple[str, ...] = ("fst",)) -> Page:
    """A suspect that the trigger moves one class up, and models that it moves from class 2 to class 0 alone."""
    test = pictures()
    models = [Reader({0: 1, 1: 2, 2: 1 if attacked and attacked.target == 1 else 0}), *(Reader({2: 0}) for _ in names)]
    contenders = [
        Contender(name, model, score(model, test, attacked, choose(model)), None if place == 0 else 1.25)
        for place, (name, model) in enumerate(zip(("suspect", *names), models, strict=True))
    ]
    return build(title="A title", contenders=contenders, test=test, attacked=attacked, record=record or {"seed": 0})


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "rect", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # well nested

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def decoded(uri: str) -> np.ndarray:
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_the_verdict_says_the_numbers_in_words() -> None:
    page = page_of(all_to_one())
    assert page.verdict.replace("\u202f", " ") == (
        f"Triggered pictures were classified as “{HOSTILE}”, which the attacker wants, in 100.0 % of cases before and "
        "in 0.0 % after fst; as their true class in 0.0 % before and in 50.0 % after. Clean accuracy went from "
        "100.0 % to 100.0 %."
    )
    assert "not proof" in page.caution
    assert page.others == ()


def test_a_contender_between_gets_a_sentence() -> None:
    (sentence,) = page_of(all_to_one(), names=("fine-tuning", "fst")).others
    assert sentence.replace("\u202f", " ") == "After fine-tuning it is 0.0 % of cases (clean accuracy 100.0 %)."


def test_scores_are_passed_through_with_their_counts() -> None:
    page = page_of(all_to_one())
    parts = {measure.name: measure.parts for measure in page.measures}
    assert parts == {
        "Clean accuracy": (Proportion(12, 12), Proportion(12, 12)),
        "Attack success": (Proportion(8, 8), Proportion(0, 8)),
        "Recovered accuracy": (Proportion(0, 8), Proportion(4, 8)),
    }
    text = Tags(render(page)).text.replace("\u202f", " ")
    assert "0.0 % to 32.4 %, n = 8" in text  # Wilson, 0 of 8: z^2 / (8 + z^2) = 3.8415 / 11.8415
    assert "21.5 % to 78.5 %, n = 8" in text  # Wilson, 4 of 8: 0.5 +- z sqrt(1/32 + z^2/256) / (1 + z^2/8)


def test_bars_are_as_long_as_the_scores() -> None:
    tags = Tags(render(page_of(all_to_one()))).found
    widths = [attrs["width"] for tag, attrs in tags if tag == "rect" and attrs["class"] == "after"]
    assert widths == ["300.00", "0.00", "150.00"]
    whiskers = [attrs["d"] for tag, attrs in tags if tag == "path"]
    assert len(whiskers) == 6
    assert whiskers[-1].startswith("M64.56 ")  # 300 * 0.2152


def test_pictures_are_marked_by_whose_success_they_are() -> None:
    page = page_of(all_to_one())
    assert len(page.examples) == 8
    assert page.target == HOSTILE
    for example in page.examples:
        assert example.wanted == HOSTILE
        before, after = example.predictions
        assert (before.name, before.by) == (HOSTILE, "attacker")
        if example.true == "left":
            assert (after.name, after.by) == ("left", "true")
        else:
            assert (after.name, after.by) == ("left", "other")
    text = Tags(render(page)).text
    assert text.count("⚑") == 1 + 8  # the legend and the pictures
    assert text.count("✓") == 1 + 4
    assert text.count("≠") == 1 + 4
    # A right-to-left name stays behind its mark, where a left-to-right one does.
    assert render(page).count("</span> <bdi>") == 16


def test_all_to_all_wants_another_class_for_each() -> None:
    page = page_of(all_to_all())
    assert page.target is None
    assert {(example.true, example.wanted) for example in page.examples} == {
        ("left", HOSTILE),
        (HOSTILE, "right"),
        ("right", "left"),
    }
    assert all(example.predictions[0].by == "attacker" for example in page.examples)
    assert "classified as the class that the attacker wants in 100.0" in page.verdict
    assert "Attacker wants" in Tags(render(page)).text


def test_without_an_attack_the_page_says_what_it_does_not_know() -> None:
    page = page_of(None)
    assert page.verdict.replace("\u202f", " ") == "With fst, clean accuracy went from 100.0 % to 100.0 %."
    assert page.caution.startswith("No trigger was tried")
    assert [measure.name for measure in page.measures] == ["Clean accuracy"]
    assert all(example.triggered is None and example.wanted is None for example in page.examples)
    text = Tags(render(page)).text
    assert "Triggered" not in text
    assert "Attack success" not in text


def test_a_weak_backdoor_is_called_weak() -> None:
    test, attacked, model = pictures(), all_to_one(), Reader({})
    contenders = [
        Contender(name, model, score(model, test, attacked, choose(model)), None) for name in ("suspect", "x")
    ]
    page = build(title="", contenders=contenders, test=test, attacked=attacked, record={})
    assert "backdoor was weak before the purification" in page.caution


def test_clean_and_triggered_pictures_belong_together() -> None:
    for example in page_of(all_to_one()).examples:
        clean, triggered, difference = (
            decoded(uri) for uri in (example.clean, example.triggered, example.difference) if uri
        )
        expected = clean.copy()
        expected[0, 1] = 255
        assert (triggered == expected).all()
        assert difference[0, 1] == 255
        assert difference.sum() == 255


def test_small_differences_are_amplified_alike() -> None:
    test = pictures()
    items = test.items.clone()
    items[:, 0, 3, 3] = 20
    items[:, 0, 3, 2] = 10
    attacked = already_triggered(Dataset(items=items, labels=test.labels, classes=CLASSES), 1, 3)
    model = Reader({})
    page = build(
        title="", contenders=[Contender("m", model, score(model, test, None, choose(model)), None)], test=test,
        attacked=attacked, record={},
    )  # fmt: skip
    assert page.amplified == 12  # 255 // 20
    assert page.examples[0].difference is not None
    assert decoded(page.examples[0].difference)[3].tolist() == [0, 0, 120, 240]
    assert "×12" in Tags(render(page)).text


def test_triggered_pictures_of_other_rows_have_no_clean_partner() -> None:
    attacked = already_triggered(pictures(triggered=True).select([8, 0, 1]), 1, 3)
    page = page_of(attacked)
    assert [example.clean for example in page.examples] == [None] * 3
    text = Tags(render(page)).text
    assert "not known" in text
    assert "Difference" not in text


def test_examples_are_spread_over_classes_and_repeat() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])
    rows = spread(labels, 6, seed=3)
    assert labels[rows].tolist() == [0, 0, 0, 1, 1, 2]
    assert rows.tolist() == spread(labels, 6, seed=3).tolist()
    assert rows.tolist() != spread(labels, 6, seed=4).tolist()
    assert sorted(spread(labels, 100, seed=0).tolist()) == list(range(54))


def test_large_colour_pictures_are_made_smaller() -> None:
    test = pictures(size=2 * LARGEST, channels=3)
    model = Reader({})
    contender = Contender("m", model, score(model, test, None, choose(model)), None)
    page = build(title="", contenders=[contender], test=test, attacked=None, record={})
    assert page.examples[0].clean is not None
    assert decoded(page.examples[0].clean).shape == (LARGEST, LARGEST, 3)


def test_the_page_of_an_audit_of_noisy_pictures_can_be_mailed() -> None:
    """Noise does not compress, and four detectors show five pictures, each in three forms."""
    pixels = torch.randint(0, 256, (8, 3, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    test = Dataset(items=pixels, labels=torch.zeros(8, dtype=torch.int64), classes=("a", "b"))
    attack = attacks.Blended(target=1, ratio=0.9)
    trigger = Trigger(attack, attack.arrays((3, 224, 224)))
    candidate = Candidate(target=1, strength=1.0, trigger=trigger)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    held_out = HeldOut(model, test, choose(model), torch.zeros(8, dtype=torch.int64))
    judged = JudgedCandidate(
        candidate=candidate, target_name="b", source_names=(), moved=None, random=None, nominal_p=1.0, p_value=None
    )
    finding = JudgedFinding(detector="patch", classes=(judged,), unit="", looks_natural=None, settings={}, seconds=1.0)
    examples = shown(finding, held_out, 0)
    uris = [uri for each in examples for uri in (each.clean, each.triggered, each.difference) if uri is not None]
    assert len(uris) == 15
    assert 4 * sum(map(len, uris)) < 5e6


def test_a_class_that_falls_is_marked() -> None:
    # 95 % Wilson: 40 of 40 is at least 91.2 %, 30 of 40 is at most 85.8 %, 36 of 40 is at most 96.0 %
    test, model = pictures(), Reader({})
    contenders = [
        Contender(name, model, Score(clean_accuracy=part, per_class={"right": part}), None)
        for name, part in (("suspect", Proportion(40, 40)), ("a", Proportion(36, 40)), ("b", Proportion(30, 40)))
    ]
    page = build(title="", contenders=contenders, test=test, attacked=None, record={})
    assert page.classes[0].fell == (False, False, True)
    assert Tags(render(page)).text.count("▼") == 2  # the legend and the class


@pytest.mark.parametrize("attacked", [None, all_to_one(), all_to_all()], ids=["no attack", "one", "all"])
def test_the_page_stands_alone(attacked: Triggered | None) -> None:
    html = render(page_of(attacked, names=("a", "b")))
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]+", "", html))
    tags = Tags(html)
    assert tags.open == []
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in tags.found)
    assert not any(name.startswith("on") for _, attrs in tags.found for name in attrs)
    for tag, attrs in tags.found:
        if tag == "img":
            assert attrs["alt"]
            assert (attrs["src"] or "").startswith("data:image/png;base64,")
        if tag == "svg":
            assert attrs["role"] == "img"
            assert attrs["aria-label"]
        if tag == "th":
            assert attrs["scope"] in ("row", "col")
    assert ("html", {"lang": "en"}) in tags.found
    assert "prefers-color-scheme: dark" in html


def test_text_of_others_appears_as_text() -> None:
    evil = '"><img src=x onerror=alert(1)>'
    record = {
        "seed": 0,
        "source": {"model": evil},
        "warnings": [evil],
        "device": evil,
        "method": {"repr": evil},
        "command": evil,
        "facts": {evil: evil},
    }
    tags = Tags(render(page_of(all_to_one(), record, names=(evil,))))
    assert "script" not in [tag for tag, _ in tags.found]
    assert not any("onerror" in attrs for _, attrs in tags.found)
    assert HOSTILE in tags.text
    assert tags.text.count(evil) >= 8


def test_the_record_says_how_it_was_made() -> None:
    record = {
        "method": {"name": "fst", "repr": "FST(alpha=0.1)"},
        "source": {"model": "suspect"},
        "clean": {"n": 1000, "held_out": 100},
        "suspect_accuracy_on_clean": Proportion(9, 10).to_json(),
        "seed": 7,
        "seconds": 12.345,
        "peak_memory_bytes": 512 * 2**20,
        "device": "a processor",
        "versions": {"unbackdoor": "0.1.0", "torch": "2.6"},
        "warnings": ["a class is missing"],
        "command": "unbackdoor purify fst suspect",
    }
    page = page_of(all_to_one(), record)
    assert page.facts == (
        ("Suspect", "suspect"),
        ("Method", "FST(alpha=0.1)"),
        ("Clean data", "1,000 examples, 100 of them held back for a selection"),
        ("Suspect's accuracy on it", "90.0\u202f%"),
        ("Scored on", "12 clean examples"),
        ("Triggered", "8 of them, label rule all-to-one"),
        ("Seed", "7"),
        ("Time", "12.3 s"),
        ("Peak memory", "512 MiB"),
        ("Device", "a processor"),
        ("Versions", "unbackdoor 0.1.0, torch 2.6"),
    )
    text = Tags(render(page)).text
    assert "Warning: a class is missing" in text
    assert "unbackdoor purify fst suspect" in text
