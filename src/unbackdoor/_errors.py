"""Failures that a user can mend: one sentence each, and the exit code that the command line gives them."""


class UnbackdoorError(Exception):
    """Bad usage or bad input. The message says owner, field, what is allowed, what came, and the way out."""

    exit_code = 2


class IncompleteError(UnbackdoorError):
    """The work ran, but its result could not be kept (a full disk, say)."""

    exit_code = 1
