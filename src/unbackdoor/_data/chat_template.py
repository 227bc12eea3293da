"""Chat templates of models that somebody else trained: rendered in a sandbox, in a process of bounded time and memory.

The sandbox of transformers keeps a template from reaching Python, but not from counting to a billion or doubling a
string forty times; a process of its own can be ended. Starting one takes longer than rendering a few chats, so the
texts of these are kept.
"""

import json
import multiprocessing
import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import MEBIBYTE

Chat = Sequence[dict[str, str]]

SECONDS = 10.0  # that rendering may take, whatever the number of chats
_EACH = 0.01  # further seconds for each chat; a thousand take less than one second in all
MEMORY = 1024 * MEBIBYTE  # bytes that rendering may need besides what the program has already
CHARACTERS = 64 * MEBIBYTE  # of all rendered texts
_KEPT: OrderedDict[tuple[type, str], list[str]] = OrderedDict()  # the latest texts, by all that they depend on
_MOST_KEPT = 256
_SHORT = 64 * 1024  # characters of chats and texts, up to which they are kept
_WAYS = "Give `template='alpaca'` or `template='plain'`, or take the tokenizer that it was trained with."


def rendered(
    tokenizer: Any, chats: Sequence[Chat], *, answering: Sequence[bool], where: str, rows: bool = False
) -> list[str]:
    """Returns the text of each chat by the chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers that has a chat template.
        chats: lists of messages with a role and a content.
        answering: of each chat, whether to end it with the beginning of the assistant's next message.
        where: name of the model's tokenizer, for messages.
        rows: whether the chats are rows of data; a message then names the row that the template refuses.

    Raises:
        UnbackdoorError: the template fails, takes too long, or makes too much text.
    """
    depends_on = [tokenizer.chat_template, tokenizer.special_tokens_map, list(chats), list(answering)]
    key = (type(tokenizer), json.dumps(depends_on, default=str))
    texts = _KEPT.get(key)
    if texts is None:
        texts = _rendered_apart(tokenizer, chats, answering, where, rows)
        if len(key[1]) + sum(map(len, texts)) <= _SHORT:
            _KEPT[key] = texts
            if len(_KEPT) > _MOST_KEPT:
                _KEPT.popitem(last=False)
    return list(texts)


def _rendered_apart(
    tokenizer: Any, chats: Sequence[Chat], answering: Sequence[bool], where: str, rows: bool
) -> list[str]:
    """Returns the texts, made by a process of its own."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_render, args=(tokenizer, list(chats), list(answering), theirs), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child uses none of the threads that it does not get
        child.start()
    theirs.close()
    seconds = SECONDS + _EACH * len(chats)
    try:
        late = json.dumps({"problem": f"it took more than {seconds:g} s"}).encode()
        answer: dict[str, Any] = json.loads(ours.recv_bytes() if ours.poll(seconds) else late)
    except EOFError:
        answer = {"problem": "it needs too much memory"}
    finally:
        child.kill()
        child.join()
        ours.close()
    if "problem" in answer:
        reason = printable(answer["problem"].strip().split("\n")[0], 200).rstrip(".")
        if rows and "refused" in answer:
            raise UnbackdoorError(
                f"{where} has a chat template that refuses the messages of row {answer['refused']} ({reason}). Repair "
                "or remove that row; or give `template='alpaca'` or `template='plain'`."
            )
        raise UnbackdoorError(f"{where} has a chat template that cannot be used ({reason}). {_WAYS}")
    texts: list[str] = answer["texts"]
    return texts


def _render(tokenizer: Any, chats: list[Chat], answering: list[bool], pipe: Connection) -> None:
    """Send the texts, or the problem, as JSON."""
    from jinja2 import TemplateError

    texts: list[str] = []
    try:
        _bound_memory()
        for chat, begun in zip(chats, answering, strict=True):
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=begun))
            if sum(map(len, texts)) > CHARACTERS:
                raise ValueError(f"it makes more than {CHARACTERS:,} characters")
        answer: dict[str, Any] = {"texts": texts}
    except TemplateError as problem:  # of which only this class itself is for the template's own words
        refused = {"refused": len(texts)} if type(problem) is TemplateError else {}
        answer = {"problem": str(problem) or type(problem).__name__, **refused}
    except MemoryError:
        answer = {"problem": "it needs too much memory"}
    except Exception as problem:  # a template may fail in any way
        answer = {"problem": str(problem) or type(problem).__name__}
    pipe.send_bytes(json.dumps(answer).encode())
    pipe.close()


def _bound_memory() -> None:
    """Let this process have little more memory than now, if the system says how much it has."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
