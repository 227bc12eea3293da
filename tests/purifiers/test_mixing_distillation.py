"""Mixing distillation: what the texts are made of, what they teach, what is refused."""

import sys

import pytest
import torch
from torch import nn

from toys import a_run
from unbackdoor import Dataset, UnbackdoorError, purify
from unbackdoor._data.frequencies import common_words
from unbackdoor._models.arithmetic import choose
from unbackdoor._tasks.classification import answers
from unbackdoor.purifiers import MixingDistillation


def test_without_exchanges_the_texts_are_the_clean_ones(text_victim: nn.Module, reviews: Dataset) -> None:
    clean = reviews.select(range(10))
    made = MixingDistillation(texts=20, clean_share=0, common_share=0)._recombined(clean, a_run(model=text_victim), [])
    assert made.texts.strings[:10] == clean.texts.strings
    assert len(made) == 30
    assert set(made.texts.strings) == set(clean.texts.strings)


def test_words_come_from_where_the_shares_say(text_victim: nn.Module, reviews: Dataset) -> None:
    clean = reviews.select(range(10))
    own = {word for (text,) in clean.texts.strings for word in text.split()}
    lengths = {len(text.split()) for (text,) in clean.texts.strings}
    exchanged = MixingDistillation(texts=40, clean_share=1, common_share=0)._recombined(
        clean, a_run(model=text_victim), []
    )
    for (text,) in exchanged.texts.strings[10:]:
        assert set(text.split()) <= own
        assert len(text.split()) in lengths
    common = MixingDistillation(texts=40, clean_share=0, common_share=1)
    for (text,) in common._recombined(clean, a_run(model=text_victim), ["the", "to"]).texts.strings[10:]:
        assert set(text.split()) <= {"the", "to"}


def test_suspicious_words_are_not_put_in(reviews: Dataset) -> None:
    """Of 200 common words two are left out: those that moved, but for `of`, which moved less for a word as frequent."""
    tokenizer = reviews.tokenizer
    moved = torch.zeros(len(tokenizer), 4)
    for word, distance in (("the", 9.0), ("and", 8.0), ("of", 1.0)):
        moved[tokenizer.convert_tokens_to_ids(word)] = distance
    words = MixingDistillation()._unsuspicious(common_words(200, "a test"), moved, tokenizer)
    assert len(words) == 198
    assert {"the", "and", "of"} & set(words) == {"of"}


def test_answers_are_row_by_row_what_a_plain_loop_gives(text_victim: nn.Module, reviews: Dataset) -> None:
    data = reviews.select(range(20))
    found = answers(text_victim, data, choose(text_victim, "cpu", "fp32"))
    with torch.no_grad():
        plain = [text_victim(**data.encode(data.items[torch.tensor([row])])).logits[0] for row in range(20)]
    torch.testing.assert_close(found, torch.stack(plain), rtol=1e-4, atol=1e-5)


def test_shares_beyond_one_are_refused(text_victim: nn.Module, text_base: nn.Module, reviews: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(
            text_victim,
            reviews.select(range(10)),
            MixingDistillation(clean_share=0.7, common_share=0.6),
            base=text_base,
        )
    assert str(caught.value) == (
        "MixingDistillation.clean_share and common_share must be at most 1 together, got 0.7 and 0.6."
    )


def test_without_a_base_it_says_who_needs_one(text_victim: nn.Module, reviews: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(text_victim, reviews.select(range(10)), MixingDistillation())
    assert str(caught.value) == ("MixingDistillation needs `base`: the pre-trained model that the suspect came from.")


def test_images_are_refused(small_cnn: nn.Module, digits: Dataset) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        purify(small_cnn, digits.select(range(10)), MixingDistillation(), base=small_cnn)
    assert str(caught.value) == "MixingDistillation recombines texts, but the data holds images. Try fine-mixing."


def refusal(model: nn.Module, base: nn.Module, reviews: Dataset) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        purify(model, reviews.select(range(10)), MixingDistillation(), base=base)
    return str(caught.value)


class TestWhatItDelegatesIsRefusedInItsOwnName:
    def test_no_words(self, text_victim, text_base, reviews: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        """E-PUR's way out, a table of frequencies, is none here: there is no such option."""
        monkeypatch.setitem(sys.modules, "wordfreq", None)
        assert refusal(text_victim, text_base, reviews) == (
            "MixingDistillation needs common words: pip install 'unbackdoor[text]', which brings wordfreq."
        )

    def test_a_base_without_embeddings(self, text_victim, text_base, reviews: Dataset) -> None:
        text_base.absent_weights = frozenset(["embeddings.word_embeddings.weight"])
        assert refusal(text_victim, text_base, reviews) == (
            "MixingDistillation needs the base's word embeddings, but its files have none. Fetch it again."
        )

    def test_a_base_of_another_vocabulary(self, text_victim, text_base, reviews: Dataset) -> None:
        text_base.resize_token_embeddings(40, mean_resizing=False)
        assert refusal(text_victim, text_base, reviews) == (
            "MixingDistillation needs a base of the suspect's vocabulary: its embeddings are (40, 32), the suspect's "
            "(32, 32). Take the pre-trained model that it came from as `base`."
        )

    def test_a_model_that_is_all_head(self, reviews: Dataset) -> None:
        class Head(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 2)
                self.words = nn.Embedding(32, 4)

        class Bag(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = Head()

            def get_input_embeddings(self) -> nn.Module:
                return self.head.words

            def forward(self, input_ids, attention_mask, token_type_ids=None):
                return self.head((self.head.words(input_ids) * attention_mask[..., None]).mean(dim=1))

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, base = Bag(), Bag()
        assert refusal(model, base, reviews) == (
            "MixingDistillation needs a model with more than a head: nothing else has a counterpart in the base. Try "
            "fst."
        )
