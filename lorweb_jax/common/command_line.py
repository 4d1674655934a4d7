"""What argparse commands share: their complaints are one sentence, like every other error of a user's."""

import argparse

from lorweb_jax.common.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError, with status 2, where argparse would print its usage and exit."""

    def error(self, message):
        raise UserError(f"{message}; see --help", 2)


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
