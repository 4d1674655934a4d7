"""Errors meant for a person, and how a command shows them."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence: what was found, what was expected, what to do. `code` is the exit status (1, or 2 for usage)."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command-line program: a UserError or a full/read-only disk becomes one line and an exit status."""
    try:
        sys.exit(command() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'no file named'}; check the path, its "
              "permissions and the free space, then run the command again", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; what was saved stays, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
