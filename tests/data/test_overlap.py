"""Equal examples of one data set: left out, or on one side of a split."""

from dataclasses import replace

import pytest
import torch

import chats
import sights
import toys
from unbackdoor import Dataset
from unbackdoor._data.overlap import distinct, split_apart


def repeated(data: Dataset, times: int) -> Dataset:
    return data.select(torch.arange(len(data)).repeat(times))


def inputs(data: Dataset) -> set:
    if data.modality == "conversations":
        return {entry.messages for entry in data.conversations.entries}
    return (
        {picture.numpy().tobytes() for picture in data.pictures} if data.modality != "text" else set(data.identities())
    )


def four_kinds(digits: Dataset) -> list[Dataset]:
    words = "abcdefghijklmnopqrstuvwxyz"
    texts = toys.dataset([(f"good {letter}",) for letter in words], [place % 2 for place in range(len(words))])
    return [digits.select(range(30)), texts, chats.prompts(30), sights.pairs(30)]


@pytest.mark.parametrize("kind", range(4), ids=["images", "text", "conversations", "image-text"])
class TestOfEachKind:
    def test_equal_inputs_count_once(self, kind: int, digits: Dataset) -> None:
        notes: list[str] = []
        single = distinct(four_kinds(digits)[kind], notes.append)
        count = len(inputs(single))
        assert len(single) == count
        notes.clear()
        assert distinct(single, notes.append) is single
        assert notes == []
        again = distinct(repeated(single, 3), notes.append)
        assert again.identities() == single.identities()
        assert torch.equal(again.rows, repeated(single, 3).rows[:count])
        noun = ("picture", "text", "prompt", "picture")[kind]
        assert notes == [
            f"{2 * count} of the {3 * count} rows of {single.name} have the {noun} of an earlier one, and are left "
            "out: what is measured on held-out examples would not be unseen."
        ]

    def test_a_split_keeps_them_together(self, kind: int, digits: Dataset) -> None:
        data = repeated(distinct(four_kinds(digits)[kind], lambda _: None), 4)
        part, rest = split_apart(data, round(0.8 * len(data)), seed=1)
        assert inputs(part).isdisjoint(inputs(rest))
        assert inputs(part) | inputs(rest) == inputs(data)
        assert sorted([*part.rows.tolist(), *rest.rows.tolist()]) == sorted(data.rows.tolist())
        assert 0.6 * len(data) < len(part) < len(data)
        assert part.groups is None


def test_a_picture_of_two_captions_is_one() -> None:
    pairs = sights.pairs(6)
    other = replace(pairs, items=replace(pairs.pairs, captions=sights.pairs(6, seed=5).pairs.captions))
    assert len(distinct(pairs.joined(other), lambda _: None)) == len(inputs(pairs))


def test_a_prompt_of_two_answers_is_one() -> None:
    data = chats.prompts(4)
    entry = data.conversations.entries[0]
    both = data.replaced(torch.tensor([1]), replace(data.conversations, entries=(replace(entry, answer="another"),)))
    assert len(distinct(both, lambda _: None)) == len(inputs(both)) < len(both)


def test_without_equal_examples_the_draw_is_as_ever(digits: Dataset) -> None:
    clean = digits.select(range(100))
    for ours, usual in zip(split_apart(clean, 80, seed=3), clean.split(80, seed=3), strict=True):
        assert torch.equal(ours.rows, usual.rows)


def test_a_class_with_one_input_stays_in_the_first_part(digits: Dataset) -> None:
    """It was drawn more often because it is rare: a method must be tuned on it."""
    common = digits.select((digits.labels != 3).nonzero().flatten()[:90])
    rare = digits.select((digits.labels == 3).nonzero().flatten()[:1].repeat(10))
    part, rest = split_apart(common.joined(rare), 80, seed=0)
    assert int((part.labels == 3).sum()) == 10
    assert int((rest.labels == 3).sum()) == 0


def test_classes_of_one_input_each_are_split_all_the_same(digits: Dataset) -> None:
    first = [int((digits.labels == label).nonzero()[0]) for label in range(10)]
    part, rest = split_apart(repeated(digits.select(first), 5), 40, seed=0)
    assert (len(part), len(rest)) == (40, 10)
