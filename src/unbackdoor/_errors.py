"""Failures that a user can mend: one sentence each, and the exit code that the command line gives them."""


class UnbackdoorError(Exception):
    """Bad usage or bad input. The message says owner, field, what is allowed, what came, and the way out."""

    exit_code = 2


class IncompleteError(UnbackdoorError):
    """The work ran, but its result could not be kept (a full disk, say)."""

    exit_code = 1


def printable(text: str) -> str:
    """A model's own names may hold what moves a terminal's cursor; that is shown, not obeyed.

    >>> printable("Gro\\u00dfe \\x1b[2J")
    'Gro\u00dfe \\\\x1b[2J'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
