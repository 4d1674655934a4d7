"""Texts from users, files and command lines, in a form that text encoders take."""

import os
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.settings.rules import shown

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def as_text(value: Any, name: str) -> str:
    """The text in valid Unicode: bytes of a command line or a file that are not UTF-8, which Python keeps as lone
    surrogates, become �. UserError, which calls the text `name`, for anything but a str."""
    if not isinstance(value, str):
        raise UserError(f'{name} is {shown(value)}, a text (str) was expected; give "" for none')
    try:
        # Where Python reads the command line as ASCII, text that is UTF-8 comes as surrogates, too.
        return os.fsencode(value).decode("utf-8")
    except UnicodeError:
        pass
    return "".join(REPLACEMENT if "\ud800" <= letter <= "\udfff" else letter for letter in value)
