"""Tokenizers: the golden ids, and the small base's own, read by transformers as diffusers would."""

import shutil

import numpy as np
import pytest

from golden import golden_dir
from lorweb_jax.encoders.small_tokenizers import train_small_tokenizers
from lorweb_jax.encoders.tokenizers import load_clip_tokenizer, load_t5_tokenizer, tokenize_clip, tokenize_t5
from lorweb_jax.errors import UserError

PIPELINE = golden_dir() / "tiny_pipeline"
SENTENCES = ["put a red frame around it", "flip it left to right", "turn it, upside down", "make it look old"]
CAPTIONS = ["red apple upside down"]


def test_ids_equal_golden():
    with np.load(golden_dir() / "e2e_square.npz") as golden:
        prompt = str(golden["prompt"])
        np.testing.assert_array_equal(tokenize_clip([prompt], PIPELINE / "tokenizer")[0], golden["clip_input_ids"])
        np.testing.assert_array_equal(tokenize_t5([prompt], PIPELINE / "tokenizer_2")[0], golden["t5_input_ids"])


def test_a_bare_spiece_model_keeps_the_first_words_mark(tmp_path):
    shutil.copy(PIPELINE / "tokenizer_2" / "spiece.model", tmp_path)
    tokens = load_t5_tokenizer(tmp_path).convert_ids_to_tokens(tokenize_t5(["the animal"], tmp_path, 8)[0])
    assert tokens[0].startswith("▁")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, train_small_tokenizers(CAPTIONS, SENTENCES, folder, t5_tokens=16)


def test_every_known_word_is_one_token(small):
    folder, _ = small
    for sentence in SENTENCES:
        words = sentence.replace(",", " ,").split()
        assert load_clip_tokenizer(folder / "tokenizer").tokenize(sentence) == [f"{word}</w>" for word in words]
        t5 = load_t5_tokenizer(folder / "tokenizer_2").tokenize(sentence)
        assert t5 == [word if word == "," else f"▁{word}" for word in words]
    assert load_clip_tokenizer(folder / "tokenizer").tokenize("apple") == ["apple</w>"]


def test_unknown_words_are_spelled_and_case_is_folded(small):
    folder, _ = small
    clip, t5 = load_clip_tokenizer(folder / "tokenizer"), load_t5_tokenizer(folder / "tokenizer_2")
    assert clip.decode(clip.encode("Zebra, é!"), skip_special_tokens=True).replace(" ", "") == "zebra,é!"
    assert t5.decode(t5.encode("Make it a Zebra!"), skip_special_tokens=True) == "make it a zebra!"
    assert t5.unk_token_id not in t5.encode("Make it a Zebra!")


def test_id_layout(small):
    folder, (clip_size, t5_size) = small
    clip, t5 = load_clip_tokenizer(folder / "tokenizer"), load_t5_tokenizer(folder / "tokenizer_2")
    assert clip.eos_token_id == clip_size - 1 == len(clip) - 1
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id, len(t5)) == (0, 1, 2, t5_size)
    assert tokenize_clip(SENTENCES[:1], folder / "tokenizer").shape == (1, 77)
    ids = tokenize_t5(["flip it", " ".join(["flip"] * 40)], folder / "tokenizer_2", 16)
    assert ids.shape == (2, 16) and ids.dtype == np.int32
    assert list(ids[0, 2:]) == [1] + [0] * 13 and ids[1, -1] == 1


def test_slow_and_fast_t5_agree(small):
    from transformers import T5Tokenizer

    folder, _ = small
    slow = T5Tokenizer(str(folder / "tokenizer_2" / "spiece.model"), extra_ids=0, legacy=False)
    for text in [*SENTENCES, "Put it  upside down, please."]:
        assert slow.encode(text) == load_t5_tokenizer(folder / "tokenizer_2").encode(text)


def test_missing_files_and_words_are_named(tmp_path):
    with pytest.raises(UserError, match="vocab.json"):
        load_clip_tokenizer(tmp_path)
    with pytest.raises(UserError, match="spiece.model"):
        load_t5_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no words"):
        train_small_tokenizers([], [], tmp_path, t5_tokens=16)
