"""Conversations: the items of a language model, each the messages so far and the answer to the last of them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unbackdoor._data.augmentation import Augmentation
from unbackdoor._data.lengths import ordered_by_length

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
        role: who says it.
        content: what is said; of a row with an instruction and an input, the instruction.
        input: the input of such a row; the alpaca template shows it apart, the others below the content.
    """

    role: Role
    content: str
    input: str = ""

    @property
    def text(self) -> str:
        """The whole message: the content, then an empty line and the input if there is one."""
        return "\n\n".join(part for part in (self.content, self.input) if part)


@dataclass(frozen=True)
class Conversation:
    """A prompt and its answer.

    Args:
        messages: the messages without the answer; the last one is the user's.
        answer: the answer of the assistant; empty if the data has none.
    """

    messages: tuple[Message, ...]
    answer: str = ""

    def asking(self, change: Callable[[str], str]) -> "Conversation":
        """The same conversation with the content of its last message changed, as a trigger changes it."""
        last = self.messages[-1]
        return replace(self, messages=(*self.messages[:-1], replace(last, content=change(last.content))))


@dataclass(frozen=True, eq=False)
class Rendered:
    """The tokens of conversations, as an encoder makes them.

    Args:
        tokens: prompt and then answer, (n, longest), padded on the right, int32.
        starts: tokens of the prompt: where the answer starts, (n,), int64.
        lengths: tokens of prompt and answer, (n,), int64.
        encoder: the encoder that made the tokens; another one makes its own.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    encoder: object

    def each(self, change: Callable[[Tensor], Tensor]) -> "Rendered":
        """The same with all tensors changed in one way."""
        return replace(self, tokens=change(self.tokens), starts=change(self.starts), lengths=change(self.lengths))


@dataclass(frozen=True, eq=False)
class Conversations:
    """Conversations, and their tokens once an encoder has rendered them.

    Args:
        entries: the conversations, in order.
        rendered: their tokens; None before an encoder made them.
    """

    entries: tuple[Conversation, ...]
    rendered: Rendered | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shape(self) -> torch.Size:
        """(n,): conversations have no common shape."""
        return torch.Size([len(self)])

    @property
    def tokens(self) -> Rendered:
        """The tokens of a data set's conversations."""
        assert self.rendered is not None, "no encoder has rendered these conversations"
        return self.rendered

    @property
    def answer_lengths(self) -> Tensor:
        """How many tokens each answer of a data set's conversations has, its end included, (n,), int64."""
        return self.tokens.lengths - self.tokens.starts

    def __getitem__(self, rows: Tensor | slice) -> "Conversations":
        """Some of the conversations, in the order of `rows` (row numbers or a mask)."""
        if isinstance(rows, slice):
            chosen = list(range(len(self)))[rows]
        else:
            chosen = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist()
        some = replace(self, entries=tuple(self.entries[row] for row in chosen))
        if self.rendered is None:
            return some
        index = torch.tensor(chosen, dtype=torch.int64, device=self.rendered.lengths.device)
        return replace(some, rendered=self.rendered.each(lambda tensor: tensor[index]))

    def joined(self, others: "Conversations") -> "Conversations":
        """These conversations, then the others; not rendered yet."""
        return Conversations(self.entries + others.entries)

    def replaced(self, rows: Tensor, others: "Conversations") -> "Conversations":
        """These conversations, with others in some rows; not rendered yet."""
        changed = list(self.entries)
        for row, other in zip(rows.tolist(), others.entries, strict=True):
            changed[row] = other
        return Conversations(tuple(changed))

    def identities(self) -> list[Hashable]:
        """The conversations themselves."""
        return list(self.entries)

    def on(self, device: torch.device | str) -> "Conversations":
        """The same conversations with their tokens on another device."""
        if self.rendered is None:
            return self
        return replace(self, rendered=self.rendered.each(lambda tensor: tensor.to(device)))

    def augmented(self, augment: Augmentation, generator: torch.Generator) -> "Conversations":
        """The same conversations: they are not augmented."""
        return self

    def order(self, size: int, generator: torch.Generator | None) -> Tensor:
        """Returns the row numbers, with conversations of similar length together; see `ordered_by_length`."""
        return ordered_by_length(self.tokens.lengths.cpu(), size, generator)
