"""Frequencies of words and tokens, from the wordfreq package or from a table of the user."""

import csv
import gzip
import math
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from unbackdoor._errors import UnbackdoorError

CORPUS = 1e9  # words; the shares of the wordfreq package are turned into counts in a corpus of that size

# By tokenizer: its number of tokens, and their counts. Tokenising wordfreq's 320,000 words takes seconds.
_ENGLISH: WeakKeyDictionary[Any, tuple[int, dict[int, float]]] = WeakKeyDictionary()


def token_counts(tokenizer: Any, table: str | None, owner: str) -> dict[int, float]:
    """Returns the count of each token id that has one.

    Args:
        tokenizer: a tokenizer of transformers.
        table: CSV file (also .gz) with columns `word` or `token`, and `count`; None for wordfreq's English.
        owner: name of the method, for messages.

    Raises:
        UnbackdoorError: the file is missing, not such a table or one for another tokenizer, or wordfreq is not
            installed.
    """
    if table is not None:
        counts, unit = _read_counts(Path(table), owner)
        if unit == "token":
            vocabulary = tokenizer.get_vocab()
            of_tokens = {vocabulary[token]: count for token, count in counts.items() if token in vocabulary}
            if not of_tokens:
                raise UnbackdoorError(
                    f"{owner}.frequencies names {table}, but the model's tokenizer has none of its tokens. Take counts "
                    "of its own tokens, or of words."
                )
            return of_tokens
        return counted(counts, tokenizer)
    wordfreq = _wordfreq(f"{owner} needs word frequencies", ", or pass `frequencies=FILE.csv`")
    size, english = _ENGLISH.get(tokenizer, (0, {}))
    if size != len(tokenizer):
        shares = dict(wordfreq.get_frequency_dict("en", wordlist="large"))  # down to ten words in a billion
        for token in tokenizer.get_vocab():  # the list has only the shapes of numbers, such as 0000s
            text = tokenizer.convert_tokens_to_string([token]).strip().removeprefix("##")
            if any(letter.isdigit() for letter in text):
                shares[text] = wordfreq.word_frequency(text, "en")
        english = counted({word: CORPUS * share for word, share in shares.items()}, tokenizer)
        _ENGLISH[tokenizer] = len(tokenizer), english
    return english


def common_words(count: int, owner: str) -> list[str]:
    """The most frequent English words, the most frequent first.

    Raises:
        UnbackdoorError: wordfreq is not installed.
    """
    words: list[str] = _wordfreq(f"{owner} needs common words", "").top_n_list("en", count)
    return words


def _wordfreq(wish: str, otherwise: str) -> Any:
    try:
        import wordfreq
    except ImportError:
        raise UnbackdoorError(f"{wish}: pip install 'unbackdoor[text]', which brings wordfreq{otherwise}.") from None
    return wordfreq


def counted(words: dict[str, float], tokenizer: Any) -> dict[int, float]:
    """Returns the count of each token in a corpus with known counts of words.

    Each word is tokenised alone, and also after a space and capitalised if the tokenizer distinguishes these; a token
    gets the counts of all words that it is part of. Lists of words leave punctuation out, so tokens without any letter
    or digit count as the most frequent word does.
    """
    forms = [list(words)]
    if tokenizer.tokenize(" a") != tokenizer.tokenize("a"):
        forms += [[f" {word}" for word in words]]
    if tokenizer.tokenize("A") != tokenizer.tokenize("a"):
        forms += [[form.title() for form in some] for some in forms]
    counts: dict[int, float] = {}
    once: set[tuple[str, tuple[int, ...]]] = set()
    for some in forms:
        for (word, count), ids in zip(words.items(), _token_ids(some, tokenizer), strict=True):
            if (word, ids) not in once:
                once.add((word, ids))
                for token in ids:
                    counts[token] = counts.get(token, 0.0) + count
    most = max(words.values(), default=0.0)
    for token, number in tokenizer.get_vocab().items():
        if not any(letter.isalnum() for letter in tokenizer.convert_tokens_to_string([token])):
            counts[number] = most
    return counts


def _token_ids(texts: list[str], tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """The token ids of each text, without the tokens that stand around it.

    Only the ids are fetched from a tokenizer in Rust: masks and places would take ten times as long.
    """
    remaining = iter(texts)
    while part := list(islice(remaining, 10_000)):
        # Also switches off the truncation and the padding that the tokenizer's file asks for.
        tokenizer(part[0], add_special_tokens=False)
        if tokenizer.is_fast:
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(part, add_special_tokens=False)
            yield from (tuple(each.ids) for each in encodings)
        else:
            yield from map(tuple, tokenizer(part, add_special_tokens=False)["input_ids"])


def _read_counts(path: Path, owner: str) -> tuple[dict[str, float], str]:
    """Reads counts, and whether they are of a `word` or a `token`.

    Raises:
        UnbackdoorError: the file is missing, or not such a table; names the row, counted from 0, that does not fit.
    """
    if not path.is_file():
        raise UnbackdoorError(f"{owner}.frequencies names {path}, which does not exist.")
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:  # Excel begins with a mark of the encoding
            rows = csv.DictReader(file)
            column = next(name for name in ("word", "token") if name in (rows.fieldnames or ()))
            entries = [(row[column] or "", float(row["count"])) for row in rows]
    except (StopIteration, KeyError, ValueError, TypeError, OSError, EOFError, zlib.error, csv.Error):
        raise UnbackdoorError(
            f"{owner}.frequencies must be a CSV file with columns word (or token) and count, got {path}."
        ) from None
    if not entries:
        raise UnbackdoorError(
            f"{owner}.frequencies must have a row for each {column}, got {path}, which has none. Add some."
        )
    for row, (entry, count) in enumerate(entries):
        where = f"in row {row} of {path}. Correct or remove that row."
        if not (entry.strip() if column == "word" else entry):  # some vocabularies have tokens that are only blanks
            raise UnbackdoorError(f"{owner}.frequencies must have a {column} in each row, got none {where}")
        if not 0 <= count < math.inf:
            raise UnbackdoorError(f"{owner}.frequencies must have finite counts of at least 0, got {count:g} {where}")
    return dict(entries), column
