"""`unbackdoor`, also as `python -m unbackdoor`, is the command line."""

import signal
import sys
from typing import Any


def main() -> None:
    """Run the command line; Ctrl-C works while it is imported, and if a library turns it into an error."""
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        signal.default_int_handler(number, frame)

    listening = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # false if the signal is ignored
    if listening:
        signal.signal(signal.SIGINT, hear)
    try:
        from unbackdoor._cli.app import main as run

        run()
    except (Exception, KeyboardInterrupt) as problem:
        if not heard and not isinstance(problem, KeyboardInterrupt):
            raise
        print("Interrupted; nothing was kept.", file=sys.stderr)
        sys.exit(130)
    finally:
        if listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # An interrupt inside of exec(), which imports use, is remembered by CPython up to the next exec(): without this
        # one it would end the process by the signal, whatever exit code was asked for.
        exec("")


if __name__ == "__main__":
    main()
