"""T5 encoder (Raffel et al., arXiv 1910.10683; v1.1's gated GELU too), the sequence text encoder of FLUX.

Letters: b batch, t text tokens, d model width, h heads, l blocks. Parameter paths are transformers' T5EncoderModel
names with the block index as a leading axis; TABLE converts in both directions (lorweb_jax.files.table).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, Blocks, Epsilon, Heads, Width, Words, as_dataclass, checked, read_json
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.state import build, shapes
from lorweb_jax.files.table import LINEAR, Row, Stored
from lorweb_jax.nn.layers import Embedding, Linear, RMSNorm, scan_stack, stacked


@dataclass(frozen=True)
class T5Config:
    """Sizes, named as in the folder's config.json."""

    vocab_size: Words
    d_model: Width
    d_kv: Width
    d_ff: Width
    num_layers: Blocks
    num_heads: Heads
    feed_forward_proj: Literal["gated-gelu", "relu"] = "gated-gelu"
    relative_attention_num_buckets: Annotated[int, Between(4, 4096)] = 32
    relative_attention_max_distance: Annotated[int, Between(2, 1_000_000)] = 128
    layer_norm_epsilon: Epsilon = 1e-6

    def __post_init__(self):
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise UserError(
                f"the T5 config has {self.relative_attention_num_buckets} relative_attention_num_buckets and "
                f"relative_attention_max_distance {self.relative_attention_max_distance}, which must be "
                "more than a quarter of them; download it again"
            )

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj == "gated-gelu"

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path = "the T5 config") -> "T5Config":
        """From the contents of a config.json, called `source` in messages; what is left out is as transformers has it,
        and fields that only concern the decoder or training are passed over.

        Raises UserError for a missing field, a wrong type or size, or another kind of model.
        """
        found = checked(data, _T5File, source)
        for name, stated, expected in (
            ("is_gated_act", found.is_gated_act, found.gated),
            ("dense_act_fn", found.dense_act_fn, "gelu_new" if found.gated else "relu"),
        ):
            if stated not in (None, expected):
                raise UserError(
                    f"{source}: {name} is {stated}, but feed_forward_proj is {found.feed_forward_proj}; use "
                    "a T5 or T5 v1.1 text encoder"
                )
        return as_dataclass(found, cls)

    def to_json(self) -> dict[str, Any]:
        """The config.json that transformers' T5EncoderModel reads."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "is_encoder_decoder": False,
            "use_cache": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "is_gated_act": self.gated,
            "dense_act_fn": "gelu_new" if self.gated else "relu",
            "tie_word_embeddings": False,
            **{f.name: getattr(self, f.name) for f in fields(self)},
        }


@dataclass(frozen=True)
class _T5File(T5Config):
    """config.json."""

    feed_forward_proj: Literal["gated-gelu", "relu"] = "relu"
    model_type: Literal["t5"] = "t5"
    is_gated_act: bool | None = None
    dense_act_fn: str | None = None


def relative_position_buckets(tokens: int, buckets: int, max_distance: int) -> np.ndarray:
    """int32 [t, t]: the bucket of key position − query position, exact when near and logarithmic when far."""
    offset = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # float32, as published: float64 puts a few distances on the other side of a bucket's border.
    log_ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (log_ratio * (half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)).astype(np.int32)


class SelfAttention(nnx.Module):
    """Multi-head attention without biases and without the 1/√d_kv scale (T5 folds it into the initialisation)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        query_init = jax.nn.initializers.normal((config.d_model * config.d_kv) ** -0.5)
        self.q = Linear(config.d_model, inner, bias=False, init=query_init, role="any", rngs=rngs)
        self.k = Linear(config.d_model, inner, bias=False, role="any", rngs=rngs)
        self.v = Linear(config.d_model, inner, bias=False, role="any", rngs=rngs)
        self.o = Linear(inner, config.d_model, bias=False, role="any", rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x [b, t, d], bias [1 or b, h, t, t] float32 -> [b, t, d]."""
        b, t, _ = x.shape
        q, k, v = (layer(x).reshape(b, t, self.num_heads, -1) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bthe,bshe->bhts", q, k).astype(jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return self.o(jnp.einsum("bhts,bshe->bthe", weights, v).reshape(b, t, -1))


class FeedForward(nnx.Module):
    """wo(gelu(wi_0 x) · wi_1 x) if gated, wo(relu(wi x)) if not."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.gated = config.gated
        if self.gated:
            self.wi_0 = Linear(config.d_model, config.d_ff, bias=False, role="any", rngs=rngs)
            self.wi_1 = Linear(config.d_model, config.d_ff, bias=False, role="any", rngs=rngs)
        else:
            self.wi = Linear(config.d_model, config.d_ff, bias=False, role="any", rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, bias=False, role="any", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.gated:
            return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))
        return self.wo(jax.nn.relu(self.wi(x)))


class Block(nnx.Module):
    """x + attention(norm x), then x + feed forward(norm x)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, rngs=rngs)
        self.SelfAttention = SelfAttention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, rngs=rngs)
        self.DenseReluDense = FeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = x + self.SelfAttention(self.attention_norm(x), bias)
        return x + self.DenseReluDense(self.feed_forward_norm(x))


class T5Encoder(nnx.Module):
    """Token ids -> a sequence of embeddings. FLUX gives no mask: padding is attended to."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        self.relative_attention_bias = Embedding(config.relative_attention_num_buckets, config.num_heads, rngs=rngs)
        self.block = stacked(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, rngs=rngs)

    def __call__(
        self, ids: jax.Array, mask: jax.Array | None = None, *, dtype=jnp.float32, remat: str = "none"
    ) -> jax.Array:
        """ids int [b, t]; mask [b, t], true where a token may be attended to (None: everywhere)
        -> embeddings [b, t, d] in `dtype`, the dtype computed in. `remat` as in layers.scan_stack."""
        config = self.config
        buckets = relative_position_buckets(
            ids.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        bias = self.relative_attention_bias(jnp.asarray(buckets)).astype(jnp.float32).transpose(2, 0, 1)[None]
        if mask is not None:
            bias = bias + jnp.where(mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        x = self.shared(ids).astype(dtype)
        x = scan_stack(self.block, lambda block, x, _: block(x, bias), x, remat=remat)
        return self.final_layer_norm(x)


_BLOCK = "encoder.block.{l}.layer."
# The conversion (lorweb_jax.files.table): our path, transformers' key, axes of their array in our order.
TABLE = [
    Row("shared.embedding", "shared.weight"),
    Row("relative_attention_bias.embedding", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    *[Row(f"block.SelfAttention.{name}.kernel", f"{_BLOCK}0.SelfAttention.{name}.weight", LINEAR) for name in "qkvo"],
    Row("block.attention_norm.scale", f"{_BLOCK}0.layer_norm.weight"),
    *[
        Row(f"block.DenseReluDense.{name}.kernel", f"{_BLOCK}1.DenseReluDense.{name}.weight", LINEAR)
        for name in ("wi", "wi_0", "wi_1", "wo")
    ],
    Row("block.feed_forward_norm.scale", f"{_BLOCK}1.layer_norm.weight"),
    Row("final_layer_norm.scale", "encoder.final_layer_norm.weight"),
]
# A second copy of shared.weight, which some files hold.
IGNORED = ("encoder.embed_tokens.weight",)


def open_t5(folder: str | Path) -> tuple[T5Config, Stored]:
    """(config, weights that are not yet read) of a text_encoder_2 folder, single or sharded safetensors.

    Raises UserError if config and weights don't fit.
    """
    path = Path(folder) / "config.json"
    config = T5Config.from_json(read_json(path), path)
    return config, Stored(Checkpoint(folder), TABLE, shapes(lambda: T5Encoder(config, rngs=nnx.Rngs(0))), IGNORED)


def load_t5(folder: str | Path, dtype: Any = None) -> T5Encoder:
    """The encoder of a text_encoder_2 folder, in the file's dtype or in `dtype`."""
    config, stored = open_t5(folder)
    return build(lambda: T5Encoder(config, rngs=nnx.Rngs(0)), stored.load(dtype), str(folder))
