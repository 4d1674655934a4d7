"""What 8 bit costs: relative errors (Euclidean norm) of layer outputs and of the velocity, against the full base."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from lorweb_jax.images.grid import condition_grid
from lorweb_jax.images.io import read_image
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.nn import quantization
from lorweb_jax.nn.layers import Adapter, Input, parts
from lorweb_jax.pipeline.pipeline import Pipeline
from parity.report import errors


class Way(NamedTuple):
    """How a product is made: kind of quantization.KINDS, compute dtype, and whether inputs are taken in fp8 too."""

    kind: str
    dtype: str
    inputs_fp8: bool = False

    def __str__(self) -> str:
        return f"{self.kind.replace('none', 'full')}{' inputs too' * self.inputs_fp8}, {self.dtype}"


FULL = Way("none", "float32")
WAYS = (
    Way("none", "bfloat16"),
    Way("int8", "float32"),
    Way("int8", "bfloat16"),
    Way("fp8", "float32"),
    Way("fp8", "bfloat16"),
    Way("fp8", "float32", True),
    Way("fp8", "bfloat16", True),
)


@contextlib.contextmanager
def fp8_products(wanted: bool) -> Iterator[None]:
    """As if this hardware multiplied fp8, or as if it didn't; where it doesn't, XLA does it in wider numbers."""
    with mock.patch.object(quantization, "multiplies_fp8", lambda: wanted):
        yield


def product(way: Way, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [.., i] @ kernel [i, o]."""
    x = x.astype(way.dtype)
    if way.kind == "none":
        return x @ kernel.astype(way.dtype)
    with fp8_products(way.inputs_fp8):
        return quantization.product(x, *quantization.quantize(kernel, way.kind))


def _squares(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[1 + ways]: ‖y‖², then ‖y_way − y‖² of each way, for y = x @ kernel in float32."""
    y = product(FULL, x, kernel)
    apart = [product(way, x, kernel).astype(jnp.float32) - y for way in WAYS]
    return jnp.stack([jnp.square(part).sum() for part in (y, *apart)])


def random_layers(tokens: int = 64) -> dict[str, np.ndarray]:
    """{size: [ways]}: errors of layers of FLUX.1 Kontext's sizes, with normal weights and inputs."""
    sizes = sorted({(shape.inputs, shape.outputs) for shape in backbone(FluxConfig()).adapted.values()})
    measure, found = jax.jit(_squares), {}
    for i, o in sizes:
        keys = jax.random.split(jax.random.key(i * o))
        squares = np.asarray(
            measure(jax.random.normal(keys[0], (1, tokens, i)), jax.random.normal(keys[1], (i, o)) * i**-0.5),
            np.float64,
        )
        found[f"{i} x {o}"] = np.sqrt(squares[1:] / squares[0])
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Probe(Adapter):
    """Given to a linear layer as its adapter: adds nothing, and tells how far each way is off for the layer's input."""

    kernel: jax.Array
    tell: Callable = dataclasses.field(metadata={"static": True})

    def inner(self, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((self.kernel.shape[0], 0), dtype)

    def outer(self, h: jax.Array, x: Input, text_tokens: int) -> jax.Array:
        jax.debug.callback(self.tell, _squares(jnp.concatenate(parts(x), axis=-1), self.kernel))
        return jnp.zeros((), h.dtype)


def real_layers(folder: Path, example: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({layer: [ways]} over all its blocks, without biases, and {velocity against what: [ways]}) for a pipeline.

    The input is the analogy a, a2, b of the folder `example` at four noise levels, without a basis.
    """
    full = Pipeline.load(folder)
    sums = {path: np.zeros(1 + len(WAYS)) for path in full.folder.backbone.adapted}

    def probe(path: str) -> _Probe:
        kernel, names = full.model.transformer, path.split(".")
        for name in (*names, "kernel"):
            kernel = getattr(kernel, name)
        return _Probe(kernel[...], lambda squares: sums[path].__iadd__(np.asarray(squares, np.float64)))

    images = [read_image(example / f"{name}.png") for name in ("a", "a2", "b")]
    velocities = {FULL: _velocity(full, images, {path: probe(path) for path in sums})}
    jax.effects_barrier()
    for way in WAYS:
        pipeline = Pipeline.load(folder, dtype=way.dtype, quantization=way.kind)
        with fp8_products(way.inputs_fp8):
            velocities[way] = _velocity(pipeline, images)
    off = {
        f"velocity against {reference}": np.array([errors(velocities[way], velocities[reference])[1] for way in WAYS])
        for reference in (FULL, WAYS[0])
    }
    return {path: np.sqrt(squares[1:] / squares[0]) for path, squares in sums.items()}, off


def _velocity(pipeline: Pipeline, images: list[np.ndarray], adapters=None) -> np.ndarray:
    """[4, s, c] of the analogy's grid between noise and its condition."""
    grid = condition_grid(*images)
    text, pooled = pipeline.prompt(["put a frame around it"] * 4)

    @jax.jit
    def velocity(model, adapters):
        condition = jnp.repeat(model.tokens(jnp.asarray(grid)[None]), 4, axis=0)
        level = jnp.array([0.1, 0.4, 0.7, 0.95])
        noise = jax.random.normal(jax.random.key(0), condition.shape)
        noisy = condition + level[:, None, None] * (noise - condition)
        return model.velocity(noisy, condition, text, pooled, level, jnp.full(4, 2.5), grid.shape[:2], adapters)

    return np.asarray(velocity(pipeline.model, adapters))


def table(rows: dict[str, np.ndarray]) -> str:
    """Percent, a column for each way."""
    return tabulate(
        [[name, *(f"{100 * value:.2f} %" for value in values)] for name, values in rows.items()],
        headers=["", *map(str, WAYS)],
        tablefmt="plain",
        colalign=["left", *["right"] * len(WAYS)],
        disable_numparse=True,
    )
