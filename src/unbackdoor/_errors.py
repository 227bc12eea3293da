"""Failures that a user can fix: one sentence each, and the exit code that the command line gives them.

A message names parameters as Python has them, in backticks (`seed`), and settings likewise (`device='cpu'`,
`overwrite=True`). The command line shows these as its options (--seed, --device cpu, --overwrite), and warnings and
notes as well; so no message outside of `_cli` names an option, and nothing else stands in backticks.
"""

import unicodedata
from collections.abc import Sequence

NAME = 100  # characters of a name from a file, in a sentence, a list or a page
SENTENCE = 1000  # characters of a whole sentence


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them: `images, text and image-text`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


class UnbackdoorError(Exception):
    """Bad usage or bad input. The message says owner, field, what is allowed, what came, and the way out.

    Args:
        message: one sentence, whatever it quotes: it is made printable and, if it is very long, shortened.
        details: one line for each problem if there are several.
    """

    __module__ = "unbackdoor"  # users import it from here, and a traceback shows this
    exit_code = 2

    def __init__(self, message: object, *details: object) -> None:
        super().__init__("\n".join(printable(line, SENTENCE) for line in (message, *details)))


class IncompleteError(UnbackdoorError):
    """The work ran, but its result could not be saved (a full disk, say), or is not usable."""

    exit_code = 1


class NoLabelsError(UnbackdoorError):
    """Examples have no labels, or not all of them; a command that can do without them says how."""


class NoHeadError(UnbackdoorError):
    """No linear layer makes the class scores of a model; some methods can do without one."""


class ShortcutFoundError(UnbackdoorError):
    """An audit found a shortcut, and the user asked for a failure if it does."""

    exit_code = 3


class CannotJudgeError(UnbackdoorError):
    """An audit could not judge, and the user asked for a failure if it cannot."""

    exit_code = 4


def printable(text: object, longest: int = NAME) -> str:
    """Returns text of somebody else for a message, a note, a list or a page: short, on one line, printable.

    Names of a model, a data set or a file may contain characters that move a terminal's cursor, reverse the direction
    of text or break the line, and may be a million characters long. Such characters are shown as escapes, and the
    middle of a long text is left out.

    Args:
        text: anything.
        longest: largest number of characters of the result.

    >>> printable("Gro\\u00dfe \\x1b[2J\\u202e")
    'Gro\u00dfe \\\\x1b[2J\\\\u202e'
    >>> printable("0123456789" * 9, 13)
    '01234...56789'
    """
    # Cut first, so that a long text costs no time; and again, as escapes are longer than their characters.
    shown, marks = [], 0
    for letter in _shortened(text if isinstance(text, str) else _as_text(text), longest):
        marks = marks + 1 if unicodedata.category(letter).startswith("M") else 0
        # No script puts more than three marks on a letter; many marks would paint over the lines above.
        shown.append(letter if letter.isprintable() and marks < 4 else ascii(letter)[1:-1])
    return _shortened("".join(shown), longest)


def out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that no memory is left, of the machine or of its GPU."""
    said = ("out of memory", "can't allocate memory")
    return isinstance(problem, MemoryError) or any(words in str(problem) for words in said)


def few(names: Sequence[object]) -> str:
    """The first three names, printable.

    >>> few(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")


def _as_text(thing: object) -> str:
    try:
        return str(thing)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or a list nested too deeply
        return f"a very long {type(thing).__name__}"


def _shortened(text: str, longest: int) -> str:
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"
