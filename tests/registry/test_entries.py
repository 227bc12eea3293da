"""The tables of facts: what they print, and that they agree with the classes that they describe."""

import dataclasses

import pytest

import toys
from unbackdoor import attacks, purifiers, trainers
from unbackdoor._cli.options import TrainOptions
from unbackdoor._poisoning.abilities import modalities_of
from unbackdoor._purification.method import needs_clean
from unbackdoor._registry.entries import Entry, Need
from unbackdoor._robust_training import trainer


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (Entry("a", "m:A", ""), "images"),
        (Entry("a", "m:A", "", needs=(Need.CLEAN,), passes=10), "images; needs clean data; 10 passes"),
        (
            Entry("a", "m:A", "", needs=(Need.CLEAN, Need.BASE), passes=(10, 30), cost="each twice"),
            "images; needs clean data, a pre-trained base; 10 to 30 passes, each twice",
        ),
        (Entry("a", "m:A", "", modality=("images", "text"), passes=0), "images, text; no pass"),
        (Entry("a", "m:A", "", modality=("text",), cost="200 steps"), "text; 200 steps"),
    ],
)
def test_facts_in_one_line(entry: Entry, line: str) -> None:
    assert entry.facts() == line


@pytest.mark.parametrize("entry", purifiers.REGISTRY, ids=lambda entry: entry.name)
def test_a_method_that_says_it_needs_clean_data_does(entry: Entry) -> None:
    optional = (Need.CLEAN not in entry.needs, Need.TOKENIZER in entry.needs)
    assert needs_clean(toys.a_method(entry)) == (optional != (True, False))


@pytest.mark.parametrize("entry", attacks.REGISTRY, ids=lambda entry: entry.name)
def test_an_attack_serves_the_data_that_its_class_names(entry: Entry) -> None:
    assert entry.modality == modalities_of(entry.resolve())


@pytest.mark.parametrize("entry", trainers.REGISTRY, ids=lambda entry: entry.name)
def test_a_trainer_serves_and_needs_what_its_class_declares(entry: Entry) -> None:
    made = entry.resolve()()
    assert entry.modality == trainer.modalities_of(made)
    assert (Need.CLEAN in entry.needs) == trainer.needs_clean(made)


@pytest.mark.parametrize("entry", trainers.REGISTRY, ids=lambda entry: entry.name)
def test_the_options_of_a_trainer_are_its_own(entry: Entry) -> None:
    own, shared = ({item.name for item in dataclasses.fields(each)} for each in (entry.resolve(), TrainOptions))
    assert not own & shared
