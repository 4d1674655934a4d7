"""What the small base's GPU training draws from: all drawings after all operations, as latents on the device.

Worker processes make the pixels while programs are compiled; the autoencoder's encoder runs as products, which need no
search for the fastest convolution.
"""

import time
from types import SimpleNamespace

import numpy as np
from gpu_loop import UNSEARCHED, Background, Log

LATENTS_SHARE = 0.45  # of the time, from the start: when no other variant's latents are begun


class Pixels:
    """All drawings after all operations, made by worker processes: originals first, each part in random order."""

    def __init__(self, drawings, operations: list[str], variants, processes: int, log: Log):
        self.total, self.log, self.names = len(drawings.names), log, operations
        self.held_out = np.tile(drawings.held_out, len(variants))
        self.pieces: list[tuple[np.ndarray, np.ndarray]] = []  # (drawings or variants, uint8 [n, 1 + o, h, w, 3])
        self.made = [0] * len(variants)
        self.thread = Background(self._make, drawings.images, variants, processes)

    def _make(self, images, variants, processes):
        from lorweb_jax.data.embedded.bulk import operated

        for v, variant in enumerate(variants):
            order = np.random.default_rng(v).permutation(self.total)
            for start, stop, made in operated(np.ascontiguousarray(variant(images)[order]), self.names, processes):
                self.pieces.append((order[start:stop] + v * self.total, made))
                self.made[v] += stop - start
            self.log.say(f"variant {v}: all {self.total} drawings after {len(self.names)} operations")

    def variants_ready(self) -> int:
        return sum(made == self.total for made in self.made)

    def table(self, size: int, seed: int) -> np.ndarray:
        """uint8 [size, 1 + o, h, w, 3] of training drawings made so far, chosen at random."""
        pieces = list(self.pieces)
        where = [(p, row) for p, (index, _) in enumerate(pieces) for row in np.flatnonzero(~self.held_out[index])]
        chosen = np.random.default_rng(seed).permutation(len(where))
        table = np.empty((size, *pieces[0][1].shape[1:]), np.uint8)
        for to, i in enumerate(np.resize(chosen, size)):
            p, row = where[i]
            table[to] = pieces[p][1][row]
        return table

    def wait_for(self, drawings: int) -> None:
        """Until so many drawings, of the first variant and then of the next ones, are made."""
        while sum(self.made) < min(drawings, len(self.held_out)):
            if self.thread.error:
                self.thread.result()
            time.sleep(0.2)


def encoders(config, autoencoder, size, dtype: str, log: Log):
    """Its `compile()` makes `program`, two programs (weights, scale, shift, images uint8 [n, h, w, 3]) -> latents
    float16, of images as they are and twice as large."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lorweb_jax.images.levels import to_float
    from lorweb_jax.nn.layers import Conv
    from lorweb_jax.small_base.autoencoder import enlarged

    def latents(weights, scale, shift, x):
        model = autoencoder.partition.model(weights, {})
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Conv):
                module.by_products = True
        z = model.encode(to_float(x).astype(dtype))[0].astype(jnp.float32)
        return ((z - shift) * scale).astype(jnp.float16)

    made, side, number = SimpleNamespace(program=None), config.data.size, jax.ShapeDtypeStruct((), np.float32)

    def compile_both():
        begin = log.now()
        weights = autoencoder.begun.result().trainable
        made.program = [
            jax.jit(function)
            .lower(weights, number, number, jax.ShapeDtypeStruct((count, side, side, 3), np.uint8))
            .compile(compiler_options=UNSEARCHED)
            for function, count in (
                (latents, size.encoded),
                (lambda w, a, b, x: latents(w, a, b, enlarged(x)), size.enlarged),
            )
        ]
        log.say(f"encoders: compiled in {log.now() - begin:.1f} s")

    made.compile = compile_both
    return made


def encode_all(log: Log, size, programs, weights, scale, pixels: Pixels, drawings, operations: int, least: int):
    """((quadrants, large), variants that are in it): latents of everything, float16 on the device; of at least
    `least` variants unless they take too long."""
    import functools

    import jax
    import jax.numpy as jnp

    total, side = len(drawings.names), pixels.pieces[0][1].shape[2] // 8
    ready = max(least, pixels.variants_ready())
    encode, encode_large = programs
    weights, scale = jax.device_put(weights), tuple(map(np.float32, scale))

    @functools.partial(jax.jit, donate_argnums=0)
    def put(table, at, latents):
        return jax.lax.dynamic_update_slice(table, latents, (at, 0, 0, 0))

    # In the order of the pieces first, then in the drawings' order: one gather at the end.
    table = jnp.zeros((-(-ready * total * operations // size.encoded) * size.encoded, side, side, 16), jnp.float16)
    for block in range(len(table) // size.encoded):
        rows = block * size.encoded
        if block % 16 == 0:
            jax.block_until_ready(table)
            if rows >= total * operations and log.now() > LATENTS_SHARE * log.seconds:
                ready = rows // (total * operations)
                break
        pixels.wait_for(-(-(rows + size.encoded) // operations))
        table = put(
            table, np.int32(rows), encode(weights, *scale, blocks(list(pixels.pieces), block, size.encoded, operations))
        )
    kept = [(index, images) for index, images in list(pixels.pieces) if index[0] < ready * total]
    order = np.concatenate([index for index, _ in kept])
    place = np.zeros(len(pixels.held_out), np.int64)
    place[order] = np.arange(len(order))
    rows = (place[:, None] * operations + np.arange(operations)).astype(np.int32)
    quadrants = jax.jit(lambda table, rows: table[rows])(table, rows)
    del table
    plain = np.empty((total, *kept[0][1].shape[2:]), np.uint8)
    for index, images in kept:
        original = index < total
        plain[index[original]] = images[original, 0]
    large = jnp.concatenate(
        [
            encode_large(weights, *scale, np.resize(plain[i : i + size.enlarged], (size.enlarged, *plain.shape[1:])))
            for i in range(0, total, size.enlarged)
        ]
    )[:total]
    jax.block_until_ready((quadrants, large))
    log.say(
        f"latents of {ready} variants on the device: {quadrants.nbytes / 1e9:.2f} GB, "
        f"deviation {float(quadrants[:64].astype(jnp.float32).std()):.3f}"
    )
    return (quadrants, large), ready


def blocks(kept, block, size, operations):
    """Block number `block` of `size` quadrants, uint8 [size, h, w, 3]; the last is filled up."""
    starts = np.cumsum([0, *(len(index) * operations for index, _ in kept)])
    first, parts, missing = block * size, [], size
    piece = int(np.searchsorted(starts, first, "right")) - 1
    while missing and piece < len(kept):
        images = kept[piece][1]
        images = images.reshape(-1, *images.shape[2:])
        at = first - int(starts[piece])
        part = images[at : at + missing]
        parts.append(part)
        missing -= len(part)
        first += len(part)
        piece += 1
    if missing:
        parts.append(np.zeros((missing, *parts[0].shape[1:]), np.uint8))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
