"""Work on the device for many browser tabs: one at a time, as they arrive, stopped when nobody wants its result."""

import collections
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_MOST_CLOSED = 10_000  # tabs that are remembered as closed

Tell = Callable[[Any], None]


class Stopped(Exception):
    """The tab that asked for the work was closed, or its Stop pressed."""


class Finished(NamedTuple):
    """The last event of a stream: what the work returned."""

    result: Any


class Runner:
    """Runs one piece of work at a time. A tab is known by its session's hash, any text."""

    def __init__(self):
        self._device = threading.Lock()
        self._stops: dict[str, set[threading.Event]] = {}
        self._closed: collections.deque[str] = collections.deque(maxlen=_MOST_CLOSED)

    def stream(self, tab: str, work: Callable[[Tell], Any]) -> Iterator[Any]:
        """What work(tell) tells as it goes, then Finished(its result). The work is on a thread of its own.

        Closing the iterator, `stop` and `leave` make the next `tell` raise Stopped there, which ends the work and is
        raised here. What else the work raises is raised here too.
        """
        stop, events = threading.Event(), queue.SimpleQueue()
        if tab in self._closed:
            raise Stopped
        self._stops.setdefault(tab, set()).add(stop)

        def tell(event: Any) -> None:
            if stop.is_set():
                raise Stopped
            events.put((event, None))

        def run() -> None:
            try:
                with self._device:
                    if stop.is_set():
                        raise Stopped
                    result = Finished(work(tell))
                events.put((result, None))
            except BaseException as error:
                events.put((None, error))

        threading.Thread(target=run, name="sampling", daemon=True).start()
        try:
            while True:
                event, error = events.get()
                if error is not None:
                    raise error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            stop.set()
            self._stops.get(tab, set()).discard(stop)

    def stop(self, tab: str) -> None:
        """End what the tab has running or waiting here."""
        for stop in list(self._stops.get(tab, ())):
            stop.set()

    def leave(self, tab: str) -> None:
        """The same of a tab that was closed, which gets no further work either."""
        self._closed.append(tab)
        self.stop(tab)
        self._stops.pop(tab, None)
