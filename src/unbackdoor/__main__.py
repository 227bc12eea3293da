"""`unbackdoor`, also as `python -m unbackdoor`, is the command line."""

from unbackdoor._interrupts import end, heeded


def main() -> None:
    """Run the command line; Ctrl-C works while it is imported, and if a library turns it into an error."""
    try:
        with heeded() as heard:
            try:
                from unbackdoor._cli.app import main as run

                run()
            except (Exception, KeyboardInterrupt) as problem:
                if not heard and not isinstance(problem, KeyboardInterrupt):
                    raise
                end()
    finally:
        # An interrupt inside of exec(), which imports use, is remembered by CPython up to the next exec(): without this
        # one it would end the process by the signal, whatever exit code was asked for.
        exec("")


if __name__ == "__main__":
    main()
