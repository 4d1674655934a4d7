"""Text to token ids, with the tokenizers in the pipeline's own folder."""

import contextlib
import dataclasses
import functools
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lorweb_jax.errors import UserError
from lorweb_jax.files import inside, read_text, regular_file
from lorweb_jax.schema import Between, read_json

CLIP_TOKENS = 77               # the positions that CLIP's text tower has
_FILE_BYTES = 100_000_000      # of a vocabulary; the largest published ones have 35 MB
_AGAIN = "download the tokenizer's folder again"
_FILES = {"vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json"}

_Id = Annotated[int, Between(0, 2_000_000)]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """tokenizer_config.json: what decides how much is made of it. transformers reads the rest."""

    model_max_length: Annotated[int, Between(2, 10 ** 31)] | None = None  # 10^30 where nobody set it
    extra_ids: Annotated[int, Between(0, 10_000)] | None = None
    additional_special_tokens: Annotated[list[Any], Between(0, 10_000)] | None = None
    added_tokens_decoder: Annotated[dict[str, dict[str, Any]], Between(0, 100_000)] | None = None


def _check(folder: Path, alternatives: Sequence[tuple[str, ...]]) -> None:
    """UserError unless one of the alternatives is there and all files of the folder may be read.

    A link to nothing, as an unfinished download leaves it, is not taken for a file that was left out.
    """
    if not any(all(os.path.lexists(folder / name) for name in names) for names in alternatives):
        wanted = " or ".join(" and ".join(names) for names in alternatives)
        raise UserError(f"{folder} holds no {wanted}; give a pipeline folder in diffusers layout with its tokenizers")
    for path in folder.iterdir():
        read = path.name in _FILES or not path.is_dir()
        if read and regular_file(path, _AGAIN).stat().st_size > _FILE_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, at most {_FILE_BYTES:,} were expected of a "
                            f"tokenizer; {_AGAIN}")
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        read_json(settings, _Settings, limit=_FILE_BYTES)
        for name, value in read_json(settings, limit=_FILE_BYTES).items():
            if name in ("vocab_file", "merges_file", "tokenizer_file") and value is not None:
                inside(folder, str(value), settings)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            read_json(folder / name, limit=_FILE_BYTES)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever transformers and tokenizers raise on damaged files becomes one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # a panic of tokenizers' Rust code is no Exception
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what} can't be used as a tokenizer ({line[:200]}); {_AGAIN}") from None


@functools.lru_cache(maxsize=8)
def load_clip_tokenizer(folder: str | Path):
    """The CLIP tokenizer of `folder` (vocab.json + merges.txt), read once a folder. UserError for damaged files."""
    from transformers import CLIPTokenizer  # slow to import, and not every command reads text

    folder = Path(folder)
    _check(folder, (("vocab.json", "merges.txt"),))
    vocabulary = read_json(folder / "vocab.json", dict[str, _Id], limit=_FILE_BYTES)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{folder / 'vocab.json'} gives two words the same number; {_AGAIN}")
    _check_merges(folder / "merges.txt")
    with _told(f"{folder} (vocab.json, merges.txt)"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = min(tokenizer.model_max_length, CLIP_TOKENS)
    return tokenizer


def _check_merges(path: Path) -> None:
    """UserError unless each line after the heading holds two symbols."""
    lines = read_text(path, _FILE_BYTES).strip().split("\n")
    for number, line in enumerate(lines[1:], 2):
        if len(line.split()) != 2:
            raise UserError(f"{path}: line {number} is {line[:60]!r}, two symbols were expected; {_AGAIN}")


@functools.lru_cache(maxsize=8)
def load_t5_tokenizer(folder: str | Path):
    """The T5 tokenizer of `folder` (tokenizer.json, or a bare spiece.model), read once a folder. UserError for damaged
    files."""
    from transformers import T5TokenizerFast

    folder = Path(folder)
    _check(folder, (("tokenizer.json",), ("spiece.model",)))
    if (folder / "tokenizer.json").exists():
        with _told(str(folder / "tokenizer.json")):
            return T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    # Converted from a bare spiece.model, the fast tokenizer would drop the first word's leading "▁".
    with _told(str(folder / "spiece.model")):
        return T5TokenizerFast.from_pretrained(folder, add_prefix_space=True, local_files_only=True)


def _ids(tokenizer, texts: Sequence[str], max_length: int, folder: str | Path) -> np.ndarray:
    with _told(str(folder)):
        ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=max_length,
                        return_attention_mask=False)["input_ids"]
        array = np.asarray(ids, np.int64)
        if array.shape != (len(ids), max_length) or not (0 <= array).all() or not (array < 2 ** 31).all():
            raise ValueError(f"it gives {array.shape} numbers for {len(ids)} texts of {max_length} tokens")
    return array.astype(np.int32)


def left_out(tokenizer, text: str, max_length: int) -> str:
    """What of a text lies beyond `max_length` tokens, start and end included; "" where all of it is taken."""
    # No token is shorter than a byte (CLIP) or a character in its compatible form (T5).
    if max(len(text.lower().encode()), len(unicodedata.normalize("NFKC", text))) + 2 <= max_length:
        return ""
    with _told(tokenizer.name_or_path):
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    # Both tokenizers cut the words before the end token, which stays.
    return tokenizer.decode(ids[max_length - 1:-1], skip_special_tokens=True).strip() if len(ids) > max_length else ""


def tokenize_clip(texts: list[str], folder: str | Path, max_length: int | None = None) -> np.ndarray:
    """int32 [b, t], t = max_length (default: the tokenizer's own, 77): texts between start and end tokens, padded.

    Longer texts are cut. The attention is causal and the pooled token is the end token, so a shorter
    max_length that holds every text gives the same pooled embedding.
    """
    tokenizer = load_clip_tokenizer(str(folder))
    return _ids(tokenizer, texts, max_length or tokenizer.model_max_length, folder)


def tokenize_t5(texts: list[str], folder: str | Path, max_length: int = 512) -> np.ndarray:
    """int32 [b, t], t = max_length: texts with an end token, padded with 0, cut if longer."""
    return _ids(load_t5_tokenizer(str(folder)), texts, max_length, folder)
