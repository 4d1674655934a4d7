"""Full attention by the implementation that suits the device: XLA's products, cuDNN, or a Pallas kernel for TPUs.

XLA's holds all s² scores of a head at once; the other two never do.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import head_major, sharding

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")
# Values of this name may be kept for the backward pass (layers.REMAT_POLICIES).
SAVED = "attention"
HEADS = ("batch", None, "heads", None)  # axes of q, k, v
_LANES = 128  # sequence lengths of the TPU kernel's blocks are multiples of this
# Bytes of a head's keys that the TPU kernel holds at once, at most: VMEM has room for little more beside what is
# computed from them. With all of a head's each is read once, not once a block of queries; and the backward pass writes
# as many partial gradients of q, to be added up afterwards in their own dtype, as there are blocks of keys.
_HELD = 4608 * _LANES * 2
Parts = head_major.Parts


def attend(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
    """softmax(q kᵀ / √a) v over the whole sequence; q, k, v and the result [b, s, heads, a].

    implementation: one of IMPLEMENTATIONS but "auto", which `resolve` turns into one of the others.
    """
    q, k, v = (sharding.constrain(x, *HEADS) for x in (q, k, v))
    if implementation == "pallas":
        return _pallas(q, k, v)
    if implementation == "xla":
        return checkpoint_name(_products(q, k, v), SAVED)
    return checkpoint_name(jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), SAVED)


def _products(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Two matrix products, softmax in float32. Rows are divided by their sums after the second one, which takes s·a
    divisions in place of s², and fewer passes over the scores, forward and backward."""
    scores = jnp.einsum("bqha,bkha->bhqk", q, k, preferred_element_type=jnp.float32)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp((scores - largest) * q.shape[-1] ** -0.5)
    out = jnp.einsum("bhqk,bkha->bhqa", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).transpose(0, 2, 1, 3)


def candidates(platform: str, dtype: jnp.dtype, head_dim: int) -> tuple[str, ...]:
    """Implementations that run on a platform ("cpu", "gpu", "tpu") at this dtype and head width, likeliest first."""
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128:
        return ("cudnn", "xla")
    if platform == "tpu" and head_dim % _LANES == 0:
        return ("pallas", "xla")
    return ("xla",)


def resolve(implementation: str, platform: str, dtype: jnp.dtype, head_dim: int) -> str:
    """What stands for `implementation` on a platform: itself, or for "auto" the likeliest of `candidates`.

    Raises UserError for a name that isn't known or can't run there. `fastest` measures instead of guessing.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}", 2)
    possible = candidates(platform, dtype, head_dim)
    if implementation == "auto":
        return possible[0]
    if implementation not in possible:
        raise UserError(
            f"attention {implementation!r} does not run on this {platform} in {jnp.dtype(dtype).name} with "
            f"heads of width {head_dim}; choose auto or one of {', '.join(possible)}",
            2,
        )
    return implementation


def choose(implementation: str, shape: tuple[int, int, int, int], dtype: jnp.dtype, backward: bool) -> str:
    """`resolve` for this machine's device, where "auto" is settled by measuring at q's shape [b, s, heads, a] if there
    is more than one candidate. All processes of a run get the same answer."""
    name, possible = (
        resolve(implementation, jax.default_backend(), dtype, shape[-1]),
        candidates(jax.default_backend(), dtype, shape[-1]),
    )
    if implementation != "auto" or len(possible) == 1:
        return name
    seconds_of = fastest(shape, dtype, backward)
    index = np.int32(possible.index(next(iter(seconds_of), name)))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        index = multihost_utils.broadcast_one_to_all(index)
    print(
        f"attention: {possible[int(index)]} ("
        + ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in seconds_of.items())
        + ")",
        flush=True,
    )
    return possible[int(index)]


def fastest(shape: tuple[int, int, int, int], dtype: jnp.dtype, backward: bool, repeats: int = 5) -> dict[str, float]:
    """Seconds of each candidate on this machine's device, the fastest first, at q's shape [b, s, heads, a].

    An implementation that fails there (too old a library, too little memory) is left out.
    """
    seconds_of = {}
    for name in candidates(jax.default_backend(), dtype, shape[-1]):

        def run(q, k, v, name=name):
            return attend(q, k, v, name).astype(jnp.float32).sum()

        step = jax.jit(jax.grad(run, argnums=(0, 1, 2)) if backward else run)
        q, k, v = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(3))
        try:
            jax.block_until_ready(step(q, k, v))
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(step(q, k, v))
                seconds.append(time.perf_counter() - start)
            seconds_of[name] = min(seconds)
        except Exception:  # jax raises whatever the library below it does
            continue
    return dict(sorted(seconds_of.items(), key=lambda item: item[1]))


def attend_streams(
    q: Parts, k: Parts, v: Parts, q_scales: Parts, k_scales: Parts, rope: tuple[jax.Array, jax.Array], eps: float
) -> Parts:
    """`attend` by the Pallas kernel from layers' outputs to layers' inputs: q, k, v and the result are the parts of a
    sequence, [b, s_p, h·a] each, that `head_major.fits` accepts. q and k are normed, each part by its scale [a], and
    turned by rope, cos and sin [s, a/2] (head_major.normed)."""

    def local(q, k, v, q_scales, k_scales, rope):
        q = head_major.normed(q, q_scales, rope, head_major.WIDTH**-0.5, eps)
        k = head_major.normed(k, k_scales, rope, 1.0, eps)
        return head_major.merge(_splash(q, k, head_major.split(v)), tuple(part.shape[1] for part in v))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k, v, q_scales, k_scales, rope)
    split = tuple(sharding.spec(mesh, HEADS[:3], part.shape) for part in q)
    specs = (split, split, split, P(), P(), P())
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return run(q, k, v, q_scales, k_scales, rope)


def _pallas(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """jax's splash attention on every device's own examples and heads."""

    def local(q, k, v):
        s, width = q.shape[1], q.shape[-1]
        more = -s % _LANES

        def by_head(x):  # [b, s, h, a] -> [b, h, padded s, a]
            return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

        return _splash(by_head(q * width**-0.5), by_head(k), by_head(v), more).transpose(0, 2, 1, 3)[:, :s]

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k, v)
    split = sharding.spec(mesh, HEADS, q.shape)
    return jax.shard_map(local, mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False)(q, k, v)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, padding: int = 0) -> jax.Array:
    """softmax(q kᵀ) v, all [b, h, s, a]; the last `padding` tokens, which stand for nothing, see themselves alone."""
    heads, s, width = q.shape[1:]
    kernel, segments = _splash_kernel(s, heads, _HELD // (width * k.dtype.itemsize)), None
    if padding:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        ids = (jnp.arange(s) >= s - padding).astype(jnp.int32)
        segments = SegmentIds(ids, ids)
    return jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)


def _splash_kernel(s: int, heads: int, keys: int) -> Callable:
    """For a sequence of s tokens, of which it holds at most so many keys at once."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block, kv = _divisor(s, 512), _divisor(s, keys)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=kv,
        block_kv_compute=_divisor(kv, 512),
        block_q_dkv=block,
        block_kv_dkv=kv,
        block_kv_dkv_compute=_divisor(kv, 512),
        use_fused_bwd_kernel=True,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((s, s))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        residual_checkpoint_name=SAVED,
    )


def _divisor(s: int, most: int) -> int:
    """The largest divisor of s, a multiple of 128, that is a multiple of 128 and no more than `most`."""
    return next(size for size in range(min(most, s) // _LANES * _LANES, 0, -_LANES) if s % size == 0)
