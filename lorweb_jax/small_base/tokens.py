"""The small base's tokenizers, of the words in its captions, and the captions' tokens."""

from pathlib import Path

import numpy as np

from lorweb_jax.models.tokenizers.folder import tokenize_clip, tokenize_t5
from lorweb_jax.small_base.tokenizers import train_small_tokenizers


def make_tokenizers(texts: list[str], folder: Path, length: int) -> tuple[int, int]:
    """Write folder/tokenizer and folder/tokenizer_2, which pads to `length`; returns their vocabularies' sizes."""
    return train_small_tokenizers([], texts, folder, t5_tokens=length)


def tokens_of(texts: list[str], folder: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [texts, length] of both tokenizers, CLIP's first."""
    return (tokenize_clip(texts, folder / "tokenizer", length), tokenize_t5(texts, folder / "tokenizer_2", length))
