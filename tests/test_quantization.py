"""8-bit kernels against formulas in float64, and that a quantised transformer really holds 8 bits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden import golden_dir

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.state import flat_state, shapes
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.nn import quantization
from lorweb_jax.nn.layers import Linear
from lorweb_jax.nn.quantization import bytes_by_dtype, dequantize, quantize
from lorweb_jax.pipeline.pipeline import Pipeline


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def kernel():
    """[2, 48, 20], channels of very different sizes, one of zeros."""
    kernel = np.random.default_rng(0).normal(size=(2, 48, 20)) * 10.0 ** np.arange(-10, 10)
    kernel[1, :, 3] = 0
    return kernel.astype(np.float32)


@pytest.mark.parametrize("kind, largest", [("int8", 127), ("fp8", 448)])
def test_codes_are_the_formulas(kind, largest, kernel):
    codes, scale = quantize(kernel, kind)
    assert codes.dtype == quantization.DTYPES[kind] and scale.dtype == np.float32 and scale.shape == (2, 1, 20)
    wide = kernel.astype(np.float64)
    expected = np.abs(wide).max(1, keepdims=True) / largest
    expected[1, 0, 3] = 1
    np.testing.assert_allclose(scale, expected, rtol=2e-7)
    assert np.abs(codes.astype(np.float64)).max(1).min() == 0 and not codes[1, :, 3].astype(np.float64).any()
    assert (np.abs(codes.astype(np.float64)).max(1) == largest).sum() == 39
    # Half a step of int8; of e4m3 half a unit in the last of three places, 2⁻¹⁰ near zero.
    codes_apart = np.abs(wide / expected - codes.astype(np.float64))
    allowed = 0.5 if kind == "int8" else np.maximum(2.0**-4 * np.abs(wide / expected), 2.0**-10)
    assert (codes_apart <= allowed * (1 + 1e-5)).all()
    np.testing.assert_allclose(dequantize(codes, scale), codes.astype(np.float64) * scale, rtol=1e-6)
    for array in (kernel, kernel.astype(ml_dtypes.bfloat16)):
        by_jax, by_numpy = jax.jit(quantize, static_argnums=1)(array, kind), quantize(array, kind)
        assert [np.asarray(x).tobytes() for x in by_jax] == [x.tobytes() for x in by_numpy]


@pytest.mark.parametrize("kind, error", [("int8", 0.008), ("fp8", 0.028)])
def test_a_quantised_layer(kind, error):
    layer = Linear(256, 64, role="any", rngs=nnx.Rngs(0))
    small = Linear(256, 64, quantization=kind, role="any", rngs=nnx.Rngs(0))
    codes, scale = (np.asarray(part[...], np.float64) for part in (small.kernel, small.scale))
    x = jax.random.normal(jax.random.key(1), (3, 5, 256))
    dy = jax.random.normal(jax.random.key(2), (3, 5, 64))
    y, back = jax.vjp(small, x)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ (codes * scale), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(back(dy)[0], np.asarray(dy, np.float64) @ (codes * scale).T, rtol=1e-4, atol=1e-5)
    assert 0.3 * error < relative(y, layer(x)) < error
    half = x.astype(jnp.bfloat16)
    assert small(half).dtype == jnp.bfloat16 and relative(small(half), y) < 0.006


def test_products_in_fp8(monkeypatch):
    """As on hardware that multiplies fp8: x and what comes back are rounded with a scale for each example, twice its
    root mean square."""
    monkeypatch.setattr(quantization, "multiplies_fp8", lambda: True)
    random = np.random.default_rng(0)
    codes, scale = quantize(random.normal(size=(256, 64)).astype(np.float32), "fp8")
    kernel = dequantize(codes, scale).astype(np.float64)
    x = (random.normal(size=(4, 24, 256)) * 10.0 ** np.arange(-6, 6, 3)[:, None, None]).astype(np.float32)
    x[3] = 0
    dy = (random.normal(size=(4, 24, 64)) * 10.0 ** np.arange(-9, 3, 3)[:, None, None]).astype(np.float32)
    y, back = jax.vjp(jax.jit(lambda x: quantization.product(x, codes, scale)), x)

    def rounded(values):
        step = 2 * np.sqrt(np.square(values.astype(np.float64)[:, ::8]).mean((1, 2), keepdims=True))
        step = np.where(step == 0, 1, step)
        return (values / step).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * step

    assert relative(y, rounded(x) @ kernel) < 2e-3  # ties may fall otherwise
    assert relative(back(dy)[0], rounded((dy * scale).astype(np.float32)) @ codes.astype(np.float64).T) < 2e-3
    for example in range(3):
        assert 0.01 < relative(y[example], x[example].astype(np.float64) @ kernel) < 0.035
        assert 0.01 < relative(back(dy)[0][example], dy[example].astype(np.float64) @ kernel.T) < 0.035
    # Tokens of an example may be thirty times smaller, and single numbers five hundred times larger, than most.
    x[0, 8:16] /= 30
    x[1, 5, 7] = 500 * x[1].std()
    y = quantization.product(x, codes, scale)
    assert relative(y[0, 8:16], x[0, 8:16].astype(np.float64) @ kernel) < 0.06
    assert relative(y[1, 5], x[1, 5].astype(np.float64) @ kernel) < 0.07
    # Of vectors [b, i] each has a scale.
    vectors = x[:3, 0] * 10.0 ** np.arange(3)[:, None].astype(np.float32)
    np.testing.assert_array_equal(
        quantization.product(vectors, codes, scale), quantization.product(vectors[:, None], codes, scale)[:, 0]
    )
    assert quantization.product(x.astype(jnp.bfloat16), codes, scale).dtype == jnp.bfloat16


def test_a_scanned_stack_keeps_codes_for_the_way_back_not_numbers():
    """Otherwise training would hold a dequantised copy of the base."""
    codes, scale = jnp.ones((4, 32, 32), jnp.int8), jnp.ones((4, 1, 32))

    def loss(x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(quantization.product(x, *layer)), None), x, (codes, scale))[0]

    program = str(jax.make_jaxpr(jax.grad(lambda x: loss(x).sum()))(jnp.ones((2, 32))))
    assert "i8[4,32,32]" in program and "f32[4,32,32]" not in program


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_kernels_of_the_blocks_are_8_bit_and_nothing_else_is(kind):
    """At FLUX.1 Kontext's own sizes: half of bfloat16's bytes."""
    sizes = shapes(lambda: Flux(FluxConfig(), quantization=kind, rngs=nnx.Rngs(0)))
    small = {path for path, shape in sizes.items() if shape.dtype == quantization.DTYPES[kind]}
    assert small == {f"{path}.kernel" for path in backbone(FluxConfig()).adapted}
    scales = {path.replace(".kernel", ".scale") for path in small}
    # 2·6 + 8 + 2·8 kernels of d² in a double block, 3 + 3 + 4 + 5 in a single one
    assert sum(sizes[path].size for path in small) == (19 * 36 + 38 * 15) * 3072**2 == 11_834_228_736
    assert sum(shape.size for path, shape in sizes.items() if path not in scales) == 11_901_408_320
    size = sum(shape.size * (1 if path in small else 4 if path in scales else 2) for path, shape in sizes.items())
    assert 0.5 < size / (2 * 11_901_408_320) < 0.505
    assert bytes_by_dtype([sizes[path] for path in small]).startswith(f"11.8 GB {quantization.DTYPES[kind].name}")


def test_a_pipeline_in_8_bit():
    """Its kernels are the files', quantised; a mix is added beside them and can't be folded."""
    folder = golden_dir() / "tiny_pipeline"
    pipeline = Pipeline.load(folder, quantization="int8").attach(golden_dir() / "basis_a.safetensors")
    full = flat_state(Pipeline.load(folder).model.transformer)
    found = flat_state(pipeline.model.transformer)
    for path in backbone(pipeline.folder.flux_config).adapted:
        codes, scale = quantize(np.asarray(full[f"{path}.kernel"]), "int8")
        assert found[f"{path}.kernel"].dtype == jnp.int8 and found[f"{path}.scale"].dtype == jnp.float32
        assert (found[f"{path}.kernel"] == codes).all() and (found[f"{path}.scale"] == scale).all()
    with np.load(golden_dir() / "e2e_square.npz") as recorded:
        images = [recorded[name] for name in ("image_a", "image_atag", "image_b")]
    assert pipeline.edit(*images, steps=2).shape == images[0].shape
    with pytest.raises(UserError, match="leave folding out"):
        pipeline.edit(*images, steps=2, folded=True)
    with pytest.raises(UserError, match="quantization is 'int4'; give none, int8 or fp8"):
        Pipeline.load(folder, quantization="int4")
