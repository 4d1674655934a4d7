"""What argparse commands share: help that keeps its lines, and complaints of one sentence, like every other error."""

import argparse
from pathlib import Path
from typing import Any

from lorweb_jax.common.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError, with status 2, where argparse would print its usage and exit."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message):
        raise UserError(f"{message}; see --help", 2)


def add_basis_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--basis-config", type=nonempty_path, help="the basis's config.yaml (default: the one beside the file)"
    )


def add_image_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-encoder",
        type=nonempty_path,
        help="folder or Hub name of the router's image encoder (default: clip_vision in the pipeline's folder)",
    )


def nonempty_path(text: str) -> Path:
    """A path, as the type of an argument. An empty text is none: Path("") would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no path; give the name of a file or folder")
    return Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
