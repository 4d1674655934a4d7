"""Text to token ids, with the tokenizers in the pipeline's own folder.

Built with the tokenizers library from the folder's files rather than by transformers' classes, of which other versions
give other ids: CLIP's by whether ftfy is installed and by the version, T5's by whether tokenizer.json's own word about
the first word's mark counts. These give the ids of transformers 4.57's CLIPTokenizer and T5TokenizerFast, which those
of diffusers' FLUX pipelines are; what is compared in tests.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, read_json
from lorweb_jax.common.user_files import inside, read_text, regular_file
from lorweb_jax.settings.rules import shown
from lorweb_jax.settings.texts import as_text

CLIP_TOKENS = 77  # the positions that CLIP's text tower has
_FILE_BYTES = 100_000_000  # of a vocabulary; the largest published ones have 35 MB
_AGAIN = "download the tokenizer's folder again"
_FILES = {
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}

_Id = Annotated[int, Between(0, 2_000_000)]


@dataclasses.dataclass(frozen=True)
class _Added:
    """A token beside the vocabulary."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False
    special: bool = True


_Token = str | _Added | None


@dataclasses.dataclass(frozen=True)
class _Settings:
    """tokenizer_config.json and special_tokens_map.json: what ids depend on."""

    model_max_length: Annotated[int, Between(2, 10**31)] | None = None  # 10^30 where nobody set it
    extra_ids: Annotated[int, Between(0, 10_000)] | None = None
    additional_special_tokens: Annotated[list[Any], Between(0, 10_000)] | None = None
    extra_special_tokens: dict[str, Any] | list[Any] | None = None
    added_tokens_decoder: Annotated[dict[str, _Added], Between(0, 100_000)] | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    bos_token: _Token = None
    eos_token: _Token = None
    pad_token: _Token = None
    unk_token: _Token = None


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A folder's tokenizer: `backend` (tokenizers.Tokenizer) puts start and end tokens around a text, `pad` is the id
    that shorter ones are filled up with, `max_length` the number of tokens that the folder names."""

    backend: Any
    pad: int
    max_length: int
    folder: str

    def ids(self, texts: Sequence[str], max_length: int) -> np.ndarray:
        """int32 [b, max_length]: the words of longer texts are cut before the end token."""
        with _told(self.folder):
            found = [
                encoding.ids for encoding in self.backend.encode_batch([as_text(text, "a text") for text in texts])
            ]
        cut = [ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]] for ids in found]
        return np.array([[*ids, *[self.pad] * (max_length - len(ids))] for ids in cut], np.int32).reshape(
            -1, max_length
        )

    def left_out(self, text: str, max_length: int) -> str:
        """What of a text `ids` doesn't take, as it stands there; "" where all of it is taken."""
        text = as_text(text, "a text")
        with _told(self.folder):
            found = self.backend.encode(text)
        return text[found.offsets[max_length - 1][0] :].strip() if len(found.ids) > max_length else ""


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
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, at most {_FILE_BYTES:,} were expected of a "
                f"tokenizer; {_AGAIN}"
            )
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
    """Whatever tokenizers raises on damaged files becomes one sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # a panic of tokenizers' Rust code is no Exception
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what} can't be used as a tokenizer ({line[:200]}); {_AGAIN}") from None


def _settings(folder: Path) -> _Settings:
    """Of tokenizer_config.json, and of special_tokens_map.json where the first says nothing."""
    read = [
        read_json(path, _Settings, limit=_FILE_BYTES)
        for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
        if path.exists()
    ]
    return _Settings(
        **{
            field.name: next((value for settings in read if (value := getattr(settings, field.name)) is not None), None)
            for field in dataclasses.fields(_Settings)
        }
    )


def _content(token: _Token, otherwise: str) -> str:
    return token.content if isinstance(token, _Added) else otherwise if token is None else token


def _add(backend: Any, tokens: dict[int, _Added], folder: Path) -> None:
    """Add tokens that may stand in a text as they are. UserError where they would get other ids than the file says."""
    from tokenizers import AddedToken

    for wanted, token in sorted(tokens.items()):
        options = dataclasses.asdict(token)
        backend.add_tokens([AddedToken(**options)])
        if (found := backend.token_to_id(token.content)) != wanted:
            raise UserError(
                f"{folder / 'tokenizer_config.json'} gives {shown(token.content)} the number {wanted}, but by its "
                f"vocabulary it has {found}; {_AGAIN}"
            )


def _decoder(settings: _Settings, folder: Path) -> dict[int, _Added]:
    """{id: token} of the settings, or of added_tokens.json as older folders have it."""
    path = folder / "added_tokens.json"
    if settings.added_tokens_decoder is None and path.exists():
        return {
            number: _Added(token, special=False)
            for token, number in read_json(path, dict[str, _Id], limit=_FILE_BYTES).items()
        }
    decoder = settings.added_tokens_decoder or {}
    if wrong := next((number for number in decoder if not number.isascii() or not number.isdigit()), None):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has the key {shown(wrong)}, a token's "
            f"number was expected; {_AGAIN}"
        )
    return {int(number): token for number, token in decoder.items()}


# CLIP's words: its own tokens, endings of English short forms, letters, single digits, other signs.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"


@functools.lru_cache(maxsize=8)
def load_clip_tokenizer(folder: str | Path) -> TextTokenizer:
    """The CLIP tokenizer of `folder` (vocab.json + merges.txt), read once a folder. UserError for damaged files."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    folder = Path(folder)
    _check(folder, (("vocab.json", "merges.txt"),))
    vocabulary = read_json(folder / "vocab.json", dict[str, _Id], limit=_FILE_BYTES)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{folder / 'vocab.json'} gives two words the same number; {_AGAIN}")
    merges, settings = _merges(folder / "merges.txt"), _settings(folder)
    _require_merges(vocabulary, merges, folder)
    start, end = _content(settings.bos_token, START), _content(settings.eos_token, END)
    pad, unknown = _content(settings.pad_token, END), _content(settings.unk_token, END)
    for token in (start, end, pad, unknown):
        if token not in vocabulary:
            raise UserError(
                f"{folder / 'vocab.json'} has no number for {shown(token)}, which the tokenizer needs; {_AGAIN}"
            )
    with _told(f"{folder} (vocab.json, merges.txt)"):
        backend = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
                unk_token=unknown,
            )
        )
        # The first is what CLIPTokenizer does with a text where ftfy isn't installed: signs that can't be seen are
        # taken out, and Chinese signs are words of their own.
        backend.normalizer = normalizers.Sequence(
            [
                normalizers.BertNormalizer(
                    clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
                ),
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.TemplateProcessing(
            single=[start, "$A", end], special_tokens=[(token, vocabulary[token]) for token in (start, end)]
        )
        own = {vocabulary[token]: _Added(token, normalized=True) for token in (start, end)}
        _add(backend, own | _decoder(settings, folder), folder)
    return TextTokenizer(
        backend, vocabulary[pad], min(settings.model_max_length or CLIP_TOKENS, CLIP_TOKENS), str(folder)
    )


def _merges(path: Path) -> list[tuple[str, str]]:
    """UserError unless each line after the heading holds two symbols."""
    lines = read_text(path, _FILE_BYTES).strip().split("\n")
    merges = []
    for number, line in enumerate(lines[1:], 2):
        if len(symbols := line.split()) != 2:
            raise UserError(f"{path}: line {number} is {line[:60]!r}, two symbols were expected; {_AGAIN}")
        merges.append((symbols[0], symbols[1]))
    return merges


def _require_merges(vocabulary: dict[str, int], merges: list[tuple[str, str]], folder: Path) -> None:
    """UserError where a word of several letters is the product of no merge: such a file was cut, and texts would get
    other tokens than the text encoder was trained with."""
    made = {first + second for first, second in merges}
    plain = {word for word in vocabulary if len(word.removesuffix("</w>")) > 1 and not word.startswith("<|")}
    if absent := plain - made:
        raise UserError(
            f"{folder / 'merges.txt'} makes {len(plain) - len(absent)} of the {len(plain)} words of several "
            f"letters in vocab.json, but not {shown(min(absent))}; {_AGAIN}"
        )


@functools.lru_cache(maxsize=8)
def load_t5_tokenizer(folder: str | Path) -> TextTokenizer:
    """The T5 tokenizer of `folder` (tokenizer.json, or a bare spiece.model), read once a folder. UserError for damaged
    files."""
    from tokenizers import Tokenizer

    from lorweb_jax.models.tokenizers import spiece

    folder = Path(folder)
    _check(folder, (("tokenizer.json",), ("spiece.model",)))
    settings, model = _settings(folder), folder / "spiece.model"
    # As transformers 4.57 does: what tokenizer_config.json says of the first word goes before tokenizer.json.
    given = settings.add_prefix_space is not None and model.exists()
    if (folder / "tokenizer.json").exists() and not given:
        with _told(str(folder / "tokenizer.json")):
            backend = Tokenizer.from_str(read_text(folder / "tokenizer.json", _FILE_BYTES))
            backend.no_truncation()
            backend.no_padding()
    else:
        with _told(str(model)):
            backend = spiece.tokenizer(
                model.read_bytes(),
                100 if settings.extra_ids is None else settings.extra_ids,
                first_word=settings.add_prefix_space is not False,
                after_special_tokens=settings.legacy is not False,
            )
    pad = _content(settings.pad_token, "<pad>")
    if (number := backend.token_to_id(pad)) is None:
        raise UserError(f"{folder} has no number for {shown(pad)}, which texts are filled up with; {_AGAIN}")
    return TextTokenizer(backend, number, min(settings.model_max_length or 10**9, 10**9), str(folder))


def tokenize_clip(texts: Sequence[str], folder: str | Path, max_length: int | None = None) -> np.ndarray:
    """int32 [b, t], t = max_length (default: the tokenizer's own, 77): texts between start and end tokens, padded.

    Longer texts are cut. The attention is causal and the pooled token is the end token, so a shorter
    max_length that holds every text gives the same pooled embedding.
    """
    tokenizer = load_clip_tokenizer(str(folder))
    return tokenizer.ids(texts, max_length or tokenizer.max_length)


def tokenize_t5(texts: Sequence[str], folder: str | Path, max_length: int = 512) -> np.ndarray:
    """int32 [b, t], t = max_length: texts with an end token, padded with 0, cut if longer."""
    return load_t5_tokenizer(str(folder)).ids(texts, max_length)
