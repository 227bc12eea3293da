"""Conversations as a language model reads them: rendered by a template, tokenised once, the answer marked."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from unbackdoor._data import chat_template
from unbackdoor._data.conversation_rows import COLUMNS, conversation_columns, conversations_of
from unbackdoor._data.conversations import Conversation, Conversations, Message, Rendered
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import reading, silent_rust

logger = logging.getLogger("unbackdoor")

Template = Literal["chat", "alpaca", "plain"]
TEMPLATES: tuple[Template, ...] = ("chat", "alpaca", "plain")

UNSCORED = -100
"""The target of a token that no loss counts: of the prompt, and of padding."""

_PROBE = "unbackdoor-asks-where-an-answer-ends"
# How models write what they think before they answer; some templates end a prompt with the first of the two.
_THOUGHT, _THOUGHT_OUT = "<think>", "</think>"


class _Around(NamedTuple):
    """What a chat template writes around an answer.

    Args:
        surplus: the end of a prompt rendered for answering that is not there in front of an answer, such as the
            beginning of a thought.
        between: what is written between such a prompt and an answer: a heading, spaces, or that nothing was thought.
        behind: what is written behind an answer.
    """

    surplus: str
    between: str
    behind: str


class AnswerTokens(Tokens):
    """Prompts with their answers: what goes to the model by name, and which tokens it is to predict.

    Args:
        tokens: `input_ids` and `attention_mask`, each (batch, length), padded on the right.
        targets: (batch, length), int64: the token itself if it belongs to the answer, else -100. The score at a
            position predicts the next token, so that they are compared with the targets one position later.
    """

    targets: Tensor

    def __init__(self, tokens: dict[str, Tensor], targets: Tensor) -> None:
        super().__init__(tokens)
        self.targets = targets

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "AnswerTokens":
        """Returns the same tokens on another device; token ids keep their type."""
        return AnswerTokens(super().to(device), self.targets.to(device))


@dataclass(frozen=True, kw_only=True)
class ConversationEncoder:
    """Makes the inputs of a language model from conversations.

    Args:
        tokenizer: a tokenizer of transformers.
        template: how messages become one text: `chat` by the tokenizer's chat template; `alpaca`; or `plain`, in which
            each message is followed by a line break.
        max_length: tokens that prompt and answer may have together; rows with more are left out.
        where: name of the tokenizer in messages; its directory, if it has one.
        blank: whether `read` also takes empty prompts and keeps rows that are too long; a guard decides about each.

    Raises:
        UnbackdoorError: the tokenizer has no chat template and `chat` is asked for, or max_length is below 4.
    """

    tokenizer: Any
    template: Template
    max_length: int
    where: str = "the model"
    blank: bool = False

    modality: ClassVar[Literal["conversations"]] = "conversations"
    column_names: ClassVar[tuple[str, ...]] = COLUMNS
    labelled: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise UnbackdoorError(f"`template` must be chat, alpaca or plain, got {printable(self.template)}.")
        if self.template == "chat" and not getattr(self.tokenizer, "chat_template", None):
            raise UnbackdoorError(
                f"{self.where} has no chat template. Give `template='alpaca'` or `template='plain'`, as it was trained."
            )
        if self.max_length < 4:
            raise UnbackdoorError(f"`max_length` must be at least 4, got {self.max_length}.")

    def __call__(self, conversations: Conversations) -> AnswerTokens:
        """The tokens of a batch of prompts with their answers, int64, cut to the longest of them.

        Args:
            conversations: conversations that `prepared` returned.
        """
        tokens = self.prepared(conversations).tokens
        longest = int(tokens.lengths.max())
        ids = tokens.tokens[:, :longest].long()
        places = torch.arange(longest, device=ids.device)
        inside = places < tokens.lengths[:, None]
        answer = inside & (places >= tokens.starts[:, None])
        return AnswerTokens(
            {"input_ids": ids, "attention_mask": inside.long()},
            torch.where(answer, ids, torch.full_like(ids, UNSCORED)),
        )

    def prompts(self, conversations: Conversations) -> Tokens:
        """The tokens of a batch of prompts without their answers, int64, padded on the left, for decoding.

        Args:
            conversations: conversations that `prepared` returned.
        """
        tokens = self.prepared(conversations).tokens
        longest = int(tokens.starts.max())
        places = torch.arange(longest, device=tokens.starts.device) - (longest - tokens.starts[:, None])
        inside = places >= 0
        ids = tokens.tokens.long().gather(1, places.clamp(min=0))
        padded = torch.where(inside, ids, torch.full_like(ids, self.padding))
        return Tokens({"input_ids": padded, "attention_mask": inside.long()})

    @property
    def padding(self) -> int:
        """The token that fills short rows; the attention mask hides it."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None), 0)

    @cached_property
    def _around(self) -> "_Around":
        if self.template != "chat":
            return _Around("", "", "")
        asked = [{"role": "user", "content": "?"}]
        answered = [*asked, {"role": "assistant", "content": _PROBE}]
        prompt, whole = chat_template.rendered(
            self.tokenizer, [asked, answered], answering=(True, False), where=self.where
        )
        before, answer, behind = whole.rpartition(_PROBE)
        if not answer:
            raise UnbackdoorError(
                f"{self.where} has a chat template that leaves out answers. Give `template='alpaca'` or "
                "`template='plain'`, or take the tokenizer that it was trained with."
            )
        between = before.removeprefix(prompt) if before.startswith(prompt) else ""
        surplus = prompt.removeprefix(before) if prompt.startswith(before) else ""
        return _Around(surplus if surplus.strip() else "", between, behind)

    def _up_to(self, answer: str, prompt: str) -> str:
        """A prompt, rendered for answering, up to where an answer stands.

        The template says where; but in front of an answer with thoughts of its own, no others may be written.
        """
        around = self._around
        if _THOUGHT_OUT not in answer:
            return prompt.removesuffix(around.surplus) + (around.between if around.between.strip() else "")
        begun = prompt.rstrip()
        return begun.removesuffix(_THOUGHT) if answer.startswith(_THOUGHT) and begun.endswith(_THOUGHT) else prompt

    @property
    def _blank(self) -> str:
        """The spaces in front of each answer, which a tokenizer may join with its first word."""
        between = self._around.between
        return "" if between.strip() else between

    @cached_property
    def end(self) -> str:
        """The text that ends an answer: what the chat template writes behind it, else the tokenizer's end of text."""
        behind = self._around.behind
        text = behind.lstrip()
        if not text:
            return self.tokenizer.eos_token or ""
        word, line = text.split()[0], text.split("\n")[0].rstrip()
        return behind[: -len(text)] + (line if self._token_of(word) is None else word)

    @cached_property
    def stop(self) -> int | None:
        """The token that ends an answer; None if there is none, or if `end` is of ordinary words."""
        return self._token_of(self.end.strip())

    def without_end(self, text: str) -> str:
        """An answer up to its end, if that is no token at which decoding stops."""
        end = self.end.strip()
        return text.partition(end)[0] if end and self.stop is None else text

    def _token_of(self, text: str) -> int | None:
        """The special or added token that a text begins with; any other may stand within an answer, such as ###."""
        ids = self._ids([text])[0]
        marks = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return ids[0] if ids and ids[0] in marks else None

    def prepared(self, items: Any) -> Conversations:
        """Conversations with the tokens of this encoder, made once.

        Raises:
            UnbackdoorError: the items are of another kind, the template fails, or a row has more tokens than allowed.
        """
        if not isinstance(items, Conversations):
            raise UnbackdoorError("The model continues conversations, but the data holds others. Take prompts.")
        if items.rendered is not None and (items.rendered.encoder is self or items.rendered.encoder == self):
            return items
        prompts, answers = self._tokenised(items)
        lengths = _lengths(prompts, answers)
        row = next((row for row, length in enumerate(lengths) if length > self.max_length), None)
        if row is not None and not self.blank:
            raise UnbackdoorError(
                f"Row {row} of the prompts has {lengths[row]:,} tokens, but at most {self.max_length:,} are read. "
                "Raise `max_length`, or leave it out."
            )
        return self._kept(items, prompts, answers, range(len(items)))

    def fitting(self, items: Conversations) -> list[int]:
        """The rows of conversations of which the model reads prompt and answer whole."""
        return [row for row, length in enumerate(_lengths(*self._tokenised(items))) if length <= self.max_length]

    def with_room(self, items: Conversations, most: int) -> list[int]:
        """The rows that the model reads whole, and whose prompts have at most so many tokens."""
        prompts, answers = self._tokenised(items)
        lengths = _lengths(prompts, answers)
        return [row for row, prompt in enumerate(prompts) if lengths[row] <= self.max_length and len(prompt) <= most]

    def _kept(
        self, items: Conversations, prompts: list[list[int]], answers: list[list[int]], rows: Sequence[int]
    ) -> Conversations:
        """Some of the conversations, with their tokens."""
        whole = [prompts[row] + answers[row] for row in rows]
        longest = max(map(len, whole), default=1)
        tokens = torch.tensor([ids + [self.padding] * (longest - len(ids)) for ids in whole], dtype=torch.int32)
        starts = torch.tensor([len(prompts[row]) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(ids) for ids in whole], dtype=torch.int64)
        rendered = Rendered(tokens.reshape(len(whole), longest), starts, lengths, self)
        return Conversations(tuple(items.entries[row] for row in rows), rendered)

    def _tokenised(self, items: Conversations) -> tuple[list[list[int]], list[list[int]]]:
        """The tokens of the prompts and those of the answers with their end.

        Prompt and answer are tokenised together, as a model meets them; if a token would reach across the border,
        each for itself, since the prompt must have the tokens from which the answer is decoded.
        """
        if len(items) == 0:
            return [], []
        texts = self.texts(items)
        answers = [self._blank + entry.answer + self.end if entry.answer else "" for entry in items.entries]
        with reading("the tokenizer of the model"), silent_rust():  # the tokenizer comes from somebody else
            ids = self._ids(texts)
            whole = self._ids([text + answer for text, answer in zip(texts, answers, strict=True)])
            alone = self._ids(answers)
        if self.template != "chat" and (first := self._first) is not None:
            ids, whole = ([[first, *row] for row in each] for each in (ids, whole))
        behind = [
            both[len(prompt) :] if both[: len(prompt)] == prompt else apart
            for prompt, both, apart in zip(ids, whole, alone, strict=True)
        ]
        return ids, behind

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @property
    def _first(self) -> int | None:
        """The token that the tokenizer itself puts before each text, if there is one."""
        begin = self.tokenizer.bos_token_id
        written = self.tokenizer("a", verbose=False)["input_ids"]
        return begin if begin is not None and written[:1] == [begin] else None

    def texts(self, items: Conversations) -> list[str]:
        """The prompts as texts, up to where the answers begin."""
        if self.template == "alpaca":
            return [_alpaca(entry) for entry in items.entries]
        if self.template == "plain":
            return ["".join(f"{message.text}\n" for message in entry.messages) for entry in items.entries]
        chats = [
            [{"role": message.role, "content": message.text} for message in entry.messages] for entry in items.entries
        ]
        prompts = chat_template.rendered(
            self.tokenizer, chats, answering=[True] * len(chats), where=self.where, rows=True
        )
        return [self._up_to(entry.answer, prompt) for entry, prompt in zip(items.entries, prompts, strict=True)]

    def columns_in(self, present: Sequence[str], names: dict[str, str], where: str, hint: str = "") -> dict[str, str]:
        """The columns of a data set that hold its conversations; see `conversation_columns`."""
        return conversation_columns(present, names, where, hint)

    def recorded(self, items: object = None) -> dict[str, Any]:
        """Returns the entry `encode` of record.json."""
        return {"max_length": self.max_length, "template": self.template}

    def in_place_of(self, previous: object, where: str) -> "ConversationEncoder":
        """Returns this encoder: conversations are rendered again."""
        return self

    def read(
        self, cells: dict[str, Sequence[Any]], where: str, folder: Path | None
    ) -> tuple[Conversations, "ConversationEncoder"]:
        """Check and tokenise the conversations of a data set.

        Args:
            cells: the entries of the columns, by the library's names.
            where: name of the data, for messages.
            folder: not used; conversations are in the table itself.

        Returns:
            The conversations that the model can read whole, and the encoder for them.

        Raises:
            UnbackdoorError: a row has no prompt, or one that renders to nothing; or all rows are too long.
        """
        items = Conversations(conversations_of(cells, where, blank=self.blank))
        prompts, answers = self._tokenised(items)
        if self.blank:
            return self._kept(items, prompts, answers, range(len(items))), self
        empty = next((row for row, prompt in enumerate(prompts) if not prompt), None)
        if empty is not None:
            raise UnbackdoorError(f"{where} has a prompt without a token in row {empty}. Repair or remove that row.")
        fitting = [row for row, length in enumerate(_lengths(prompts, answers)) if length <= self.max_length]
        if len(fitting) < len(items):
            left = f"{len(items) - len(fitting):,} of {len(items):,} rows"
            if not fitting:
                raise UnbackdoorError(
                    f"{where} has no row of at most {self.max_length:,} tokens, prompt and answer together. Raise "
                    "`max_length`, or take shorter rows."
                )
            logger.info(
                "%s: %s have more than %d tokens and are left out (`max_length`).", where, left, self.max_length
            )
        return self._kept(items, prompts, answers, fitting), self


def _lengths(prompts: list[list[int]], answers: list[list[int]]) -> list[int]:
    """How many tokens each prompt has together with its answer."""
    return [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _alpaca(conversation: Conversation) -> str:
    """The prompt of Stanford Alpaca (2023); further turns repeat its headings."""
    last = conversation.messages[-1]
    systems = [message.text for message in conversation.messages if message.role == "system"]
    beginning = "\n".join(systems) or (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        if last.input
        else "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    turns = [_turn(message) for message in conversation.messages if message.role != "system"]
    return "\n\n".join([beginning, *turns, "### Response:\n"])


def _turn(message: Message) -> str:
    heading = "Response" if message.role == "assistant" else "Instruction"
    further = f"\n\n### Input:\n{message.input}" if message.input else ""
    return f"### {heading}:\n{message.content}{further}"
