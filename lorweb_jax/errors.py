"""Errors meant for a person, and how a command shows them."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence: what was found, what was expected, what to do. `code` is the exit status (1, or 2 for usage)."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def told(error: BaseException) -> tuple[str, int] | None:
    """(what to tell a person, exit status); None for an error of the program's own."""
    match error:
        case UserError():
            return f"error: {error}", error.code
        case OSError():
            return (f"error: {error.strerror or error}: {error.filename or 'no file named'}; check the path, its "
                    "permissions and the free space, then run the command again"), 1
        case KeyboardInterrupt():
            return "stopped; what was saved stays, and the same command goes on from there", 130
    return None


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command-line program: a UserError or a full/read-only disk becomes one line and an exit status."""
    try:
        sys.exit(command() or 0)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        sys.exit(0)
    except (UserError, OSError, KeyboardInterrupt) as error:
        message, status = told(error)
        print(message, file=sys.stderr)
        sys.exit(status)
