"""Where the golden data is: inputs and outputs of the published implementations (tests/golden/README.md)."""

from pathlib import Path


def golden_dir() -> Path:
    """The folder of the golden data."""
    return Path(__file__).parent / "golden"
