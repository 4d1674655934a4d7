"""Text to token ids, with the tokenizers in the pipeline's own folder."""

import functools
from pathlib import Path

import numpy as np

from lorweb_jax.errors import UserError


def _require(folder: Path, alternatives: tuple[tuple[str, ...], ...]) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in alternatives):
        wanted = " or ".join(" and ".join(names) for names in alternatives)
        raise UserError(f"{folder} holds no {wanted}; give a pipeline folder in diffusers layout with its tokenizers")


@functools.lru_cache(maxsize=8)
def load_clip_tokenizer(folder: str | Path):
    """The CLIP tokenizer of `folder` (vocab.json + merges.txt), read once a folder."""
    from transformers import CLIPTokenizer  # slow to import, and not every command reads text

    _require(Path(folder), (("vocab.json", "merges.txt"),))
    return CLIPTokenizer.from_pretrained(folder)


@functools.lru_cache(maxsize=8)
def load_t5_tokenizer(folder: str | Path):
    """The T5 tokenizer of `folder` (tokenizer.json, or a bare spiece.model), read once a folder."""
    from transformers import T5TokenizerFast

    folder = Path(folder)
    _require(folder, (("tokenizer.json",), ("spiece.model",)))
    if (folder / "tokenizer.json").is_file():
        return T5TokenizerFast.from_pretrained(folder)
    # Converted from a bare spiece.model, the fast tokenizer would drop the first word's leading "▁".
    return T5TokenizerFast.from_pretrained(folder, add_prefix_space=True)


def _ids(tokenizer, texts, max_length: int) -> np.ndarray:
    return np.asarray(tokenizer(list(texts), padding="max_length", truncation=True, max_length=max_length,
                                return_attention_mask=False)["input_ids"], np.int32)


def left_out(tokenizer, text: str, max_length: int) -> str:
    """What of a text lies beyond `max_length` tokens, start and end included; "" where all of it is taken."""
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    # Both tokenizers cut the words before the end token, which stays.
    return tokenizer.decode(ids[max_length - 1:-1], skip_special_tokens=True).strip() if len(ids) > max_length else ""


def tokenize_clip(texts: list[str], folder: str | Path, max_length: int | None = None) -> np.ndarray:
    """int32 [b, t], t = max_length (default: the tokenizer's own, 77): texts between start and end tokens, padded.

    Longer texts are cut. The attention is causal and the pooled token is the end token, so a shorter
    max_length that holds every text gives the same pooled embedding.
    """
    tokenizer = load_clip_tokenizer(str(folder))
    return _ids(tokenizer, texts, max_length or tokenizer.model_max_length)


def tokenize_t5(texts: list[str], folder: str | Path, max_length: int = 512) -> np.ndarray:
    """int32 [b, t], t = max_length: texts with an end token, padded with 0, cut if longer."""
    return _ids(load_t5_tokenizer(str(folder)), texts, max_length)
