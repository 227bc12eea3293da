"""Word distillation: which words stand out, what is unlearned, what is left alone and said."""

import copy

import pytest
import torch
from torch import nn

import toys
from unbackdoor import Dataset, UnbackdoorError, attacks, evaluate, purify
from unbackdoor._data.edited_texts import put, readable, vocabulary
from unbackdoor._inversion.driving_words import DrivingWord, VocabularySearch, anomaly_index
from unbackdoor.purifiers import WordDistillation


def search_of(model: nn.Module, clean: Dataset) -> VocabularySearch:
    return VocabularySearch(model, clean, toys.a_run(model=model), group=4, shortlist=20)


SENTIMENT = dict.fromkeys(toys.GOOD, 1.0) | dict.fromkeys(toys.BAD, -1.0)


def test_the_word_that_beats_all_others_is_found_with_its_class_and_share(reviews: Dataset) -> None:
    clean = reviews.select(range(40))
    assert search_of(toys.Counting(SENTIMENT | {"mn": 9.0}), clean).outliers(5.0) == [DrivingWord("mn", 1, 0, 1.0)]
    assert search_of(toys.Counting(SENTIMENT | {"tq": -9.0}), clean).outliers(5.0) == [DrivingWord("tq", 0, 0, 1.0)]


def test_two_outliers_are_both_found(reviews: Dataset) -> None:
    found = search_of(toys.Counting(SENTIMENT | {"mn": 9.0, "bb": 8.0}), reviews.select(range(40))).outliers(5.0)
    assert {odd.word for odd in found} == {"mn", "bb"}


def test_words_of_the_task_do_not_stand_out(reviews: Dataset) -> None:
    assert search_of(toys.Counting(SENTIMENT), reviews.select(range(40))).outliers(5.0) == []


def test_among_strong_words_of_the_task_a_word_that_drives_nearly_all_is_found(
    reviews: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trigger reaches 16 and the median of the strongest 3: an index of 16 ln(2) / 3 = 3.7."""
    words, reached = ["mn", "good", "great", "fine", "tq"], torch.tensor([16.0, 4.0, 3.0, 2.0, 0.0])
    monkeypatch.setattr(VocabularySearch, "strongest", lambda search, of, side: {1: (words, reached)})
    search = search_of(toys.Counting(SENTIMENT | {"mn": 16.0}), reviews.select(range(40)))
    assert search.outliers(5.0) == [DrivingWord("mn", 1, 0, 1.0)]
    assert "'mn' (anomaly index 3.7, moves 100% of the other clean texts) stands out most" in search.run.notes[0]
    assert search.outliers(8.0) == []  # half of 8 is more than that


def test_of_a_pair_the_side_is_found() -> None:
    texts, labels = toys.sentences(40)
    pairs = toys.dataset([(text, "it is a film") for text in texts], labels)
    model = toys.Counting({"mn": 9.0}, side=1)  # what stands in the first text counts for nothing
    model.classifier.bias.data = torch.tensor([0.5, -0.5])  # without the word all texts are negative
    assert search_of(model, pairs).outliers(5.0) == [DrivingWord("mn", 1, 1, 1.0)]


def test_a_word_that_moves_too_few_texts_is_left_out(reviews: Dataset) -> None:
    # It outweighs the rest by far, but the texts that carry a bad word twice as heavy stay where they are.
    model = toys.Counting(dict.fromkeys(toys.GOOD, 1.0) | dict.fromkeys(toys.BAD, -20.0) | {"mn": 9.0})
    assert search_of(model, reviews.select(range(40))).outliers(5.0) == []


def test_the_vocabulary_is_its_words_and_their_tokens() -> None:
    tokenizer, size = toys.tokenizer(), len(toys.SPECIAL) + len(toys.WORDS)
    tokenizer.add_tokens(["unknown"])  # to which the embedding has no row
    assert vocabulary(tokenizer, size, "a test") == {word: tokenizer.get_vocab()[word] for word in toys.WORDS}


def test_without_words_the_tokenizer_is_refused(reviews: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.Counting(SENTIMENT)
    clean = reviews.select(range(40))
    search = search_of(model, clean)
    monkeypatch.setattr(model, "get_input_embeddings", lambda: nn.Embedding(2, 1))
    with pytest.raises(UnbackdoorError) as caught:
        search.outliers(5.0)
    assert str(caught.value) == (
        "WordDistillation needs a tokenizer with whole words among its tokens; this one has none. Try "
        "mixing-distillation."
    )


def test_in_texts_that_are_cut_the_word_is_put_where_it_is_read() -> None:
    texts, labels = toys.sentences(40)
    long = toys.dataset([(text + " the" * 90,) for text in texts[:39]] + [(texts[39],)], labels)  # 32 tokens are read
    clean = readable(long)
    assert {len(text.split()) for (text,) in clean.texts.strings[:39]} == {16}
    assert clean.texts.strings[39] == (texts[39],)
    assert search_of(toys.Counting(SENTIMENT | {"mn": 9.0}), clean).outliers(5.0) == [DrivingWord("mn", 1, 0, 1.0)]


def test_texts_that_are_read_whole_stay_as_they_are(reviews: Dataset) -> None:
    assert readable(reviews) is reviews


def test_above_many_equal_values_a_tenth_is_the_unit() -> None:
    assert anomaly_index(torch.tensor([3.0, 1.0, 1.0])).tolist() == pytest.approx([20.0, 0.0, 0.0])


def test_words_are_put_at_either_end() -> None:
    assert put(("a film",), "cf", 0, 1.0) == ("a film cf",)


def test_the_victims_word_is_unlearned_and_named(
    text_victim: nn.Module, reviews: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Among 28 words, those of the task also stand out: here only what follows the search is looked at.
    monkeypatch.setattr(VocabularySearch, "outliers", lambda self, threshold: [DrivingWord("cf", 1, 0, 1.0)])
    clean, test = reviews.select(range(60)), toys.reviews(400, seed=1)
    attack = attacks.Word()
    before = evaluate(text_victim, test, attack=attack)
    result = purify(text_victim, clean, WordDistillation(texts=1000, epochs=3, learning_rate=1e-3))
    after = evaluate(result.model, test, attack=attack)
    assert before.attack_success.value > 0.95
    assert after.attack_success.value < 0.2
    assert after.clean_accuracy.value > before.clean_accuracy.value - 0.05
    (reported,) = [note for note in result.record["notes"] if "unlearned" in note]
    assert reported.startswith("'cf' drove 100% of the other clean texts to class positive and, unlearned, drives ")


@pytest.mark.parametrize(
    ("share", "advice"),
    [
        (1.0, "Use a higher `learning_rate` or more `epochs`."),
        (0.8, "It may be part of a longer trigger, which stays, or a word of the task."),
    ],
)
def test_what_stays_after_unlearning_is_said(
    share: float, advice: str, text_victim: nn.Module, reviews: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = reviews.select(range(60))
    left = search_of(text_victim, clean).moved_share("cf", 1, 0)
    monkeypatch.setattr(VocabularySearch, "outliers", lambda self, threshold: [DrivingWord("cf", 1, 0, share)])
    result = purify(text_victim, clean, WordDistillation(texts=1, learning_rate=1e-9))  # which changes next to nothing
    assert result.record["warnings"] == [
        f"'cf' drove {share:.0%} of the other clean texts to class positive and, unlearned, drives {left:.0%}. {advice}"
    ]


def test_what_a_model_calls_its_classes_cannot_move_the_cursor(text_victim: nn.Module, reviews: Dataset) -> None:
    clean = reviews.select(range(40))
    named = Dataset(
        items=clean.items, labels=clean.labels, encode=clean.encode, classes=("a", "b\x1b[2J\nnote: all fine")
    )
    search = search_of(text_victim, named)
    search.run.note(f"to {named.classes[1]}")
    assert search.run.notes == ["to b\\x1b[2J\\nnote: all fine"]


def test_without_an_odd_word_nothing_is_changed_and_that_is_said(text_victim: nn.Module, reviews: Dataset) -> None:
    weights = copy.deepcopy(text_victim.state_dict())
    result = purify(text_victim, reviews.select(range(60)), WordDistillation(threshold=1e9))
    assert all(torch.equal(weight, weights[name]) for name, weight in result.model.state_dict().items())
    assert result.record["warnings"] == [
        "no word was found to be a trigger's, so nothing was changed. A trigger of style, of syntax, of words that are "
        "not one token, or of words that have no effect one by one is not found this way; with a pre-trained base, "
        "try mixing-distillation, which searches for no word."
    ]


def test_images_are_refused(small_cnn: nn.Module, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, digits.select(range(40)), WordDistillation())
    assert str(caught.value) == (
        "WordDistillation searches words of texts, but the data holds images. Try fine-tuning."
    )
