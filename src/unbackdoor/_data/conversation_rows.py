"""Rows of prompts and answers in the forms that people publish them in, read as conversations."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unbackdoor._data.columns import listed
from unbackdoor._data.conversations import Conversation, Message, Role
from unbackdoor._data.reading import opened
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import is_unicode

logger = logging.getLogger("unbackdoor")

COLUMNS = ("messages", "instruction", "input", "output", "prompt", "response", "system")

# What the rows of each form ask by.
_FORMS = (("messages",), ("instruction", "input"), ("prompt",))
# Those of OpenAI, of ShareGPT and of Gemma.
_ROLES: dict[str, Role] = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"developer": "system", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant"},
    "model": "assistant",
}
# Columns under the names that others give them.
_ALIASES = {"conversations": "messages", "completion": "response", "system_prompt": "system"}
_LONGEST = 1_000_000  # characters of one message: those of a long novel


def conversation_columns(present: Sequence[str], names: dict[str, str], where: str, hint: str = "") -> dict[str, str]:
    """Returns the columns that hold the conversations: the library's names to the data's.

    Args:
        present: the columns of the data.
        names: the data's names by the library's, if the user gave them.
        where: name of the data, for messages.
        hint: another way out if a column is missing.

    Raises:
        UnbackdoorError: the data has none of the three forms of rows.
    """
    held = {name: names.get(name, name) for name in COLUMNS if name in names or name in present}
    for alias, name in _ALIASES.items():
        if alias in present:
            held.setdefault(name, alias)
    if "instruction" in held and "context" in present:
        held.setdefault("input", "context")  # of Dolly: the passage that an instruction is about
    forms = [form for form in _FORMS if any(name in held for name in form)]
    for form in sorted(forms, key=lambda form: not any(name in names for name in form)):  # one that the user named
        used = {name: held[name] for name in form if name in held}
        answers = ("response", "output") if form == ("prompt",) else ("output", "response")
        answer = next((held[name] for name in answers if name in held), None)
        if answer is not None and "messages" not in used:
            used[answers[0]] = answer
        if "system" in held:
            used["system"] = held["system"]
        if not used.keys() <= names.keys():  # else the user chose all of them
            _say_unread(used, present, where)
        return used
    raise UnbackdoorError(
        f"{where} has no prompts; it has {listed(present)}. A row has messages, or instruction, input and output, or "
        f"prompt and response: name them by `columns={{'prompt': 'NAME', 'response': 'NAME'}}`{hint}."
    )


def _say_unread(used: dict[str, str], present: Sequence[str], where: str) -> None:
    unread = [name for name in present if name not in used.values()]
    if unread:
        logger.info(
            "%s: read from %s; %s %s not (`columns`).",
            where,
            listed(list(used.values())),
            listed(unread),
            "is" if len(unread) == 1 else "are",
        )


def holds_prompts(source: str | Path | Sequence[str | Path], names: dict[str, str] | None) -> bool:
    """Whether rows are prompts for a language model, not labelled texts.

    Args:
        source: a source for `Dataset.load`.
        names: the data's names by the library's, if the user gave them.

    Raises:
        UnbackdoorError: the source cannot be read.
    """
    tables = opened(source, str(source), label="label", classes=None, labelled=False)
    held = {**{name: name for name in tables[0].cells}, **(names or {})}
    asked = any(name in held for name in ("messages", "conversations", "instruction", "prompt"))
    return "label" not in held and (asked or {"input", "output"} <= held.keys())


def conversations_of(cells: dict[str, Sequence[Any]], where: str, *, blank: bool = False) -> tuple[Conversation, ...]:
    """Reads conversations from the columns of a data set.

    Args:
        cells: the entries of `messages`; of `instruction`, `input` and `output`; or of `prompt` and `response`; of each
            perhaps also of `system`.
        where: name of the data, for messages.
        blank: whether a row may have no prompt.

    Raises:
        UnbackdoorError: an entry is not text, or a row has no prompt; names the row.
    """
    systems = [_text(cell, "system", where, row) for row, cell in enumerate(cells.get("system", ()))]
    rows = _conversations(cells, where, blank)
    if not systems:
        return tuple(rows)
    return tuple(_under(system, row) for system, row in zip(systems, rows, strict=True))


def _under(system: str, conversation: Conversation) -> Conversation:
    """A conversation with the message of the system that has a column of its own, unless it has one already."""
    if not system or conversation.messages[0].role == "system":
        return conversation
    return Conversation((Message("system", system), *conversation.messages), conversation.answer)


def _conversations(cells: dict[str, Sequence[Any]], where: str, blank: bool) -> Iterator[Conversation]:
    count = len(next(iter(cells.values())))
    if "messages" in cells:
        yield from (_of_messages(entry, where, row, blank) for row, entry in enumerate(cells["messages"]))
        return
    asked, answered = ("prompt", "response") if "prompt" in cells else ("instruction", "output")
    if asked == "prompt" and any(isinstance(cell, list | tuple) for cell in cells["prompt"]):
        entries = map(_turns, cells["prompt"], cells.get("response", [None] * count))
        yield from (_of_messages(entry, where, row, blank) for row, entry in enumerate(entries))
        return
    columns = {name: cells.get(name, [None] * count) for name in (asked, "input", answered)}
    texts = [[_text(cell, name, where, row) for row, cell in enumerate(column)] for name, column in columns.items()]
    for row, each in enumerate(zip(*texts, strict=True)):
        yield _of_texts(*each, where, row, blank)  # type: ignore[call-arg]


def _of_texts(content: str, further: str, answer: str, where: str, row: int, blank: bool) -> Conversation:
    if not content:
        content, further = further, ""
    if not content and not blank:
        raise UnbackdoorError(f"{where} has an empty prompt in row {row}. Repair or remove that row.")
    return Conversation((Message("user", content, further),), answer)


def _turns(prompt: Any, answer: Any) -> Any:
    """The messages of a row whose prompt, and perhaps answer, is a list of them, as TRL has it."""
    asked, answered = (
        part if isinstance(part, list | tuple) else [{"role": role, "content": part}] * (part is not None)
        for role, part in (("user", prompt), ("assistant", answer))
    )
    return [*asked, *answered]


def _of_messages(entry: Any, where: str, row: int, blank: bool) -> Conversation:
    messages = list(_messages(entry, where, row))
    answer = messages.pop().content if messages and messages[-1].role == "assistant" else ""
    if not messages or messages[-1].role != "user":
        raise UnbackdoorError(
            f"{where} must have a message of the user before the answer, or at the end, in row {row}. Repair or remove "
            "that row."
        )
    if not messages[-1].content and not blank:
        raise UnbackdoorError(f"{where} has an empty prompt in row {row}. Repair or remove that row.")
    return Conversation(tuple(messages), answer)


def _messages(entry: Any, where: str, row: int) -> Iterator[Message]:
    if isinstance(entry, str):  # a cell of a table that holds no lists
        entry = _list_in(entry, where, row)
    if not isinstance(entry, list | tuple):
        raise UnbackdoorError(
            f"{where} must have a list of messages in row {row}, got {type(entry).__name__}. Repair or remove that row."
        )
    for message in entry:
        said = message if isinstance(message, dict) else {}
        role = _ROLES.get(str(said.get("role") or said.get("from")))
        if role is None:
            raise UnbackdoorError(
                f"{where} has a message without the role system, user or assistant in row {row}, got "
                f"{printable(repr(message))}. Repair or remove that row."
            )
        if said.get("tool_calls") or said.get("function_call"):
            raise UnbackdoorError(
                f"{where} has a message that calls a tool in row {row}; only texts are read. Remove that row."
            )
        content = said["content"] if "content" in said else said.get("value")
        yield Message(role, _text(_joined(content), "a message", where, row))


def _list_in(text: str, where: str, row: int) -> Any:
    """The list of messages that a text holds as JSON."""
    try:
        held = json.loads(_text(text, "messages", where, row))
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, list):
        raise UnbackdoorError(
            f"{where} must have a list of messages in row {row}, as JSON if it is text, got "
            f"{printable(repr(text), 100)}. Save the rows as JSON lines, or each list by json.dumps."
        )
    return held


def _joined(content: Any) -> Any:
    """The text of a content in parts, if all of them are texts; any other content as it is."""
    if not isinstance(content, list | tuple):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(content) else content


def _text(entry: Any, name: str, where: str, row: int) -> str:
    """Returns a text without spaces around it; empty for an absent one."""
    if entry is None:
        return ""
    if not isinstance(entry, str):
        problem = f"{type(entry).__name__} instead of a text"
    elif len(entry) > _LONGEST:
        problem = f"a text of {len(entry):,} characters (at most {_LONGEST:,} are read)"
    elif not is_unicode(entry):
        problem = "text that is not valid Unicode"
    else:
        return entry.strip()
    raise UnbackdoorError(f"{where} has {problem} in row {row} of {name}. Repair or remove that row.")
