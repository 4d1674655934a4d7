"""The record of a backbone: the one place that lists its linear layers, and what is its own beside them.

Sharding, adapters, weight tables, planning and the benchmark read it; the model's blocks take their layers' widths,
biases and roles from it (`Backbone.maker`).

Letters: l blocks of a stack, i/o a layer's input and output width, s image tokens, t text tokens, j the text's width,
p the pooled text's, c a token's channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
from flax import nnx

from lorweb_jax.files.table import LINEAR, Row
from lorweb_jax.nn import layers as nn_layers

# (name, **options of nn.layers.Linear) -> the layer of a model or block that has this name.
MakeLinear = Callable[..., nn_layers.Linear]

# Which tokens pass through a layer: those of images, of the text, both joined, or one vector an example.
Stream = Literal["image", "text", "joint", "vector"]
# embedder: its input comes from outside the model. column: its outputs are attention heads or hidden features; row:
# its inputs are. modulation: its outputs are shifts, scales and gates of blocks. vector: another layer of the
# conditioning vector. output: the last.
Role = Literal["embedder", "column", "row", "modulation", "vector", "output"]


class Name(NamedTuple):
    """A layer in a layout of files: `key`, "{l}" for the block's index. Layers of one key are fused there, outputs one
    after another in the order of `part`. swapped: the two halves of the outputs lie the other way round."""

    key: str
    part: int = 0
    swapped: bool = False


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer, or as many equal ones as its stack has blocks.

    path: in the model, dotted. stack: the path of the stack of blocks that it is part of, "" outside. depth: l; 1
    outside the stacks, where its kernel has no leading axis (an adapter's arrays have it there too). names: by layout.
    Raises ValueError for a role or stream that isn't one of the above.
    """

    path: str
    stack: str
    depth: int
    inputs: int
    outputs: int
    stream: Stream
    role: Role
    adapted: bool
    bias: bool = True
    names: Mapping[str, Name] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        for name, known in (("role", get_args(Role)), ("stream", get_args(Stream))):
            if getattr(self, name) not in known:
                raise ValueError(f"{self.path} has the {name} {getattr(self, name)!r}; give one of {', '.join(known)}")

    @property
    def modulation(self) -> bool:
        return self.role == "modulation"

    @property
    def scanned(self) -> bool:
        """Whether blocks run it one after another; modulations are computed for all blocks beforehand."""
        return bool(self.stack) and not self.modulation

    @property
    def weights(self) -> int:
        """Entries of all its kernels."""
        return self.depth * self.inputs * self.outputs

    def rows(self, tokens: int, text: int) -> int:
        """How many vectors of an example it is applied to, for so many image and text tokens."""
        return {"image": tokens, "text": text, "joint": tokens + text, "vector": 1}[self.stream]


class Latents(NamedTuple):
    """How images become tokens, given the pipeline's autoencoder.

    encode: (autoencoder, images float [b, H, W, 3] in −1..1) -> latents float32 [b, h, w, c], the posterior's mode
    posterior: the same images -> (mean, standard deviation) of their latents, each float32 [b, h, w, c]
    decode: (autoencoder, latents) -> images in −1..1
    pack: latents -> tokens [b, h·w/patch², patch²·c]; a token is patch x patch latents
    unpack: (tokens, h, w) -> latents
    """

    encode: Callable[[Any, jax.Array], jax.Array]
    posterior: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    decode: Callable[[Any, jax.Array], jax.Array]
    pack: Callable[[jax.Array], jax.Array]
    unpack: Callable[[jax.Array, int, int], jax.Array]
    patch: int


class References(NamedTuple):
    """How an analogy is shown to the backbone.

    images: (a, a2, b, max_size) -> the reference images, uint8 [H, W, 3] each; the result has the last one's size
    result: the image that was drawn -> b′
    """

    images: Callable[..., list[Any]]
    result: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone of certain sizes.

    features: the width d of its tokens. heads: of attention, in every block. stacks: (path, l) of each stack, in the
    order in which tokens pass them. other_rows: (layout of files) -> rows of the parameters that belong to no linear
    layer, such as norms' scales.
    position_ids: (height, width, image) -> ids [s, axes] of the tokens of an image of height x width latents; image 0
    is the one that is drawn, 1, 2 … are references. text_ids: (t) -> ids [t, axes].
    text: (text encoders, their token ids [b, …], dtype) -> (text [b, t, j], pooled text [b, p] or None).
    schedule: the class of its noise schedule, which reads scheduler_config.json (`from_json`).
    """

    features: int
    heads: int
    stacks: tuple[tuple[str, int], ...]
    layers: tuple[Linear, ...]
    other_rows: Callable[[str], list[Row]]
    position_ids: Callable[[int, int, int], jax.Array]
    text_ids: Callable[[int], jax.Array]
    text: Callable[..., tuple[jax.Array, jax.Array | None]]
    latents: Latents
    references: References
    schedule: type

    @functools.cached_property
    def linears(self) -> dict[str, Linear]:
        """Every linear layer by its path."""
        return {layer.path: layer for layer in self.layers}

    @functools.cached_property
    def adapted(self) -> dict[str, Linear]:
        """Those that adapters may change, by path."""
        return {path: layer for path, layer in self.linears.items() if layer.adapted}

    @functools.cached_property
    def scanned(self) -> dict[str, Linear]:
        """Those that blocks run one after another (`Linear.scanned`), by path."""
        return {path: layer for path, layer in self.linears.items() if layer.scanned}

    @property
    def blocks(self) -> int:
        """Of all stacks together; each has one attention over all tokens."""
        return sum(depth for _, depth in self.stacks)

    def modulations(self, stack: str) -> tuple[str, ...]:
        """Paths within a stack of its modulations."""
        return tuple(
            path.removeprefix(f"{stack}.")
            for path, layer in self.linears.items()
            if layer.stack == stack and layer.modulation
        )

    def table(self, layout: str) -> list[Row]:
        """The weight table of a layout: a Row for each kernel and bias, then `other_rows`."""
        rows = []
        for layer in sorted(self.layers, key=lambda layer: layer.names[layout].part):
            name = layer.names[layout]
            rows.append(Row(f"{layer.path}.kernel", f"{name.key}.weight", LINEAR, name.swapped))
            if layer.bias:
                rows.append(Row(f"{layer.path}.bias", f"{name.key}.bias", None, name.swapped))
        return rows + self.other_rows(layout)

    def maker(self, stack: str = "", *, quantization: str = "none", rngs: nnx.Rngs) -> MakeLinear:
        """What makes a fresh layer as the record says, by its path within `stack`; KeyError for one that it lacks."""

        def make(name: str, **options) -> nn_layers.Linear:
            layer = self.linears[f"{stack}.{name}" if stack else name]
            return nn_layers.Linear(
                layer.inputs,
                layer.outputs,
                bias=layer.bias,
                role=layer.role,
                quantization=quantization,
                rngs=rngs,
                **options,
            )

        return make
