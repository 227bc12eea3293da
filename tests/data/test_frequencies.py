"""Tables of word and token counts: what is read of them, and what is refused."""

import gzip
from pathlib import Path

import pytest
import wordfreq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import toys
from unbackdoor import UnbackdoorError
from unbackdoor._data.frequencies import counted, token_counts

IDS = toys.tokenizer().convert_tokens_to_ids


def counts(folder: Path, text: str, encoding: str = "utf-8") -> dict[int, float]:
    (folder / "counts.csv").write_text(text, encoding=encoding)
    return token_counts(toys.tokenizer(), str(folder / "counts.csv"), "EPUR")


def test_a_table_of_tokens(tmp_path: Path) -> None:
    assert counts(tmp_path, "token,count\ngood,3\nabsent,9\nbad,0\n") == {IDS("good"): 3.0, IDS("bad"): 0.0}


def test_a_table_of_words_counts_a_capital_letter_too(tmp_path: Path) -> None:
    """The toy tokenizer knows no capitals: `Good` and `Bad` are unknown to it, once each."""
    expected = {IDS("good"): 3.0, IDS("bad"): 2.0, IDS("[UNK]"): 5.0}
    assert counts(tmp_path, "word,count\ngood,3\nbad,2\n") == expected


def test_a_table_that_excel_wrote(tmp_path: Path) -> None:
    assert counts(tmp_path, "token,count\ngood,3\n", "utf-8-sig") == {IDS("good"): 3.0}


def test_without_a_table_words_count_as_often_as_wordfreq_says() -> None:
    """Frequent and rare ones, and numbers, which its lists have by their shape alone."""
    words = ["the", "cf", "smarmy", "1940s", "21st", "1987"]
    model = models.WordLevel({word: number for number, word in enumerate([*words, "zxqv", "[UNK]"])}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = token_counts(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"), None, "EPUR")
    shares = [wordfreq.word_frequency(word, "en") for word in words]
    assert shares[2] < 1e-6  # the smaller of its lists end there
    assert [found[number] for number in range(len(words))] == pytest.approx([1e9 * share for share in shares], rel=0.01)
    assert len(words) not in found


def test_tokens_that_are_added_later_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordfreq, "get_frequency_dict", lambda *_, **__: {"good": 3e-6, "odd": 5e-6})
    tokenizer = toys.tokenizer()
    assert token_counts(tokenizer, None, "EPUR")[IDS("good")] == pytest.approx(3000)
    tokenizer.add_tokens(["odd"])
    assert token_counts(tokenizer, None, "EPUR")[len(tokenizer) - 1] == pytest.approx(5000)


def test_a_table_for_another_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        counts(tmp_path, "token,count\n\u0120good,3\n")
    assert str(caught.value) == (
        f"EPUR.frequencies names {tmp_path}/counts.csv, but the model's tokenizer has none of its tokens. Take counts "
        "of its own tokens, or of words."
    )


def test_a_table_that_was_cut_off(tmp_path: Path) -> None:
    """A download that broke off."""
    whole = gzip.compress(b"token,count\ngood,3\n" * 1000)
    (tmp_path / "counts.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UnbackdoorError, match=r"^EPUR\.frequencies must be a CSV file with columns word \(or token\) and"
    ):
        token_counts(toys.tokenizer(), str(tmp_path / "counts.csv.gz"), "EPUR")


@pytest.mark.parametrize("column", ["word", "token"])
def test_words_that_look_like_nothing(column: str, tmp_path: Path) -> None:
    tokenizer = toys.tokenizer()
    odd = ["null", "nan", "na", ",", '"']
    tokenizer.add_tokens(odd)
    (tmp_path / "counts.csv").write_text(f'{column},count\nnull,7\nnan,7\nna,7\n",",7\n"""",7\n')
    found = token_counts(tokenizer, str(tmp_path / "counts.csv"), "EPUR")
    assert {word: found[tokenizer.convert_tokens_to_ids(word)] for word in odd} == dict.fromkeys(odd, 7.0)


def test_a_token_of_blanks_alone_is_one(tmp_path: Path) -> None:
    tokenizer = toys.tokenizer()
    tokenizer.add_tokens(["\n\n"])
    (tmp_path / "counts.csv").write_text('token,count\n"\n\n",7\n', newline="")
    assert list(token_counts(tokenizer, str(tmp_path / "counts.csv"), "EPUR").values()) == [7.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("word,count\n", "must have a row for each word, got D, which has none. Add some."),
        ("token,count\n", "must have a row for each token, got D, which has none. Add some."),
        ("word,count\ngood,3\nbad,nan\n", "must have finite counts of at least 0, got nan in row 1 of D. Correct or"),
        ("word,count\ngood,inf\n", "must have finite counts of at least 0, got inf in row 0 of D. Correct or remove"),
        ("token,count\ngood,3\na,1\nbad,-2\n", "must have finite counts of at least 0, got -2 in row 2 of D. Correct"),
        (
            "word,count\ngood,3\n,2\n",
            "must have a word in each row, got none in row 1 of D. Correct or remove that row.",
        ),
        ("word,count\n  ,2\n", "must have a word in each row, got none in row 0 of D. Correct or remove that row."),
        ("token,count\n,2\n", "must have a token in each row, got none in row 0 of D. Correct or remove that row."),
        (
            "count,word\n3,good\n2\n",
            "must have a word in each row, got none in row 1 of D. Correct or remove that row.",
        ),
        ("word,count\ngood,many\n", "must be a CSV file with columns word (or token) and count, got D."),
        ("word,number\ngood,3\n", "must be a CSV file with columns word (or token) and count, got D."),
    ],
)
def test_what_is_no_table(rows: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnbackdoorError) as caught:
        counts(tmp_path, rows)
    assert str(caught.value).startswith(f"EPUR.frequencies {message.replace('D', f'{tmp_path}/counts.csv')}")


def test_a_file_that_asks_for_truncation_and_padding_does_not_change_counts() -> None:
    backend = Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1, "good": 2, "##ness": 3}, unk_token="[UNK]"))
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    assert counted({"goodness": 3.0, "good": 2.0}, tokenizer) == {2: 5.0, 3: 3.0}
