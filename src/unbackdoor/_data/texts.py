"""Texts: tokenised once, kept as token ids, handed out in batches that are as long as their longest text."""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.columns import text_columns
from unbackdoor._data.lengths import ordered_by_length
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import is_unicode, reading, silent_rust

logger = logging.getLogger("unbackdoor")

_LONGEST = 1_000_000  # characters of one text: those of a long novel; classifiers read less than a hundredth of that


class Tokens(dict[str, Tensor]):
    """The input of a text model: `input_ids`, `attention_mask` and others, each (batch, length)."""

    @property
    def shape(self) -> torch.Size:
        """(batch, length)."""
        return self["input_ids"].shape

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Tokens":
        """Returns the same tokens on another device; token ids keep their type."""
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})

    def __len__(self) -> int:
        return len(self["input_ids"]) if self.keys() else 0


@dataclass(frozen=True, eq=False)
class Tokenised:
    """The tokens of texts, as an encoder makes them.

    Args:
        tokens: tensors by name, each (n, longest), padded, int32.
        lengths: tokens per text, (n,), int64.
        cut: whether each text was longer than the model reads, (n,), bool.
        encoder: the encoder that made the tokens.
    """

    tokens: dict[str, Tensor]
    lengths: Tensor
    cut: Tensor
    encoder: "TextEncoder"

    def each(self, change: Callable[[Tensor], Tensor]) -> "Tokenised":
        """The same with all tensors changed in one way."""
        tokens = {name: change(tensor) for name, tensor in self.tokens.items()}
        return replace(self, tokens=tokens, lengths=change(self.lengths), cut=change(self.cut))


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts or pairs of texts, and their tokens once an encoder has made them.

    Args:
        strings: n tuples of one text, or of two.
        columns: names of their columns: `text`, or `text_a` and `text_b`.
        tokenised: their tokens; None before an encoder made them.
    """

    strings: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    tokenised: Tokenised | None = None

    def __len__(self) -> int:
        return len(self.strings)

    @property
    def shape(self) -> torch.Size:
        """(n,): texts have no common shape."""
        return torch.Size([len(self)])

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The tokens of a data set's texts, each (n, longest), padded, int32."""
        return self._tokenised.tokens

    @property
    def lengths(self) -> Tensor:
        """How many tokens each of a data set's texts has, (n,), int64."""
        return self._tokenised.lengths

    @property
    def cut(self) -> Tensor:
        """Which of a data set's texts are longer than the model reads, (n,), bool."""
        return self._tokenised.cut

    @property
    def _tokenised(self) -> Tokenised:
        assert self.tokenised is not None, "no encoder has seen these texts"
        return self.tokenised

    def __getitem__(self, rows: Tensor | slice) -> "Texts":
        """Some of the texts, in the order of `rows` (row numbers or a mask)."""
        if isinstance(rows, slice):
            chosen = list(range(len(self)))[rows]
        else:
            chosen = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist()
        some = replace(self, strings=tuple(self.strings[row] for row in chosen))
        if self.tokenised is None:
            return some
        index = torch.tensor(chosen, dtype=torch.int64, device=self.lengths.device)
        return replace(some, tokenised=self.tokenised.each(lambda tensor: tensor[index]))

    def joined(self, others: "Texts") -> "Texts":
        """These texts, then the others; not tokenised yet."""
        return Texts(self.strings + others.strings, self.columns)

    def replaced(self, rows: Tensor, others: "Texts") -> "Texts":
        """These texts, with others in some rows; not tokenised yet."""
        strings = list(self.strings)
        for row, other in zip(rows.tolist(), others.strings, strict=True):
            strings[row] = other
        return Texts(tuple(strings), self.columns)

    def identities(self) -> list[Hashable]:
        """The texts themselves."""
        return list(self.strings)

    def on(self, device: torch.device | str) -> "Texts":
        """The same texts with their tokens on another device."""
        if self.tokenised is None:
            return self
        return replace(self, tokenised=self.tokenised.each(lambda tensor: tensor.to(device)))

    def augmented(self, augment: Augmentation, generator: torch.Generator) -> "Texts":
        """The same texts: they are not augmented."""
        return self

    def order(self, size: int, generator: torch.Generator | None) -> Tensor:
        """Returns the row numbers, with texts of similar length next to each other; see `ordered_by_length`."""
        return ordered_by_length(self.lengths.cpu(), size, generator)


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Makes model inputs from texts.

    Args:
        tokenizer: a tokenizer of transformers with a padding token.
        max_length: number of tokens that the model reads of a text or a pair, at least 4; the rest is cut off.
        columns: `text`, or `text_a` and `text_b`, if the model's record names them; None for those that the data has.
        blank: read empty and missing texts as empty ones, and such with another number of `end` tokens, which a guard
            decides about; else they are refused.
        borrowed_padding: neither the model nor its tokenizer has a padding token of this kind, so none is written.
        end: token that all texts must hold equally often, since the model answers at the last one of each; None if
            that does not matter.
        unpadded: the model answers otherwise if a text is padded, so that batches without gradients hold texts of one
            length: a text then has the answer that it has alone, whatever comes with it.

    Raises:
        UnbackdoorError: max_length is below 4, or more than the tokenizer allows.
    """

    tokenizer: Any
    max_length: int
    columns: tuple[str, ...] | None = None
    blank: bool = False
    borrowed_padding: bool = False
    end: int | None = None
    unpadded: bool = False

    modality: ClassVar[Literal["text"]] = "text"
    column_names: ClassVar[tuple[str, ...]] = ("text", "text_a", "text_b")
    labelled: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise UnbackdoorError(f"`max_length` must be at least 4, got {self.max_length}.")

    def __call__(self, texts: Texts) -> Tokens:
        """The tokens of a batch, int64, cut to its longest text.

        Args:
            texts: texts that `prepared` returned.
        """
        prepared = self.prepared(texts)
        longest = max(int(prepared.lengths.max()), 1)
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        part = slice(-longest, None) if left else slice(0, longest)
        return Tokens({name: tensor[:, part].long() for name, tensor in prepared.tokens.items()})

    def prepared(self, items: Any) -> Texts:
        """Texts with the tokens of this encoder, made once."""
        if not isinstance(items, Texts):
            raise UnbackdoorError("The model reads text, but the data holds images. Take texts.")
        if items.tokenised is not None and (items.tokenised.encoder is self or items.tokenised.encoder == self):
            return items
        if len(items) == 0:
            empty = torch.zeros(0, dtype=torch.int32)
            return replace(items, tokenised=Tokenised({"input_ids": empty[:, None]}, empty.long(), empty.bool(), self))
        sides = [list(side) for side in zip(*items.strings, strict=True)]
        with reading("the tokenizer of the model"), silent_rust():  # the tokenizer comes from somebody else
            encoding = self.tokenizer(
                *sides,
                truncation="longest_first" if len(sides) > 1 else True,
                max_length=self.max_length,
                padding=True,
                return_attention_mask=True,
            )
            tokens = {name: torch.tensor(encoding[name], dtype=torch.int32) for name in encoding}
        if not self.blank:
            self._check_ends(tokens, items)
        lengths = tokens["attention_mask"].sum(dim=1).long()
        cut = lengths >= self.max_length
        if cut.any():  # some may fit exactly: only a second look shows
            whole = torch.nonzero(cut).flatten().tolist()
            full = self.tokenizer(*[[side[row] for row in whole] for side in sides], truncation=False, verbose=False)
            cut[whole] = torch.tensor([len(ids) > self.max_length for ids in full["input_ids"]])
        return replace(items, tokenised=Tokenised(tokens, lengths, cut, self))

    def _check_ends(self, tokens: dict[str, Tensor], texts: Texts) -> None:
        """Refuse texts of which one holds the token `end` more often than others, as models with a decoder do."""
        if self.end is None:
            return
        counts = self._ends(tokens)
        usual = int(counts.mode().values)
        odd = (counts != usual).nonzero().flatten().tolist()
        if odd:
            shown = printable(repr(max(texts.strings[odd[0]], key=len)), 100)
            raise UnbackdoorError(
                f"The text {shown} has the token {printable(self.tokenizer.convert_ids_to_tokens(self.end))} "
                f"{int(counts[odd[0]])} times, other texts {usual} times, but the model answers at the last one and "
                "takes only texts that have it equally often. Remove it from that text."
            )

    def _ends(self, tokens: dict[str, Tensor]) -> Tensor:
        """How often each text holds the token `end`, (n,)."""
        counts: Tensor = ((tokens["input_ids"] == self.end) & tokens["attention_mask"].bool()).sum(dim=1)
        return counts

    def has_other_ends(self, texts: Texts) -> Tensor:
        """Which texts hold the token `end` more or less often than an empty one does, (n,), bool, on the CPU."""
        if self.end is None:
            return torch.zeros(len(texts), dtype=torch.bool)
        usual = int(self.tokenizer(*[""] * len(texts.columns))["input_ids"].count(self.end))
        return self._ends(self.prepared(texts).tokens).cpu() != usual

    def loses(self, texts: Texts, phrases: Sequence[str]) -> Tensor:
        """Returns which texts have a part of one of the phrases beyond the tokens that the model reads, (n,), bool."""
        prepared = self.prepared(texts)
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

    def columns_in(self, present: Sequence[str], names: dict[str, str], where: str, hint: str = "") -> dict[str, str]:
        """The columns of a data set that hold its texts; see `text_columns`."""
        return text_columns(present, names, where, trained_on=self.columns, hint=hint)

    def recorded(self, items: object = None) -> dict[str, Any]:
        """Returns the entry `encode` of record.json, with the columns of some texts if there are any."""
        columns = items.columns if isinstance(items, Texts) else self.columns
        return {"max_length": self.max_length, "columns": None if columns is None else list(columns)}

    def in_place_of(self, previous: object, where: str) -> "TextEncoder":
        """Returns this encoder: texts are tokenised again."""
        return self

    def read(self, cells: dict[str, Sequence[Any]], where: str, folder: Path | None) -> tuple[Texts, "TextEncoder"]:
        """Check and tokenise the text columns of a data set.

        Args:
            cells: the entries of `text`, or of `text_a` and `text_b`.
            where: name of the data, for messages.
            folder: not used; texts are in the table itself.

        Returns:
            The texts, and the encoder for them.

        Raises:
            UnbackdoorError: an entry is empty, not a text, or without a token; names the row.
        """
        if self.blank:  # CSV does not distinguish an empty text from none
            cells = {name: ["" if text is None else text for text in column] for name, column in cells.items()}
        for name, column in cells.items():
            for row, text in enumerate(column):
                if not isinstance(text, str) or not (text.strip() or self.blank):
                    problem = "an empty text" if isinstance(text, str) else f"{type(text).__name__} instead of a text"
                    problem = "no text" if text is None else problem
                elif len(text) > _LONGEST:
                    problem = f"a text of {len(text):,} characters (at most {_LONGEST:,} are read)"
                elif not is_unicode(text):
                    problem = "text that is not valid Unicode"
                else:
                    continue
                raise UnbackdoorError(
                    f"{where} has {problem} in row {row} of {printable(name)}. Repair or remove that row."
                )
        texts = self.prepared(Texts(tuple(zip(*cells.values(), strict=True)), tuple(cells)))
        if not self.blank:
            self._check_tokens(texts, where)
        if texts.cut.any():
            logger.info(
                "%s: %s texts are cut to %d tokens, the most that the model reads (`max_length`).",
                where,
                f"{int(texts.cut.sum()):,} of {len(texts):,}",
                self.max_length,
            )
        return texts, self

    def _check_tokens(self, texts: Texts, where: str) -> None:
        """Refuse texts without a token, such as a zero-width space; only the few short ones are tokenised again."""
        pair = len(texts.columns) > 1
        odd = texts.lengths <= self.tokenizer.num_special_tokens_to_add(pair=pair)
        if pair:  # the length does not show whether one side is empty
            odd |= torch.tensor([not all(map(_has_letter, sides)) for sides in texts.strings])
        rows = odd.nonzero().flatten().tolist()
        for name, side in zip(texts.columns, zip(*(texts.strings[row] for row in rows), strict=True), strict=False):
            pieces = self.tokenizer(list(side), add_special_tokens=False, verbose=False)["input_ids"]
            for row, ids in zip(rows, pieces, strict=True):
                if not ids:
                    raise UnbackdoorError(
                        f"{where} has an empty text (no token for this tokenizer) in row {row} of {name}. Repair or "
                        "remove that row."
                    )


def _has_letter(text: str) -> bool:
    return any(map(str.isalnum, text))


def _spelt(ids: Sequence[int]) -> str:
    """Tokens as letters, so that a phrase can be searched as in a string."""
    return "".join(map(chr, ids))
