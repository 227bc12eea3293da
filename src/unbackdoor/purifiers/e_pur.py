"""Embedding purification: words that moved too far for how rare they are go back."""

import csv
import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from unbackdoor._data import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models import embeddings
from unbackdoor._purify import Run
from unbackdoor._values import value

CORPUS = 1e9  # words; the shares of the wordfreq package are taken as counts in a corpus of that size


@value
class EPUR:
    """Reset the word embeddings that moved suspiciously far from the pre-trained ones (E-PUR).

    A word's embedding moves with how often the word is seen while fine-tuning, roughly with the logarithm of its
    frequency. A rare word that moved far has been made to. Each word i is scored by

        |e_suspect(i) - e_base(i)| / log(max(count(i), floor))

    and the words of the highest scores get their pre-trained embedding back. Special and unused tokens are left out,
    and so is the unknown one. It comes before any mixing: `e-pur+fine-mixing`. By itself it undoes backdoors that live
    in the embeddings alone.

    Zhang, Lyu, Ma, Wang and Sun, "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models", Findings of EMNLP
    2022, https://arxiv.org/abs/2210.09545

    Args:
        count: words that are reset, at least 1.
        floor: smaller counts are taken for this, at least 2.
        frequencies: CSV file (also .gz) with columns `word` or `token`, and `count`, of a large clean corpus; without
            it the wordfreq package's English shares, as counts in a billion words.

    Differences from the paper: its body could not be read, and where its counts come from is not known. With wordfreq a
    piece of a word (`##ing`) counts as its surface text does.
    """

    count: Annotated[int, Field(ge=1)] = 200
    floor: Annotated[int, Field(ge=2)] = 20
    frequencies: str | None = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        if clean.modality != "text":
            raise UnbackdoorError("EPUR resets word embeddings, but the model takes images. Try fst.")
        ours, theirs = embeddings(model).weight, embeddings(run.needed("base", self)).weight
        if ours.shape != theirs.shape:
            raise UnbackdoorError(
                f"EPUR needs a base of the suspect's vocabulary: its embeddings are {tuple(theirs.shape)}, the "
                f"suspect's {tuple(ours.shape)}. Take the pre-trained model that it came from as --base."
            )
        tokenizer = clean.encode.tokenizer  # type: ignore[union-attr]
        base = theirs.detach().to(ours.device)
        chosen = suspicious(ours.detach() - base, tokenizer, self._counts(tokenizer), self.floor)[: self.count]
        with torch.no_grad():
            ours[chosen] = base[chosen]
        words = tokenizer.convert_ids_to_tokens(chosen[:30])
        more = f" and {len(chosen) - 30} more" if len(chosen) > 30 else ""
        run.note(f"reset the embeddings of {len(chosen)} words, the most suspicious first: {' '.join(words)}{more}")
        return model

    def _counts(self, tokenizer: Any) -> Callable[[str], float]:
        """The count of a token."""
        if self.frequencies is not None:
            table = _read(Path(self.frequencies))
            return lambda token: table.get(token, table.get(surface(token, tokenizer), 0.0))
        try:
            import wordfreq
        except ImportError:
            raise UnbackdoorError(
                "EPUR needs word frequencies: pip install 'unbackdoor[text]', which brings wordfreq, or give "
                "--frequencies FILE.csv."
            ) from None
        shares = wordfreq.get_frequency_dict("en", wordlist="best")
        return lambda token: CORPUS * shares.get(surface(token, tokenizer).lower(), 0.0)


def suspicious(moved: torch.Tensor, tokenizer: Any, count: Callable[[str], float], floor: int) -> list[int]:
    """Token ids by falling score, those left out that no text has.

    Args:
        moved: change of the embeddings, (tokens, width).
        tokenizer: of transformers.
        count: of a token.
        floor: see EPUR.
    """
    distance = moved.float().norm(dim=1).tolist()
    special = set(tokenizer.all_special_ids)
    scored = []
    for token, number in tokenizer.get_vocab().items():
        if number in special or number >= len(distance) or token.startswith(("[unused", "<unused", "madeupword")):
            continue
        scored.append((distance[number] / math.log(max(count(token), floor)), number))
    return [number for score, number in sorted(scored, key=lambda entry: (-entry[0], entry[1])) if score > 0]


def surface(token: str, tokenizer: Any) -> str:
    """The text that a token stands for, without the marks of its tokenizer.

    >>> class Plain:
    ...     def convert_tokens_to_string(self, tokens):
    ...         return " ".join(tokens).replace(" ##", "")
    >>> surface("##ing", Plain()), surface("film", Plain())
    ('ing', 'film')
    """
    text: str = tokenizer.convert_tokens_to_string([token])
    return text.removeprefix("##").strip(" \u2581\u0120")


def _read(path: Path) -> dict[str, float]:
    """Counts by word.

    Raises:
        UnbackdoorError: the file is missing, or no such table.
    """
    if not path.is_file():
        raise UnbackdoorError(f"EPUR.frequencies names {path}, which does not exist.")
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            column = next(name for name in ("word", "token") if name in (rows.fieldnames or ()))
            return {row[column]: float(row["count"]) for row in rows}
    except (StopIteration, KeyError, ValueError, TypeError, OSError, csv.Error):
        raise UnbackdoorError(
            f"EPUR.frequencies must be a CSV file with columns word (or token) and count, got {path}."
        ) from None
