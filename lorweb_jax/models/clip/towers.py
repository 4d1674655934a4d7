"""CLIP's two towers (Radford et al., arXiv 2103.00020): text, and vision with its projection.

Both are the same stack of pre-norm blocks; text attends to what came before alone and is pooled at its end token,
vision is pooled at its class token. Letters: b batch, s tokens, d width, p projected width. Paths are transformers'
names without the layer index, which is a leading axis; TEXT_TABLE and VISION_TABLE are the conversion.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.common.schema import Between, Blocks, Epsilon, Heads, Pixels, Width, Words
from lorweb_jax.files.table import CONV, LINEAR, Row
from lorweb_jax.models.encoder_block import Block, block_rows, require_heads, rows
from lorweb_jax.nn.layers import Embedding, LayerNorm, Linear, Weight, scan_stack, stack_outputs, stacked

Activation = Literal["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

_Id = Annotated[int, Between(0, 2_000_000)]


@dataclass(frozen=True)
class _Config:
    architecture: ClassVar[str]
    model_type: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """What transformers' CLIPTextModel or CLIPVisionModelWithProjection reads from config.json."""
        return asdict(self) | {"architectures": [self.architecture], "model_type": self.model_type}


@dataclass(frozen=True)
class CLIPTextConfig(_Config):
    """Sizes, named as in config.json; the defaults, which published files may leave out, are transformers'.

    Raises UserError for heads that don't divide the width."""

    vocab_size: Words = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width = 512
    num_hidden_layers: Blocks = 12
    num_attention_heads: Heads = 8
    max_position_embeddings: Width = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    pad_token_id: _Id | None = 1
    bos_token_id: _Id | None = 49406
    eos_token_id: _Id = 49407

    architecture: ClassVar[str] = "CLIPTextModel"
    model_type: ClassVar[str] = "clip_text_model"

    def __post_init__(self):
        require_heads(self, "a CLIP tower")


@dataclass(frozen=True)
class CLIPVisionConfig(_Config):
    """Sizes, named as in config.json; the defaults, which published files may leave out, are transformers'.

    Raises UserError for heads that don't divide the width."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    projection_dim: Width = 512
    num_hidden_layers: Blocks = 12
    num_attention_heads: Heads = 12
    num_channels: Annotated[int, Between(3, 3)] = 3
    image_size: Pixels = 224
    patch_size: Pixels = 32
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    architecture: ClassVar[str] = "CLIPVisionModelWithProjection"
    model_type: ClassVar[str] = "clip_vision_model"

    def __post_init__(self):
        require_heads(self, "a CLIP tower")


def _blocks(config: CLIPTextConfig | CLIPVisionConfig, causal: bool, rngs: nnx.Rngs) -> Block:
    return stacked(
        lambda rngs: Block(config, ACTIVATIONS[config.hidden_act], causal, rngs=rngs), config.num_hidden_layers, rngs
    )


class ClipText(nnx.Module):
    """CLIP's text tower (transformers' CLIPTextModel): token ids -> the end token's embedding."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, rngs=rngs)
        self.layers = _blocks(config, causal=True, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [b, t] -> pooled float32 [b, d]: the last layer's normalised output at the end token."""
        ids = jnp.asarray(ids, jnp.int32)
        # An embedding has the dtype it is stored in; all is computed in float32.
        positions = self.position_embedding.embedding[...].astype(jnp.float32)[: ids.shape[1]]
        x = self.token_embedding(ids).astype(jnp.float32) + positions
        x = scan_stack(self.layers, lambda block, x, _: block(x), x)
        # 2 is what OpenAI's configs say, whose end token is another: the largest id.
        end = (ids if self.config.eos_token_id == 2 else jnp.equal(ids, self.config.eos_token_id)).argmax(-1)
        return self.final_layer_norm(jnp.take_along_axis(x, end[:, None, None], 1)[:, 0])


class ClipVision(nnx.Module):
    """CLIP's vision tower with its projection (transformers' CLIPVisionModelWithProjection)."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = Weight(0.02 * jax.random.normal(rngs.params(), (width,), jnp.float32))
        self.patch_embedding = Patches(config.num_channels, width, patch, rngs=rngs)
        self.position_embedding = Embedding((config.image_size // patch) ** 2 + 1, width, rngs=rngs)
        self.pre_layernorm = LayerNorm(width, eps=config.layer_norm_eps, rngs=rngs)
        self.layers = _blocks(config, causal=False, rngs=rngs)
        self.post_layernorm = LayerNorm(width, eps=config.layer_norm_eps, rngs=rngs)
        self.visual_projection = Linear(width, config.projection_dim, bias=False, role="any", rngs=rngs)

    @property
    def embedding_width(self) -> int:
        return self.config.projection_dim

    @property
    def patch_width(self) -> int:
        return self.config.hidden_size

    def _embedded(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (len(patches), 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], 1) + self.position_embedding.embedding[...].astype(patches.dtype)
        return self.pre_layernorm(x)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixel values [b, h, w, 3] from the folder's ImageProcessor -> projected embedding [b, p]."""
        x = scan_stack(self.layers, lambda block, x, _: block(x), self._embedded(pixels))
        return self.visual_projection(self.post_layernorm(x[:, 0]))

    def hidden_states(self, pixels: jax.Array) -> tuple[jax.Array, ...]:
        """pixel values [b, h, w, 3] -> the embeddings and each layer's output, [b, s, d] with CLS, not normalised."""
        return stack_outputs(self.layers, self._embedded(pixels))


class Patches(nnx.Module):
    """Squares of `size` pixels, each projected to d: a convolution with stride `size`, kernel [size, size, c, d]."""

    def __init__(self, channels: int, width: int, size: int, *, rngs: nnx.Rngs):
        self.size = size
        self.kernel = Weight(
            jax.nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)(
                rngs.params(), (size, size, channels, width), jnp.float32
            ),
            axes=("inputs", "outputs"),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, s, d] in raster order; what is left over at the right and below is cut off."""
        b, h, w, c = x.shape
        rows, columns, n = h // self.size, w // self.size, self.size
        x = x[:, : rows * n, : columns * n].reshape(b, rows, n, columns, n, c).swapaxes(2, 3)
        return x.reshape(b, rows * columns, -1) @ self.kernel[...].astype(x.dtype).reshape(n * n * c, -1)


# The conversions (lorweb_jax.files.table). "pre_layrnorm" is how the published checkpoints spell it.
TEXT_TABLE = [
    Row("token_embedding.embedding", "text_model.embeddings.token_embedding.weight"),
    *block_rows("text_model"),
    *rows("final_layer_norm", "text_model.final_layer_norm"),
]
VISION_TABLE = [
    Row("class_embedding", "vision_model.embeddings.class_embedding"),
    Row("patch_embedding.kernel", "vision_model.embeddings.patch_embedding.weight", CONV),
    *block_rows("vision_model"),
    *rows("pre_layernorm", "vision_model.pre_layrnorm"),
    *rows("post_layernorm", "vision_model.post_layernorm"),
    Row("visual_projection.kernel", "visual_projection.weight", LINEAR),
]
