"""Errors for the user, and how a command shows them."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

_LONG = re.compile(r"(\S{300})\S{300,}")


class UserError(Exception):
    """One sentence: what was found, what was expected, what to do. `code` is the exit status (1, or 2 for usage)."""

    def __init__(self, message: str, code: int = 1):
        # A damaged file may call a tensor or a field by thousands of letters.
        super().__init__(_LONG.sub(r"\1…", message))
        self.code = code


def message_and_status(error: BaseException) -> tuple[str, int] | None:
    """(message for the user, exit status) of an error; None for a bug of the program."""
    match error:
        case UserError():
            return f"error: {error}", error.code
        case OSError():
            return (
                f"error: {error.strerror or error}: {error.filename or 'no file named'}; check the path, its "
                "permissions and the free space, then run the command again"
            ), 1
        case KeyboardInterrupt():
            return "stopped; what was saved stays, and the same command goes on from there", 130
    return None


class _Patient:
    """A text stream that never fails: letters that its encoding lacks are written \\u…, and once its reader is gone
    (a closed pipe, a terminal, a full disk behind `> file`), what is written is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._patience():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with self._patience():
            self._stream.flush()

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def patient_output() -> Iterator[None]:
    """Within it printing never fails, whatever the terminal's encoding, and even after the terminal is gone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Patient(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        sys.stdout, sys.stderr = before


def say(sentence: str) -> None:
    """Print a sentence for the user; a terminal that can't show it is no error."""
    if sys.stdout:
        print(sentence, file=_Patient(sys.stdout), flush=True)


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command-line program: a UserError or a full/read-only disk becomes one line and an exit status."""
    with patient_output():
        try:
            status = command() or 0
        except BaseException as error:
            if not (expected := message_and_status(error)):
                raise
            message, status = expected
            print(message, file=sys.stderr)
    sys.exit(status)


def printable(text: str, longest: int = 500) -> str:
    """A text that any terminal, font and UTF-8 file takes: on one line, at most `longest` characters of it.

    Control characters, bytes of file names that aren't UTF-8 and the like are shown as \\x1b, \\xe9, \\ud800.
    """
    cut = text if len(text) <= longest else text[:longest] + "…"
    return "".join(character if character.isprintable() else _escaped(character) for character in cut)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # of a file name, as os.fsdecode gives it
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()
