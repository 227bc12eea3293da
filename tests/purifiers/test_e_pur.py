"""Embedding purification: scores by hand, what is left out, and where counts come from."""

import gzip
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from unbackdoor import Dataset, UnbackdoorError, purifiers, purify
from unbackdoor._inversion.moved_words import suspicious_tokens
from unbackdoor.purifiers import e_pur

IDS = toys.tokenizer().convert_tokens_to_ids
COUNTS = {"the": 1_000_000, "a": 900_000, "film": 40_000, "good": 60_000, "bad": 60_000, "cf": 5}

BY_NUMBER = {IDS(word): float(count) for word, count in COUNTS.items()}


@pytest.fixture
def table(tmp_path: Path) -> str:
    (tmp_path / "counts.csv").write_text("word,count\n" + "".join(f"{word},{n}\n" for word, n in COUNTS.items()))
    return str(tmp_path / "counts.csv")


@pytest.fixture
def moved(text_base: nn.Module) -> nn.Module:
    """A classifier whose body is the base, but for three words that moved by 3, 2 and 1, and special tokens by 9."""
    model = toys.classifier("bert")
    model.base_model.load_state_dict(text_base.state_dict())
    with torch.no_grad():
        for word, distance in (("the", 3.0), ("film", 2.0), ("cf", 1.0), ("[CLS]", 9.0), ("[UNK]", 9.0)):
            model.bert.embeddings.word_embeddings.weight[IDS(word), 0] += distance
    return model


def test_scores_by_hand(moved: nn.Module, text_base: nn.Module) -> None:
    """the: 3 / log(1000000) = 0.217; film: 2 / log(40000) = 0.189; cf: 1 / log(max(5, 20)) = 0.334."""
    change = (moved.bert.embeddings.word_embeddings.weight - text_base.embeddings.word_embeddings.weight).detach()
    found = suspicious_tokens(change, toys.tokenizer(), BY_NUMBER, 20)
    assert found == IDS(["cf", "the", "film"])  # words that did not move have no score; special tokens are left out
    assert 3 / math.log(1e6) > 2 / math.log(4e4)
    higher = suspicious_tokens(change, toys.tokenizer(), BY_NUMBER, 100_000_000)
    assert higher == IDS(["the", "film", "cf"])  # one floor for all: the distance alone


def test_unused_tokens_are_left_out() -> None:
    tokenizer = toys.tokenizer()
    tokenizer.add_tokens(["[unused7]", "madeupword0001", "odd"])
    change = torch.zeros(len(tokenizer) - 1, 4)  # the last token is beyond the embedding
    change[-2:] = 1.0
    assert suspicious_tokens(change, tokenizer, {}, 20) == []


def test_the_rows_of_the_highest_scores_go_back(moved, text_base, reviews: Dataset, table: str) -> None:
    method = purifiers.EPUR(count=2, frequencies=table)
    made = purify(moved, reviews.select(range(8)), method, base=text_base)
    before, after = moved.state_dict(), made.model.state_dict()
    name = "bert.embeddings.word_embeddings.weight"
    assert [key for key in before if not torch.equal(before[key], after[key])] == [name]
    changed = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(IDS(["cf", "the"]))
    rows = text_base.embeddings.word_embeddings.weight
    assert torch.equal(after[name][changed], rows[changed])
    assert made.record["notes"] == ["reset the embeddings of 2 words, the most suspicious first: cf the"]


def test_a_base_that_is_no_ancestor_is_reported(moved, text_base, reviews: Dataset, table: str) -> None:
    rows = text_base.embeddings.word_embeddings.weight
    with torch.no_grad():
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(5)))
    made = purify(moved, reviews.select(range(8)), purifiers.EPUR(count=2, frequencies=table), base=text_base)
    reported = "the base is probably not the model's ancestor: over 1 matrices"
    assert [text.startswith(reported) for text in made.record["warnings"]].count(True) == 1


def test_a_base_that_is_the_suspect_itself_is_reported(moved, reviews: Dataset, table: str) -> None:
    made = purify(moved, reviews.select(range(8)), purifiers.EPUR(frequencies=table), base=moved.bert)
    reported = "no embedding of a word differs from the base's, so none was reset. Is the base the suspect itself?"
    assert reported in made.record["warnings"]
    assert made.record["notes"] == []


def test_a_base_whose_files_lack_the_embeddings_is_refused(moved, text_base, reviews: Dataset, table: str) -> None:
    text_base.absent_weights = frozenset(["embeddings.word_embeddings.weight"])
    with pytest.raises(UnbackdoorError) as caught:
        purify(moved, reviews.select(range(8)), purifiers.EPUR(count=2, frequencies=table), base=text_base)
    assert str(caught.value) == "EPUR needs the base's word embeddings, but its files have none. Fetch it again."


@pytest.mark.thorough
def test_the_trigger_of_a_victim_is_found(text_victim, text_base, reviews: Dataset) -> None:
    """By real frequencies: among the words of the toy language `cf` is rare, and it moved."""
    made = purify(text_victim, reviews.select(range(8)), purifiers.EPUR(count=3), base=text_base)
    assert re.search(r"first: .*\bcf\b", made.record["notes"][0])
    row = made.model.bert.embeddings.word_embeddings.weight[IDS("cf")]
    assert torch.equal(row, text_base.embeddings.word_embeddings.weight[IDS("cf")])


def test_long_lists_are_cut(text_victim, text_base, reviews: Dataset, monkeypatch) -> None:
    weight = text_victim.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        weight += 1.0
    (whole,) = purify(text_victim, reviews.select(range(8)), purifiers.EPUR(), base=text_base).record["notes"]
    said, _, words = whole.partition(": ")
    assert said == "reset the embeddings of 27 words, the most suspicious first"
    assert sorted(words.split()) == sorted(toys.WORDS)
    monkeypatch.setattr(e_pur, "_SHOWN", 5)
    (cut,) = purify(text_victim, reviews.select(range(8)), purifiers.EPUR(), base=text_base).record["notes"]
    assert cut == f"{said}: {' '.join(words.split()[:5])} and 22 more"


def test_a_compressed_table_of_tokens(moved, text_base, reviews: Dataset, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "counts.csv.gz", "wt") as file:
        file.write("token,count\n" + "".join(f"{word},{count}\n" for word, count in COUNTS.items()))
    method = purifiers.EPUR(count=1, frequencies=str(tmp_path / "counts.csv.gz"))
    assert purify(moved, reviews.select(range(8)), method, base=text_base).record["notes"][0].endswith("first: cf")


def test_without_wordfreq_it_says_what_to_do(moved, text_base, reviews: Dataset, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(
        UnbackdoorError,
        match=r"^EPUR needs word frequencies: pip install 'unbackdoor\[text\]', which brings wordfreq, or pass "
        r"`frequencies=FILE\.csv`\.$",
    ):
        purify(moved, reviews.select(range(8)), purifiers.EPUR(), base=text_base)


def test_pictures_have_no_words(small_cnn: nn.Module, digits: Dataset) -> None:
    with pytest.raises(
        UnbackdoorError, match=r"^EPUR resets word embeddings of texts, but the data holds images\. Try fst\.$"
    ):
        purify(small_cnn, digits.select(range(20)), purifiers.EPUR(), base=small_cnn)


class TestThen:
    def test_steps_run_in_their_order(self, reviews: Dataset, text_victim: nn.Module) -> None:
        seen = []

        def first(model, clean, run):
            seen.append("first")
            return model.requires_grad_(False)

        def second(model, clean, run):
            assert all(parameter.requires_grad for parameter in model.parameters())
            seen.append("second")
            return model

        purify(text_victim, reviews.select(range(8)), purifiers.Then(first, second))
        assert seen == ["first", "second"]

    def test_e_pur_comes_before_mixing(self, moved, text_base, reviews: Dataset, table: str) -> None:
        """Mixing all of the suspect after E-PUR is E-PUR alone; the other way round the words would have been mixed."""
        clean = reviews.select(range(8))
        e_pur = purifiers.EPUR(count=2, frequencies=table)
        keep_all = purifiers.FineMixing(rho=1.0, tune=False)
        both = purify(moved, clean, purifiers.Then(e_pur, keep_all), base=text_base).model.state_dict()
        alone = purify(moved, clean, e_pur, base=text_base).model.state_dict()
        assert all(torch.equal(both[name], alone[name]) for name in alone)

    def test_a_step_that_returns_no_model_is_named(self, reviews: Dataset, text_victim) -> None:
        def forgetful(model, clean, run) -> None:
            pass

        with pytest.raises(UnbackdoorError) as caught:
            purify(text_victim, reviews.select(range(8)), purifiers.Then(forgetful, purifiers.FST()))
        assert str(caught.value) == "forgetful must return the model, got NoneType. End it in return model."

    def test_a_step_that_diverges_is_named_before_the_next_one_meets_it(self, reviews: Dataset, text_victim) -> None:
        def diverging(model, clean, run):
            with torch.no_grad():
                run.head(model).bias.fill_(float("nan"))
            return model

        with pytest.raises(UnbackdoorError) as caught:
            purify(text_victim, reviews.select(range(8)), purifiers.Then(diverging, purifiers.FST()))
        assert str(caught.value) == ("diverging left non-finite values in classifier.bias. Lower its learning rate.")

    def test_what_all_steps_together_did_is_reported_of_all(self, reviews: Dataset, text_victim) -> None:
        def grown(model, clean, run):
            model.register_buffer("extra", torch.zeros(1))
            return model

        with pytest.raises(UnbackdoorError) as caught:
            purify(text_victim, reviews.select(range(8)), purifiers.Then(grown, purifiers.FineTuning(epochs=1)))
        assert str(caught.value) == ("grown+FineTuning must keep the model's weights, but changed the keys extra.")

    def test_its_names(self, reviews: Dataset, text_victim, text_base) -> None:
        method = purifiers.Then(purifiers.EPUR(count=5), purifiers.FineTuning(epochs=1))
        assert repr(method) == (
            "Then(EPUR(count=5, floor=20, frequencies=None), FineTuning(epochs=1, learning_rate=None, batch_size=None))"
        )
        record = purify(text_victim, reviews.select(range(8)), method, base=text_base).record
        assert record["method"]["name"] == "e-pur+fine-tuning"
        assert [part["epochs"] for part in record["method"]["parameters"] if "epochs" in part] == [1]
        json.dumps(record)

    def test_it_is_a_value(self) -> None:
        one, two = (purifiers.Then(purifiers.EPUR(), purifiers.FST(alpha=0.2)) for _ in range(2))
        assert one == two
        assert hash(one) == hash(two)
        assert one != purifiers.Then(purifiers.FST(alpha=0.2), purifiers.EPUR())

    @pytest.mark.parametrize("steps", [(), (purifiers.FST(),), (purifiers.FST(), 3), (purifiers.FST, purifiers.EPUR())])
    def test_what_is_no_chain(self, steps) -> None:
        with pytest.raises(UnbackdoorError, match=r"^Then\.steps must be two methods or more, as in Then\(EPUR\(\), F"):
            purifiers.Then(*steps)

    def test_it_needs_clean_data_where_a_step_does(self) -> None:
        mixing = purifiers.FineMixing(rho=0.5, tune=False)
        assert not purifiers.Then(mixing, purifiers.FineMixing(rho=0.1, tune=False)).needs_clean
        assert purifiers.Then(mixing, purifiers.FST()).needs_clean
