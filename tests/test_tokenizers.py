"""Tokenizers: the golden ids, ids of transformers' classes where they are the ones that diffusers uses, and the small
base's own, read by transformers as diffusers would.

transformers 5 gives other ids for some texts; it is no oracle here.
"""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from golden import golden_dir

from lorweb_jax.common.errors import UserError
from lorweb_jax.models.tokenizers.folder import load_clip_tokenizer, load_t5_tokenizer, tokenize_clip, tokenize_t5
from lorweb_jax.small_base.tokenizers import train_small_tokenizers

PIPELINE = golden_dir() / "tiny_pipeline"
SMALL = Path(__file__).parent.parent / "assets" / "small_kontext"
SENTENCES = ["put a red frame around it", "flip it left to right", "turn it, upside down", "make it look old"]
CAPTIONS = ["red apple upside down"]


def test_ids_equal_golden():
    with np.load(golden_dir() / "e2e_square.npz") as golden:
        prompt = str(golden["prompt"])
        np.testing.assert_array_equal(tokenize_clip([prompt], PIPELINE / "tokenizer")[0], golden["clip_input_ids"])
        np.testing.assert_array_equal(tokenize_t5([prompt], PIPELINE / "tokenizer_2")[0], golden["t5_input_ids"])


TEXTS = [
    "Put it  upside down, please.",
    "",
    "   ",
    " leading and trailing ",
    "a\tb\nc\r\nd",
    "DON'T I'll we've 's 'Tis",
    "it's",
    "3 x 4.5e6 = 0",
    "a!!!???...",
    "under_score-dash\u2014em",
    "\u201cquotes\u201d \u2018s",
    "&amp; <b>",
    "caf\u00e9 e\u0301 A\u030a",
    "\u0130stanbul STRASSE \u00df",
    "x\u00b2 \u00bd \u2460",
    "nbsp\u00a0x\u3000y\u2028z",
    "zero\u200bwidth a\u00adb \ufeffbom",
    "nul\x00 \x01 \x7f \x85 \x1c.",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\u732bcat\u732b \u65e5\u672c\u8a9e \u306e",
    "\ud55c\uad6d\uc5b4 \u0645\u0631\u062d\u0628\u0627 \u0915\u094d\u0937\u093f",
    "\ue000private \uff21\uff46 \ufb01 \u01c5",
    "<|endoftext|> inside",
    "<|EndOfText|>x<|startoftext|>",
    "</s> z <pad>",
    "x <extra_id_3> y<extra_id_0>",
    "word " * 200,
]
# Letters of all kinds. What Unicode got lately, and most of what lies beyond 16 bits, has other properties in Python's
# tables than in those of tokenizers.
_LETTERS = [chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
RANDOM = ["".join(np.random.default_rng(seed).choice(_LETTERS, 8)) for seed in range(150)]


@pytest.fixture(scope="module")
def theirs():
    """transformers, of a version whose ids diffusers' pipelines were made with."""
    transformers = pytest.importorskip("transformers", minversion="4.57")
    if not transformers.__version__.startswith("4."):
        pytest.skip("transformers 5 gives some texts other ids")
    return transformers


@pytest.mark.parametrize("base", [PIPELINE, SMALL], ids=["golden", "small"])
def test_ids_are_those_of_transformers(base, theirs):
    clip = theirs.CLIPTokenizer.from_pretrained(base / "tokenizer")
    t5 = theirs.T5TokenizerFast.from_pretrained(base / "tokenizer_2")
    for tokenizer, tokenize, folder, length in (
        (clip, tokenize_clip, "tokenizer", 77),
        (t5, tokenize_t5, "tokenizer_2", 40),
    ):
        expected = tokenizer(TEXTS + RANDOM, padding="max_length", truncation=True, max_length=length)["input_ids"]
        np.testing.assert_array_equal(tokenize(TEXTS + RANDOM, base / folder, length), expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"legacy": False}, {"add_prefix_space": False}, {"extra_ids": 3}, {"add_prefix_space": True, "legacy": True}],
)
def test_a_bare_spiece_model(settings, tmp_path, theirs):
    """As transformers converts it; add_prefix_space, where it is set, goes before what tokenizer.json says."""
    shutil.copy(PIPELINE / "tokenizer_2" / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if "add_prefix_space" in settings:
        shutil.copy(PIPELINE / "tokenizer_2" / "tokenizer.json", tmp_path)
    # Asked for nothing, transformers would drop the first word's mark.
    expected = theirs.T5TokenizerFast.from_pretrained(tmp_path, **{"add_prefix_space": True} | settings)
    assert json.loads(load_t5_tokenizer(tmp_path).backend.to_str()) == json.loads(expected.backend_tokenizer.to_str())


@pytest.mark.parametrize("base", [PIPELINE, SMALL], ids=["golden", "small"])
def test_a_bare_spiece_model_is_sentencepieces(base, tmp_path):
    shutil.copy(base / "tokenizer_2" / "spiece.model", tmp_path)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for text in [*SENTENCES, "the animal", "Put it  upside down, please."]:
        ids = [*slow.encode(text), 1]
        assert list(tokenize_t5([text], tmp_path, 40)[0]) == ids + [0] * (40 - len(ids))


def test_tokens_beside_the_vocabulary(tmp_path):
    """Where a folder adds tokens, texts may hold them; a number that isn't the one they get is refused."""
    shutil.copytree(PIPELINE / "tokenizer", tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    size = len(json.loads((tmp_path / "vocab.json").read_text()))
    settings |= {"pad_token": {"content": "!"}, "added_tokens_decoder": {str(size): {"content": "<new>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert list(tokenize_clip(["<new><new>"], tmp_path, 6)[0]) == [size - 2, size, size, size - 1, 0, 0]
    other = tmp_path / "other"
    shutil.copytree(PIPELINE / "tokenizer", other)
    settings["added_tokens_decoder"] = {str(size + 1): {"content": "<new>"}}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"the number {size + 1}, but by its vocabulary it has {size}"):
        load_clip_tokenizer(other)


def test_what_is_left_out_stands_as_in_the_text():
    clip, t5 = load_clip_tokenizer(SMALL / "tokenizer"), load_t5_tokenizer(SMALL / "tokenizer_2")
    text = "Put a RED frame around it,  please"
    for tokenizer in (clip, t5):
        assert tokenizer.left_out(text, 40) == ""
        # Start and end take places, too: CLIP has both, T5 the end alone.
        assert tokenizer.left_out(text, 6 if tokenizer is clip else 5) == "around it,  please"
        assert tokenizer.left_out("caf\udc00\ud800", 40) == ""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, train_small_tokenizers(CAPTIONS, SENTENCES, folder, t5_tokens=16)


def tokens(tokenizer, text):
    return tokenizer.backend.encode(text).tokens


def test_every_known_word_is_one_token(small):
    folder, _ = small
    for sentence in SENTENCES:
        words = sentence.replace(",", " ,").split()
        assert tokens(load_clip_tokenizer(folder / "tokenizer"), sentence)[1:-1] == [f"{word}</w>" for word in words]
        t5 = tokens(load_t5_tokenizer(folder / "tokenizer_2"), sentence)[:-1]
        assert t5 == [word if word == "," else f"▁{word}" for word in words]
    assert tokens(load_clip_tokenizer(folder / "tokenizer"), "apple")[1:-1] == ["apple</w>"]


def test_unknown_words_are_spelled_and_case_is_folded(small):
    folder, _ = small
    clip, t5 = load_clip_tokenizer(folder / "tokenizer"), load_t5_tokenizer(folder / "tokenizer_2")
    spelled = clip.backend.decode(clip.backend.encode("Zebra, é!").ids)
    assert spelled.replace("</w>", "") == "zebra,é!"
    assert t5.backend.decode(t5.backend.encode("Make it a Zebra!").ids) == "make it a zebra!"
    assert t5.backend.token_to_id("<unk>") not in t5.backend.encode("Make it a Zebra!").ids


def test_id_layout(small):
    folder, (clip_size, t5_size) = small
    clip, t5 = load_clip_tokenizer(folder / "tokenizer"), load_t5_tokenizer(folder / "tokenizer_2")
    assert clip.backend.token_to_id("<|endoftext|>") == clip_size - 1 == clip.backend.get_vocab_size() - 1 == clip.pad
    assert [t5.backend.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert (t5.pad, t5.backend.get_vocab_size()) == (0, t5_size)
    assert tokenize_clip(SENTENCES[:1], folder / "tokenizer").shape == (1, 77)
    ids = tokenize_t5(["flip it", " ".join(["flip"] * 40)], folder / "tokenizer_2", 16)
    assert ids.shape == (2, 16) and ids.dtype == np.int32
    assert list(ids[0, 2:]) == [1] + [0] * 13 and ids[1, -1] == 1


def test_the_small_bases_are_read_by_transformers(small, theirs, tmp_path):
    """By the classes that its model_index.json names; written again by them, they are the same."""
    folder, _ = small
    texts = [*SENTENCES, "Put it  upside down, please."]
    clip = theirs.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = theirs.T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    for tokenizer, name in ((clip, "tokenizer"), (t5, "tokenizer_2")):
        tokenizer.save_pretrained(tmp_path / name)
        for path in sorted((tmp_path / name).glob("*.json")):
            ours, again = (json.loads((place / name / path.name).read_text()) for place in (folder, tmp_path))
            for written in (ours, again):
                for field in ("additional_special_tokens", "sp_model_kwargs"):  # empty ones that transformers adds
                    assert not written.pop(field, None)
                if path.name == "special_tokens_map.json":
                    written["pad_token"] = "either as a text or with options"
            assert again == ours, path.name
    np.testing.assert_array_equal(
        t5(texts, padding="max_length", max_length=16)["input_ids"], tokenize_t5(texts, folder / "tokenizer_2", 16)
    )
    np.testing.assert_array_equal(
        clip(texts, padding="max_length", max_length=77)["input_ids"], tokenize_clip(texts, folder / "tokenizer")
    )


def test_missing_files_and_words_are_named(tmp_path):
    with pytest.raises(UserError, match="vocab.json"):
        load_clip_tokenizer(tmp_path)
    with pytest.raises(UserError, match="spiece.model"):
        load_t5_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no words"):
        train_small_tokenizers([], [], tmp_path, t5_tokens=16)


@pytest.mark.parametrize("kept", [0, 1, 200])
def test_cut_merges_are_told(kept, tmp_path):
    """Such a file reads well, and every text would get other ids."""
    folder = shutil.copytree(SMALL / "tokenizer", tmp_path / "tokenizer")
    lines = (folder / "merges.txt").read_text().splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(lines[:kept]))
    with pytest.raises(UserError, match="merges.txt makes .* words of several letters"):
        load_clip_tokenizer(folder)
