"""`unbackdoor`, also as `python -m unbackdoor`, is the command line."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is heard while it is still being imported."""
    try:
        from unbackdoor._cli import main as run
    except KeyboardInterrupt:
        print("Interrupted; nothing was kept.", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
