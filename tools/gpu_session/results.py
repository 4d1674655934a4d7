"""What a session on a device found, as it finds it."""

import json
import threading
import time
import traceback
from pathlib import Path

START = time.monotonic()


def say(*words):
    print(f"[{time.monotonic() - START:6.1f}]", *words, flush=True)


class Results:
    """A JSON file that is whole after every change."""

    def __init__(self, path):
        self.path, self.values, self.lock = Path(path), {}, threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, section, name, value):
        with self.lock:
            self.values.setdefault(section, {})[name] = value
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.values, indent=1) + "\n")
            partial.replace(self.path)
        say(section, name, value)

    def failed(self, what, error):
        traceback.print_exception(error)
        self.put("failed", what, f"{type(error).__name__}: {str(error)[:300]}")
