"""Tokenizers for the small trained base: every word of a closed vocabulary is one token, in both published formats.

Run once, when the small base is built; what it writes is read by lorweb_jax.models.tokenizers.folder, and by
transformers' CLIPTokenizer and T5TokenizerFast.
"""

import io
import json
import math
import re
import string
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.models.tokenizers import spiece
from lorweb_jax.models.tokenizers.folder import CLIP_TOKENS, END, START


def train_small_tokenizers(
    captions: list[str], instructions: list[str], folder: str | Path, *, t5_tokens: int
) -> tuple[int, int]:
    """Write folder/tokenizer (CLIP byte-pair format) and folder/tokenizer_2 (T5, sentencepiece unigram).

    The words of `captions` and `instructions` are CLIP's vocabulary, those of `instructions` T5's. Case is folded.
    `t5_tokens` is the length that instructions are padded to. Returns the two vocabulary sizes, (CLIP, T5).
    Raises UserError without instructions.
    """
    if not (words := count_words(instructions)):
        raise UserError("no words were found to make tokenizers of; give at least one instruction")
    folder = Path(folder)
    return (
        _write_clip(words + count_words(captions), folder / "tokenizer"),
        _write_t5(words, folder / "tokenizer_2", t5_tokens),
    )


def count_words(sentences: list[str]) -> Counter:
    """Words as CLIP splits them: runs of letters, single digits, runs of other signs."""
    return Counter(
        word for sentence in sentences for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", sentence.lower())
    )


def _byte_letters() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def byte_pair_merges(words: Counter) -> list[tuple[str, str]]:
    """Merges, most frequent pair first (ties in alphabetical order), until every word is one symbol."""
    pieces: dict[str, tuple[str, ...]] = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    pairs, merges = Counter(), []
    for word, symbols in pieces.items():
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += words[word]
    while pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, symbols in pieces.items():
            if best[0] in symbols and (merged := _merge(symbols, best)) != symbols:
                pieces[word] = merged
                for pair in zip(symbols, symbols[1:]):
                    pairs[pair] -= words[word]
                for pair in zip(merged, merged[1:]):
                    pairs[pair] += words[word]
        pairs = +pairs  # without those that no word has any more
    return merges


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged, i = [], 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


def _write_clip(words: Counter, folder: Path) -> int:
    ascii_words = Counter({word: count for word, count in words.items() if word.isascii()})
    merges = byte_pair_merges(ascii_words)
    letters = _byte_letters()
    # The end token comes last: CLIP pools the largest id of a sentence.
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n", encoding="utf-8"
    )
    _write_json(folder / "vocab.json", vocabulary)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_settings(
        folder,
        "CLIPTokenizer",
        special,
        {vocabulary[token]: token for token in (START, END)},
        model_max_length=CLIP_TOKENS,
        normalized=True,
        errors="replace",
    )
    return len(vocabulary)


def _write_t5(words: Counter, folder: Path, tokens: int) -> int:
    model = _sentencepiece_model(words)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    spiece.tokenizer(model.SerializeToString(), after_special_tokens=False).save(str(folder / "tokenizer.json"))
    special = {"eos_token": spiece.END, "pad_token": spiece.PAD, "unk_token": spiece.UNKNOWN}
    # tokenizer.json has the first word's mark; as a setting it would have loaders convert spiece.model again.
    _write_settings(
        folder,
        "T5Tokenizer",
        special,
        {i: model.pieces[i].piece for i in range(3)},
        model_max_length=tokens,
        normalized=False,
        add_prefix_space=None,
        extra_ids=0,
        legacy=False,
    )
    return len(model.pieces)


def _write_settings(
    folder: Path, kind: str, special: dict[str, str], decoder: dict[int, str], *, normalized: bool, **settings: Any
) -> None:
    """tokenizer_config.json and special_tokens_map.json, as transformers writes and reads them."""
    options = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    _write_json(
        folder / "special_tokens_map.json", {name: {"content": token, **options} for name, token in special.items()}
    )
    added = {str(number): {"content": token, **options, "special": True} for number, token in decoder.items()}
    _write_json(
        folder / "tokenizer_config.json",
        dict(
            sorted(
                {
                    "added_tokens_decoder": added,
                    "clean_up_tokenization_spaces": False,
                    "extra_special_tokens": {},
                    "tokenizer_class": kind,
                    **special,
                    **settings,
                }.items()
            )
        ),
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sentencepiece_model(words: Counter):
    """A unigram model of whole words, with single characters for everything else; ids 0, 1, 2 as in T5."""
    import sentencepiece

    # sentencepiece compiles the case folding; the pieces it would learn are replaced by ours.
    compiled = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        rules.writelines(f"{ord(upper):X}\t{ord(upper.lower()):X}\n" for upper in string.ascii_uppercase)
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_writer=compiled,
            model_type="char",
            vocab_size=8000,
            hard_vocab_limit=False,
            normalization_rule_tsv=rules.name,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    model = spiece.parse_model(compiled.getvalue())
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.normalizer_spec.normalization_rule_tsv = ""
    del model.pieces[:]
    kinds = model.SentencePiece
    for name, kind in ((spiece.PAD, kinds.CONTROL), (spiece.END, kinds.CONTROL), (spiece.UNKNOWN, kinds.UNKNOWN)):
        model.pieces.add(piece=name, score=0.0, type=kind)
    total = sum(words.values())
    scores = {}
    for word, count in words.items():
        scores["▁" + word] = math.log(count / total)
    # Characters cost more than any word, so that a known word is never spelled.
    floor = math.log(1 / total) - 5.0
    characters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation) | set("".join(words)))
    for character in ["▁", *characters]:
        scores.setdefault(character, floor)
    for piece, score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
        model.pieces.add(piece=piece, score=score, type=kinds.NORMAL)
    return model
