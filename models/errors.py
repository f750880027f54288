"""The one error that a user's input can cause, and how an entry point ends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: a file, a key, a value. One line: where, what was found, what was expected, what to do."""


def run_entry_point(main: Callable[[], None]) -> None:
    """Run `main`; a UserError ends the process with its one line on stderr and exit code 2, no traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def one_line(error: BaseException, most: int = 300) -> str:
    """An exception's message on one line, for the end of a message of ours; its type where it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__
