"""Progress by tqdm: a bar on a terminal, lines at intervals in a file."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

tqdm.monitor_interval = 0  # no thread: a process that reads images is forked


class _Lines:
    """What tqdm draws over and over on one line, as lines of their own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self._stream.write(f"{text}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    name: str,
    total: int,
    done: int,
    *,
    seconds: float,
    line: str = "{desc} {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left",
    **options: Any,
) -> tqdm:
    """A tqdm on stdout of which `done` of `total` were there before; rate and time left count from now.

    In a file it writes `line`, a bar_format of tqdm, at most once in so many seconds. options: tqdm's, such as `unit`.
    """
    terminal = sys.stdout.isatty()
    return tqdm(
        desc=name,
        total=total,
        initial=done,
        file=sys.stdout if terminal else _Lines(sys.stdout),
        leave=terminal,
        dynamic_ncols=terminal,
        mininterval=min(seconds, 0.5) if terminal else seconds,
        miniters=1,
        delay=0 if terminal else 1e-9,  # no line before the first is due
        bar_format=None if terminal else line,
        **options,
    )
