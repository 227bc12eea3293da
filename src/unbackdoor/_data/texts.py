"""Texts: tokenised once, kept as token ids, handed out in batches that are as long as their longest text."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import reading, silent_rust

logger = logging.getLogger("unbackdoor")

_LONGEST = 1_000_000  # characters of one text; a long novel has as many, and no classifier reads a hundredth of it


class Tokens(dict[str, Tensor]):
    """The input of a text model: `input_ids`, `attention_mask` and so on, each (batch, length)."""

    @property
    def shape(self) -> torch.Size:
        """(batch, length)."""
        return self["input_ids"].shape

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Tokens":
        """The same tokens on another device; ids have no precision, so the type of a model changes nothing."""
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})

    def __len__(self) -> int:
        return len(self["input_ids"]) if self.keys() else 0


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts or pairs of texts, and their tokens once an encoder has made them.

    Args:
        strings: n tuples of one text, or of two.
        columns: what the data calls them: `text`, or `text_a` and `text_b`.
        tokens: each (n, longest), padded, int32; None before an encoder has seen them.
        lengths: tokens per text, (n,).
        cut: which texts were longer than the model reads, (n,), bool.
        made_by: the encoder of the tokens.
    """

    strings: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    tokens: dict[str, Tensor] | None = None
    lengths: Tensor | None = None
    cut: Tensor | None = None
    made_by: "TextEncoder | None" = None

    def __len__(self) -> int:
        return len(self.strings)

    def __getitem__(self, rows: Tensor | slice) -> "Texts":
        """Some of the texts, in the order of `rows` (row numbers or a mask)."""
        if isinstance(rows, slice):
            chosen = list(range(len(self)))[rows]
        else:
            chosen = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist()
        some = replace(self, strings=tuple(self.strings[row] for row in chosen))
        if self.tokens is None or self.lengths is None or self.cut is None:
            return some
        index = torch.tensor(chosen, dtype=torch.int64, device=self.lengths.device)
        tokens = {name: tensor[index] for name, tensor in self.tokens.items()}
        return replace(some, tokens=tokens, lengths=self.lengths[index], cut=self.cut[index])

    def replaced(self, rows: Tensor, texts: "Texts") -> "Texts":
        """These texts with some rows taken from others; not yet tokenised."""
        strings = list(self.strings)
        for row, new in zip(rows.tolist(), texts.strings, strict=True):
            strings[row] = new
        return Texts(tuple(strings), self.columns)

    def to(self, device: torch.device | str) -> "Texts":
        """The same texts with their tokens on another device."""
        if self.tokens is None or self.lengths is None or self.cut is None:
            return self
        tokens = {name: tensor.to(device) for name, tensor in self.tokens.items()}
        return replace(self, tokens=tokens, lengths=self.lengths.to(device), cut=self.cut.to(device))


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """From texts to the input of a model.

    Args:
        tokenizer: of transformers, with a padding token.
        max_length: tokens that the model reads of a text or a pair, at least 4; the rest is cut off.
        columns: `text`, or `text_a` and `text_b`, where the model's record names them; None for what the data has.

    Raises:
        UnbackdoorError: max_length is below 4, or more than the tokenizer allows.
    """

    tokenizer: Any
    max_length: int
    columns: tuple[str, ...] | None = None

    modality: ClassVar[Literal["text"]] = "text"

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise UnbackdoorError(f"--max-length must be at least 4, got {self.max_length}.")

    def __call__(self, texts: Texts) -> Tokens:
        """The tokens of a batch, int64, cut to its longest text.

        Args:
            texts: as `prepared` returns them.
        """
        prepared = self.prepared(texts)
        assert prepared.tokens is not None
        assert prepared.lengths is not None
        longest = max(int(prepared.lengths.max()), 1)
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        part = slice(-longest, None) if left else slice(0, longest)
        return Tokens({name: tensor[:, part].long() for name, tensor in prepared.tokens.items()})

    def prepared(self, items: Any) -> Texts:
        """Texts with the tokens of this encoder, made once."""
        if not isinstance(items, Texts):
            raise UnbackdoorError("The model reads text, but the data holds images. Take texts.")
        if items.made_by is self or items.made_by == self:
            return items
        if len(items) == 0:
            empty = torch.zeros(0, dtype=torch.int32)
            return replace(
                items, tokens={"input_ids": empty[:, None]}, lengths=empty.long(), cut=empty.bool(), made_by=self
            )
        sides = [list(side) for side in zip(*items.strings, strict=True)]
        with reading("the tokenizer of the model"), silent_rust():  # which comes from others
            made = self.tokenizer(
                *sides,
                truncation="longest_first" if len(sides) > 1 else True,
                max_length=self.max_length,
                padding=True,
                return_attention_mask=True,
            )
            tokens = {name: torch.tensor(made[name], dtype=torch.int32) for name in made}
        lengths = tokens["attention_mask"].sum(dim=1).long()
        cut = lengths >= self.max_length
        if cut.any():  # these may fit exactly: only a second look tells
            whole = torch.nonzero(cut).flatten().tolist()
            full = self.tokenizer(*[[side[row] for row in whole] for side in sides], truncation=False, verbose=False)
            cut[whole] = torch.tensor([len(ids) > self.max_length for ids in full["input_ids"]])
        return replace(items, tokens=tokens, lengths=lengths, cut=cut, made_by=self)

    def loses(self, texts: Texts, phrases: Sequence[str]) -> Tensor:
        """In which texts one of some phrases stands, wholly or in part, beyond what the model reads, (n,), bool."""
        prepared = self.prepared(texts)
        assert prepared.tokens is not None
        assert prepared.cut is not None
        lost = torch.zeros(len(texts), dtype=torch.bool)
        rows = torch.nonzero(prepared.cut).flatten().tolist()
        if not rows or not phrases:
            return lost
        forms = [form for phrase in phrases for form in (phrase, f" {phrase}")]
        sought = {_spelt(ids) for ids in self.tokenizer(forms, add_special_tokens=False)["input_ids"]} - {""}
        sides = zip(*(texts.strings[row] for row in rows), strict=True)
        whole = self.tokenizer(*map(list, sides), truncation=False, verbose=False)["input_ids"]
        for row, ids in zip(rows, whole, strict=True):
            written, read = _spelt(ids), _spelt(prepared.tokens["input_ids"][row].tolist())
            lost[row] = any(written.count(phrase) > read.count(phrase) for phrase in sought)
        return lost

    def read(self, cells: dict[str, Sequence[Any]], where: str, folder: Path | None) -> tuple[Texts, "TextEncoder"]:
        """Check and tokenise the text columns of a data set.

        Args:
            cells: the entries of `text`, or of `text_a` and `text_b`.
            where: named in messages.
            folder: not used; texts lie in the table itself.

        Returns:
            The texts, and the encoder of these.

        Raises:
            UnbackdoorError: an entry is empty, no text, or without a token; names the row.
        """
        for name, column in cells.items():
            for row, text in enumerate(column):
                if not isinstance(text, str) or not text.strip():
                    came = "an empty text" if isinstance(text, str) else f"{type(text).__name__} in place of a text"
                    came = "no text" if text is None else came
                elif len(text) > _LONGEST:
                    came = f"a text of {len(text):,} characters (at most {_LONGEST:,} are read)"
                elif not _is_unicode(text):
                    came = "text that is no Unicode"
                else:
                    continue
                raise UnbackdoorError(
                    f"{where} has {came} in row {row} of {printable(name)}. Repair or remove that row."
                )
        texts = self.prepared(Texts(tuple(zip(*cells.values(), strict=True)), tuple(cells)))
        assert texts.cut is not None
        self._check_tokens(texts, where)
        if texts.cut.any():
            logger.info(
                "%s: %s texts are cut to %d tokens, the most that the model reads (--max-length).",
                where,
                f"{int(texts.cut.sum()):,} of {len(texts):,}",
                self.max_length,
            )
        return texts, self

    def _check_tokens(self, texts: Texts, where: str) -> None:
        """Refuse texts of which the tokenizer makes nothing, such as a zero-width space; few are looked at again."""
        assert texts.lengths is not None
        pair = len(texts.columns) > 1
        odd = texts.lengths <= self.tokenizer.num_special_tokens_to_add(pair=pair)
        if pair:  # the length does not tell of one side alone
            odd |= torch.tensor([not all(map(_has_letter, sides)) for sides in texts.strings])
        rows = odd.nonzero().flatten().tolist()
        for name, side in zip(texts.columns, zip(*(texts.strings[row] for row in rows), strict=True), strict=False):
            made = self.tokenizer(list(side), add_special_tokens=False, verbose=False)["input_ids"]
            for row, ids in zip(rows, made, strict=True):
                if not ids:
                    raise UnbackdoorError(
                        f"{where} has an empty text (no token for this tokenizer) in row {row} of {name}. Repair or "
                        "remove that row."
                    )


def _is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_letter(text: str) -> bool:
    return any(map(str.isalnum, text))


def _spelt(ids: Sequence[int]) -> str:
    """Tokens as letters, so that a phrase is found as text is."""
    return "".join(map(chr, ids))
