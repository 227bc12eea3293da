"""The command line: from arguments to an exit code."""

import errno
import io
import logging
import os
import sys

from cyclopts import CycloptsError

from unbackdoor._cli.chosen import spelled_out
from unbackdoor._cli.own_options import command_of, out_of_memory_sentence, own_options
from unbackdoor._cli.parameters import as_options
from unbackdoor._cli.parser import parser
from unbackdoor._cli.shell import shell_words
from unbackdoor._errors import SENTENCE, IncompleteError, UnbackdoorError, out_of_memory, printable
from unbackdoor._interrupts import end, interrupted
from unbackdoor._processors import limit_threads


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code, see `_errors`: 0 done, 2 bad usage or input, 130 interrupted.

    1 is for work that ran, but whose result was not saved or is not usable. With `audit --fail-on-finding`, 3 is for a
    shortcut that was found, and 4 for an audit that cannot judge. 143 is for SIGTERM, and 129 for SIGHUP.
    """
    argv = sys.argv[1:] if arguments is None else arguments
    limit_threads()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may have letters that the console's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    command = command_of(argv)
    _log_to_stderr(command, argv)
    try:
        typed = shell_words(["unbackdoor", *argv])
        argv = spelled_out(argv)
        parser(argv, typed)(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except UnbackdoorError as problem:
        _fail(problem, command, argv)
    except CycloptsError as problem:
        _fail(UnbackdoorError(_usage(problem)))
    except KeyboardInterrupt:
        end()
    except BrokenPipeError:  # the reader of stdout, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again as it flushes
        sys.exit(1)
    except (MemoryError, RuntimeError) as problem:
        if not out_of_memory(problem):
            raise
        _fail(IncompleteError(out_of_memory_sentence(argv)))
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            if problem.filename is None or not problem.strerror:
                raise
            _fail(
                UnbackdoorError(
                    f"{problem.filename} cannot be used ({problem.strerror}). Check its name and who may read it."
                )
            )
        _fail(
            IncompleteError(
                f"The disk is full ({problem.filename or 'while writing'}); nothing was kept. Free some space."
            )
        )
    sys.exit(0)


def _fail(problem: UnbackdoorError, command: str | None = None, argv: list[str] | None = None) -> None:
    """Print a failure, with the options of a command (`argv`) in place of parameters, and exit."""
    if interrupted() and problem.exit_code < 128:  # a library, or a check of ours, took a signal for something else
        end()
    print(problem if command is None else as_options(problem, command, own_options(argv or [])), file=sys.stderr)
    sys.exit(problem.exit_code)


def _usage(problem: CycloptsError) -> str:
    if type(problem.__cause__).__name__ == "ValidationError":
        from unbackdoor._value import sentence

        return sentence(problem.__cause__)  # type: ignore[arg-type]
    text = " ".join(str(problem).split())
    if text.startswith("Unused Tokens"):
        text += " An option that takes several values is given once for each of them."
    return text if "--help" in text else f"{text} See --help."


def _log_to_stderr(command: str, argv: list[str]) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "first_line", False):  # the command prints it above its results
                return
            kind = "warning" if record.levelno >= logging.WARNING else "note"
            text = as_options(record.getMessage(), command, own_options(argv))
            print(f"{kind}: {printable(text, SENTENCE)}", file=sys.stderr)

    logger = logging.getLogger("unbackdoor")
    logger.handlers = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
