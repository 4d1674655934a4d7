"""Layers shared by every model here, and how equal blocks are stacked and scanned.

Parameters may be stored in one dtype and used in another: a layer computes in the dtype of its input,
except normalisation statistics, which are always float32.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lorweb_jax.nn import sharding
from lorweb_jax.nn.attention import SAVED
from lorweb_jax.nn.offload import any_offloaded, on_device
from lorweb_jax.nn.quantization import as_multiplied, product, quantize

M = TypeVar("M", bound=nnx.Module)
# A linear layer's input [.., i]: one array, or several whose features stand side by side (`sum_of_products`).
Input = jax.Array | tuple[jax.Array, ...]


class Adapter:
    """What a linear layer may be given on top of its product: a low-rank update, in two halves, so that layers of one
    input can share the product of the first. It is a pytree.

    `text_tokens` says how many of x's leading tokens are text tokens that precede image tokens (0 where the stream
    holds one kind).
    """

    def inner(self, dtype: jnp.dtype) -> jax.Array:
        """The first factor [i, k]."""
        raise NotImplementedError

    def outer(self, h: jax.Array, x: Input, text_tokens: int) -> jax.Array:
        """The update [.., o] for a layer's input x [.., i] and h [.., k], its product with the first factor."""
        raise NotImplementedError

    def __call__(self, x: Input, text_tokens: int = 0) -> jax.Array:
        """x [b, s, i] -> [b, s, o], or [b, i] -> [b, o]; in the dtype of x."""
        return updates(x, [self], text_tokens)[0]


# What the backward pass of a block may keep has one of these names (jax.ad_checkpoint.checkpoint_name), beside what
# attention is (attention.SAVED): the products that end a block's branches, which are added to the block's input times a
# gate, whose gradient asks for them (recomputing them alone recomputes all of the block); what low-rank additions are
# inside, n·r numbers a token; q, k and v as their layers make them, before norms and rope; the MLP before its
# activation. What follows from these is elementwise.
OUTPUTS, INNER, QKV, HIDDEN = "outputs", "inner", "qkv", "hidden"


class Weight(nnx.Variable):
    """A weight of a pretrained model: frozen, unless a training job names this type as its trainables."""


class Kept(Weight):
    """A weight that is kept in the dtype it was made in, whatever weights are stored in."""


class Scale(Kept):
    """What a quantised kernel is multiplied by."""


# Logical axes (sharding.py) of weights that any axis of which may be split: convolutions, tables of embeddings.
_ANY = ("inputs", "outputs")

_lecun = jax.nn.initializers.lecun_normal()


class Linear(nnx.Module):
    """y = x W (+ bias) (+ adapter(x)); kernel [i, o], bias [o].

    role: of sharding.ROLES, how the layer is split over devices. quantization: one of quantization.KINDS; the kernel
    holds 8-bit codes, and scale [1, o], in fp8 [1, 1], what multiplies them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        role: str,
        bias: bool = True,
        init=_lecun,
        quantization: str = "none",
        rngs: nnx.Rngs,
    ):
        kernel, scale = init(rngs.params(), (in_features, out_features), jnp.float32), None
        if quantization != "none":
            kernel, scale = quantize(kernel, quantization)
        kernel_axes, bias_axes = sharding.linear_axes(role)
        self.kernel = Weight(kernel, axes=kernel_axes)
        self.scale = None if scale is None else Scale(scale, axes=kernel_axes)
        self.bias = Weight(jnp.zeros((out_features,), jnp.float32), axes=bias_axes) if bias else None

    def __call__(self, x: Input, adapter: Adapter | None = None, text_tokens: int = 0) -> jax.Array:
        """x [b, s, i] or [b, i] -> [b, s, o] or [b, o]."""
        return outputs(x, [(self, adapter)], text_tokens)[0]

    def plain(self, x: Input) -> jax.Array:
        """Without an adapter."""
        if self.scale is None:
            y = sum_of_products(x, self.kernel[...], lambda part, rows: part @ rows.astype(part.dtype))
        else:
            scale = self.scale[...]
            y = sum_of_products(x, self.kernel[...], lambda part, codes: product(part, codes, scale))
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y


def outputs(x: Input, layers: Sequence[tuple[Linear, Adapter | None]], text_tokens: int = 0) -> list[jax.Array]:
    """What linear layers, each with its adapter, make of one input."""
    update = iter(updates(x, [adapter for _, adapter in layers if adapter is not None], text_tokens))
    return [layer.plain(x) if adapter is None else layer.plain(x) + next(update) for layer, adapter in layers]


def updates(x: Input, adapters: Sequence[Adapter], text_tokens: int) -> list[jax.Array]:
    """What adapters make of one input. Their first products are one, and so is their part of x's gradient: each alone
    is a few columns wide, and as slow as reading or writing x."""
    if not adapters:
        return []
    factors = [adapter.inner(parts(x)[0].dtype) for adapter in adapters]
    h = sum_of_products(x, jnp.concatenate(factors, axis=1), operator.matmul)
    ends = list(itertools.accumulate(factor.shape[1] for factor in factors))
    split = jnp.split(checkpoint_name(h, INNER), ends[:-1], axis=-1)
    return [adapter.outer(own, x, text_tokens) for adapter, own in zip(adapters, split)]


def parts(x: Input) -> tuple[jax.Array, ...]:
    """The arrays that a linear layer's input consists of."""
    return x if isinstance(x, tuple) else (x,)


def sum_of_products(x: Input, kernel: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Σ product(part, rows) over the parts of x; `rows` is what the part meets of the kernel [i, o].

    Accelerators are spared an array of the joined parts. CPUs join them, as one large product with its gradients takes
    them less than two; and so does fp8, as parts are joined where they are rounded, and cuBLASLt's products of fp8 are
    not recognised for slices of a kernel."""
    if not isinstance(x, tuple):
        return product(x, kernel)
    if sharding.device_in_use().platform == "cpu" or kernel.dtype == jnp.float8_e4m3fn:
        return product(jnp.concatenate(x, axis=-1), kernel)
    ends = list(itertools.accumulate(part.shape[-1] for part in x))
    return functools.reduce(operator.add, map(product, x, jnp.split(kernel, ends[:-1])))


class Conv(nnx.Module):
    """2-D convolution on NHWC; kernel [kh, kw, i, o]. `padding` is explicit: ((top, bottom), (left, right)).

    With `by_products` set it is one product of all kh·kw shifted copies, side by side, with the kernel: the same sums
    in more memory. Without autotuning, GPUs are absurdly slow at convolutions of few channels.
    """

    def __init__(
        self, in_features: int, out_features: int, size: int = 3, *, stride: int = 1, padding=None, rngs: nnx.Rngs
    ):
        self.by_products = False
        self.stride = stride
        self.padding = padding if padding is not None else ((size // 2, size // 2),) * 2
        self.kernel = Weight(
            jax.nn.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)(
                rngs.params(), (size, size, in_features, out_features), jnp.float32
            ),
            axes=_ANY,
        )
        self.bias = Weight(jnp.zeros((out_features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        # Small and used once: every device takes the whole kernel to its share of the images. Left to themselves,
        # partitioners pass pieces of images around.
        kernel = sharding.constrain(self.kernel[...], None, None, None, None).astype(x.dtype)
        if self.by_products:
            height, width, _, features = kernel.shape
            product = self._shifted(x, height, width) @ kernel.reshape(-1, features)
            return product + self.bias[...].astype(x.dtype)
        y = jax.lax.conv_general_dilated(
            sharding.constrain(x, "batch", None, None, None),
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype)

    def _shifted(self, x: jax.Array, kernel_height: int, kernel_width: int) -> jax.Array:
        """[b, h', w', kh·kw·i]: what each output pixel sees, in the order of the kernel's rows."""
        padded = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
        high, wide = padded.shape[1] - kernel_height + 1, padded.shape[2] - kernel_width + 1
        return jnp.concatenate(
            [
                padded[:, i : i + high : self.stride, j : j + wide : self.stride]
                for i in range(kernel_height)
                for j in range(kernel_width)
            ],
            axis=-1,
        )


class Embedding(nnx.Module):
    """Rows of a table by integer id; embedding [v, d]."""

    def __init__(self, count: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = Weight(0.02 * jax.random.normal(rngs.params(), (count, features), jnp.float32), axes=_ANY)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """(x − mean) / √(var + eps) over the last axis, without scale; statistics in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias [d]."""

    def __init__(self, features: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = Weight(jnp.ones((features,), jnp.float32))
        self.bias = Weight(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.eps) * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / √(mean x² + eps) · scale over the last axis; statistics in float32."""

    def __init__(self, features: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = Weight(jnp.ones((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(x.dtype)


def stacked(make: Callable[[nnx.Rngs], M], depth: int, rngs: nnx.Rngs) -> M:
    """`depth` blocks made by `make`, as one block whose parameters have a leading axis l = depth."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def build(rngs):
        return make(rngs)

    return build(rngs)


class Unstacked(nnx.Module):
    """A stack whose blocks have arrays of their own: `blocks` lists them, without the layers named in `whole`, which
    are attributes here, stacked as before.

    A scan copies each block's weights out of the stack before a product reads them, and what is kept for the backward
    pass into stacks and out of them; here nothing is copied, and as many blocks are compiled as there are. The stack's
    other arrays are deleted, one after the other, as they are taken apart, so that no more than one of them is there
    twice: the stack can't be used any more. Of a stack of shapes it makes shapes.
    """

    def __init__(self, stack: nnx.Module, whole: Collection[str] = ()):
        for name in whole:
            setattr(self, name, getattr(stack, name))
            delattr(stack, name)
        graphdef, state = nnx.split(stack)
        leaves, structure = jax.tree.flatten(state)
        slices = []
        for leaf in leaves:
            slices.append(jax.block_until_ready([as_multiplied(block) for block in sharding.slices(leaf)]))
            if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
                leaf.delete()
        self.blocks = nnx.List([nnx.merge(graphdef, structure.unflatten(block)) for block in zip(*slices)])


def map_stack(stack: nnx.Module, f: Callable[[nnx.Module, Any], jax.Array], xs: Any = None) -> jax.Array:
    """f(block, xs[block]) of all blocks of a stack at once, [l, …]: one batched product where a scan has l. Of a stack
    in the host's memory one after the other (nn/offload.py)."""
    graphdef, state = nnx.split(stack)
    if any_offloaded(state):
        return jax.lax.map(lambda block: f(nnx.merge(graphdef, on_device(block[0])), block[1]), (state, xs))
    return jax.vmap(lambda block_state, x: f(nnx.merge(graphdef, block_state), x))(state, xs)


def in_turn(f: Callable[[jax.Array], Any], xs: Sequence[jax.Array]) -> list[Any]:
    """[f(x) for x in xs], each begun when the one before is done, in the memory of one.

    No loop: with a compiler's level O1 (training/step.py) libtpu 0.0.52 aborts over the autoencoder in a loop, of two
    examples on each v6e.
    """
    results: list[Any] = []
    for x in xs:
        if results:
            results[-1], x = jax.lax.optimization_barrier((results[-1], x))
        results.append(f(x))
    return results


def stack_outputs(stack: nnx.Module, x: jax.Array) -> tuple[jax.Array, ...]:
    """(x, and what each block of the stack makes of the one before)."""
    graphdef, state = nnx.split(stack)

    def step(x, block_state):
        x = nnx.merge(graphdef, block_state)(x)
        return x, x

    return (x, *jax.lax.scan(step, x, state)[1])


def _policy(*names: str) -> Callable[..., bool]:
    """Keeps values of these names and cuDNN's forward attention with its log-sum-exp, which jax gives no name and
    without which attention would run again."""
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def keeps(primitive: Any, *args: Any, **parameters: Any) -> bool:
        return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *args, **parameters)

    return keeps


# By how much they keep, most first; everything else is recomputed.
REMAT_POLICIES = {
    "none": None,
    "dots": _policy(SAVED, OUTPUTS, INNER, QKV, HIDDEN),
    "qkv": _policy(SAVED, OUTPUTS, INNER, QKV),
    "outputs": _policy(SAVED, OUTPUTS, INNER),
    "attention": _policy(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _unstacked(xs: Any, depth: int) -> list[Any]:
    """xs[0], xs[1], ...; by splits, whose derivative joins the blocks' gradients where that of indexing would add up
    as many whole stacks."""
    leaves, structure = jax.tree.flatten(xs)
    slices = [[jnp.squeeze(x, 0) for x in jnp.split(leaf, depth)] for leaf in leaves]
    return [structure.unflatten([blocks[index] for blocks in slices]) for index in range(depth)]


def scan_stack(
    stack: nnx.Module,
    body: Callable[[nnx.Module, Any, Any], Any],
    carry: Any,
    xs: Any = None,
    *,
    without: Collection[str] = (),
    prepare: Callable[[Any], Any] = lambda weights: weights,
    remat: str = "none",
    unroll: int = 1,
) -> Any:
    """carry after `carry = body(block, carry, xs[block])` for each block of a stack made by `stacked`, or Unstacked.

    Layers named in `without` are not scanned over: the body must not use them. `prepare` is applied to a block's
    weights as a step begins, after those in the host's memory are copied to the device. `remat` names an entry of
    REMAT_POLICIES; "none" keeps every intermediate for the backward pass. `unroll`: how many blocks of a stack are
    compiled side by side.
    """
    if isinstance(stack, Unstacked):
        [graphdef, *_], states = zip(*map(nnx.split, stack.blocks))
        unused = nnx.State({})
    else:
        graphdef, unused, states = nnx.split(stack, lambda path, _: path[0] in without, ...)

    def step(carry, slices):
        block_state, block_xs = slices
        # What isn't used stays a whole stack, and no part of the program.
        block_state = prepare(on_device(block_state))
        return body(nnx.merge(graphdef, unused, block_state), carry, block_xs), None

    if remat != "none":
        # Nothing in a scan's backward pass can be shared with its forward pass; without one, all could.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=isinstance(stack, Unstacked))
    if isinstance(stack, Unstacked):
        for state, block_xs in zip(states, _unstacked(xs, len(states))):
            carry, _ = step(carry, (state, block_xs))
        return carry
    return jax.lax.scan(step, carry, (states, xs), unroll=unroll)[0]
