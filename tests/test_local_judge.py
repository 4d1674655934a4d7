"""A judge by transformers, here: a tiny LLaVA whose weights are set by hand, so that what it says is known."""

from pathlib import Path

import pytest
import torch
from test_judge import records, sample  # noqa: F401  the fixture
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lorweb_jax import evaluate as command
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import read_json
from lorweb_jax.evaluation.judge import ask_all, choice_question, score_question
from lorweb_jax.evaluation.scores import judge_from_file

TOOL = Path(__file__).parents[1] / "tools" / "transformers_judge.py"
SCORES, CHOICE = '{"accuracy": 7, "consistency": 4}', '{"choice": 2}'
# The prompt ends with the question's last word, by which the model knows what is asked.
TEMPLATE = (
    "{% for part in messages[0].content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{{ messages[0].content[0].text.split()[-1] }}"
)


def write_model(folder: Path, answers: dict[str, str]) -> str:
    """A model that says answers[last word of the prompt] and ends: the last token alone decides the next."""
    words = ["[UNK]", "<s>", "</s>", "<image>", *answers, *dict.fromkeys(answers.values())]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,  # the class token
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **sizes),
            text_config=LlamaConfig(vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes),
            image_token_index=3,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )
    following = dict.fromkeys(answers.values(), "</s>") | answers
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
                weight.zero_()
        network.get_input_embeddings().weight.copy_(torch.eye(len(words), 32))
        head = torch.zeros(len(words), 32)
        for word, after in following.items():
            head[words.index(after), words.index(word)] = 100
        network.lm_head.weight.copy_(head)
    network.save_pretrained(folder)
    return f"{TOOL}:local={folder}"


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("judge"), {"1-10}": SCORES, "2}": CHOICE})


def questions(judge):
    one = sample()
    results = {"x": one.b, "y": 255 - one.b}
    return [score_question(judge, "x", "k", one, one.b), choice_question(judge, ("x", "y"), "k", one, results)]


def test_answers_are_the_models_and_kept(spec, tmp_path, monkeypatch):
    judge = judge_from_file(spec)
    answers = ask_all(judge, questions(judge), tmp_path)
    assert not answers.unanswered
    assert sorted(answers.answered.values(), key=str) == [2, {"accuracy": 7, "consistency": 4}]
    monkeypatch.setattr(type(judge), "ask", None)  # what lies there isn't asked again
    assert ask_all(judge, questions(judge), tmp_path) == answers


def test_nonsense_is_no_answer(tmp_path):
    judge = judge_from_file(write_model(tmp_path / "model", {"1-10}": "seven", "2}": CHOICE}))
    answers = ask_all(judge, questions(judge), tmp_path / "kept")
    assert list(answers.answered.values()) == [2]
    assert all("malformed answer" in reason for reason in answers.unanswered.values()) and len(answers.unanswered) == 1


def test_the_command(spec, records):  # noqa: F811
    command.main(["--out", str(records.folder), "--judge", spec])
    judged = read_json(records.folder / "results.json")["judge"]
    assert judged["scores"] and all(of["accuracy"]["mean"] == 7 for of in judged["scores"].values())
    assert all(of["unanswered"] == 0 for of in judged["scores"].values())


def test_what_is_no_judge(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        judge_from_file(f"{TOOL}:local={tmp_path / 'none'}")
    with pytest.raises(UserError, match="holds no model"):
        judge_from_file(f"{TOOL}:local={tmp_path}")
    (tmp_path / "own.py").write_text("def mine():\n    return 3\n")
    with pytest.raises(UserError, match="returned a int; expected"):
        judge_from_file(f"{tmp_path / 'own.py'}:mine")
