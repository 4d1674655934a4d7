"""The T5 encoder against transformers' T5EncoderModel (torch, float32) and the golden prompt embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import golden_dir

from lorweb_jax.common.errors import UserError
from lorweb_jax.files import safetensors_io
from lorweb_jax.files.state import flat_state
from lorweb_jax.files.table import tensors_of
from lorweb_jax.models.t5.model import TABLE, T5Config, T5Encoder, load_t5, relative_position_buckets

TOLERANCE = 1e-5
FOLDER = golden_dir() / "tiny_pipeline" / "text_encoder_2"


def relative(ours, theirs) -> float:
    """Largest absolute error over the largest absolute value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def test_equals_golden_prompt_embeds():
    with np.load(golden_dir() / "e2e_square.npz") as golden:
        ids, expected = golden["t5_input_ids"][None].astype(np.int32), golden["prompt_embeds"]
    assert relative(jax.jit(lambda model, ids: model(ids))(load_t5(FOLDER), ids), expected) <= TOLERANCE


@pytest.mark.parametrize("feed_forward_proj", ["gated-gelu", "relu"])
def test_equals_transformers_with_and_without_mask(tmp_path, feed_forward_proj):
    torch = pytest.importorskip("torch")
    from transformers import T5Config as TheirConfig
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    theirs = T5EncoderModel(
        TheirConfig(
            vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=4, feed_forward_proj=feed_forward_proj
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")  # sharded, as FLUX's is
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_t5(tmp_path)
    ids = np.random.default_rng(0).integers(0, 50, (2, 40)).astype(np.int32)
    mask = (np.arange(40) < np.array([[7], [31]])).astype(np.int32)
    with torch.no_grad():
        plain = theirs(torch.tensor(ids)).last_hidden_state.numpy()
        masked = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    assert relative(ours(ids), plain) <= TOLERANCE
    assert relative(ours(ids, mask), masked) <= TOLERANCE


def test_what_it_writes_transformers_reads(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import T5EncoderModel

    config = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    ours = T5Encoder(config, rngs=nnx.Rngs(3))
    safetensors_io.write_json(tmp_path / "config.json", config.to_json())
    safetensors_io.write_sharded(tmp_path, "model", *tensors_of(flat_state(ours), TABLE))
    ids = np.arange(12, dtype=np.int32)[None]
    with torch.no_grad():
        theirs = T5EncoderModel.from_pretrained(tmp_path)(torch.tensor(ids)).last_hidden_state.numpy()
    assert relative(ours(ids), theirs) <= TOLERANCE


def test_buckets_equal_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    for tokens, buckets, distance in [(512, 32, 128), (300, 16, 64), (1, 32, 128)]:
        offsets = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
        expected = T5Attention._relative_position_bucket(offsets, True, buckets, distance).numpy()
        np.testing.assert_array_equal(relative_position_buckets(tokens, buckets, distance), expected)


def test_gradient_reaches_every_weight_and_remat_keeps_it():
    model = load_t5(FOLDER)
    graphdef, state = nnx.split(model)
    ids = np.arange(1, 9, dtype=np.int32)[None]

    def loss(state, remat):
        return jnp.square(nnx.merge(graphdef, state)(ids, remat=remat)).sum()

    plain, again = (jax.grad(loss)(state, remat) for remat in ("none", "full"))
    for ours, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again)):
        assert np.abs(ours).max() > 0
        assert relative(other, np.asarray(ours)) <= TOLERANCE


def test_other_feed_forwards_are_refused():
    with pytest.raises(UserError, match="gated-silu"):
        T5Config.from_json(
            {
                "vocab_size": 5,
                "d_model": 4,
                "d_kv": 2,
                "d_ff": 8,
                "num_layers": 1,
                "num_heads": 2,
                "feed_forward_proj": "gated-silu",
            }
        )
    with pytest.raises(UserError, match="vocab_size"):
        T5Config.from_json({"model_type": "clip"})
