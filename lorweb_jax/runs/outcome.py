"""How a run ended: outcome.json in its folder, which a run that is killed doesn't write."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax

from lorweb_jax.common.outputs import write_file

FILE = "outcome.json"


@contextlib.contextmanager
def recorded(workdir: Path) -> Iterator[dict[str, str]]:
    """Within it the run has no outcome; afterwards outcome.json holds what the dictionary then has: {"state":
    "finished"}, or "stopped", as it is at first. An error within makes it {"state": "failed", "error": one line}.

    Process 0 alone writes. A file that can't be written is left out.
    """
    if jax.process_index():
        yield {}
        return
    path, outcome = workdir / FILE, {"state": "stopped"}
    path.unlink(missing_ok=True)
    try:
        yield outcome
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        outcome = {"state": "failed", "error": line[:500]}
        raise
    finally:
        with contextlib.suppress(Exception):  # the disk may be full: the error that was raised says so
            write_file(path, (json.dumps(outcome) + "\n").encode())
