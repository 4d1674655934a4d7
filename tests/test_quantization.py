"""8-bit kernels against formulas in float64, and that a quantised transformer really holds 8 bits."""

from types import SimpleNamespace

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
from lorweb_jax.nn import quantization, sharding
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


def test_codes_of_int8(kernel):
    codes, scale = quantize(kernel, "int8")
    assert codes.dtype == quantization.DTYPES["int8"] and scale.dtype == np.float32 and scale.shape == (2, 1, 20)
    wide = kernel.astype(np.float64)
    expected = np.abs(wide).max(1, keepdims=True) / 127
    expected[1, 0, 3] = 1
    np.testing.assert_allclose(scale, expected, rtol=2e-7)
    assert not codes[1, :, 3].any() and (np.abs(codes.astype(int)).max(1) == 127).sum() == 39
    assert (np.abs(wide / expected - codes.astype(np.float64)) <= 0.5 * (1 + 1e-5)).all()


def test_codes_of_fp8(kernel):
    """One power of two a kernel; a code is off by half a unit in the last of three places, or 2⁻¹⁰ near zero."""
    kernel = np.stack([kernel[0, :, 8:12], kernel[1, :, 3:7], np.zeros((48, 4), np.float32)])
    codes, scale = quantize(kernel, "fp8")
    assert codes.dtype == quantization.DTYPES["fp8"] and scale.dtype == np.float32 and scale.shape == (3, 1, 1)
    wide = kernel.astype(np.float64)
    largest = np.abs(wide).max((1, 2), keepdims=True)
    assert (np.log2(scale) % 1 == 0).all() and scale[2] == 1
    assert ((224 <= largest[:2] / scale[:2]) & (largest[:2] / scale[:2] <= 448)).all()
    apart = np.abs(wide / scale - codes.astype(np.float64))
    assert (apart <= np.maximum(2.0**-4 * np.abs(wide / scale), 2.0**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes_of_jax_are_numpys(kind, kernel):
    codes, scale = quantize(kernel, kind)
    assert scale.shape == quantization.scale_shape(kernel.shape, codes.dtype)
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
    """As on hardware that multiplies fp8: x is rounded as it is, and what comes back by a power of two."""
    monkeypatch.setattr(quantization, "multiplies_fp8", lambda: True)
    random = np.random.default_rng(0)
    codes, scale = quantize(random.normal(size=(256, 64)).astype(np.float32) / 16, "fp8")
    kernel = codes.astype(np.float64) * scale

    def rounded(values, step=1.0):
        return (values / step).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * step

    x, dy = (random.normal(size=(3, 24, width)).astype(np.float32) for width in (256, 64))
    exact = x.astype(np.float64) @ kernel
    for size in (0.05, 1, 50):
        y, back = jax.vjp(jax.jit(lambda x: quantization.product(x, codes, scale)), x * size)
        assert relative(y, rounded(x * size) @ kernel) < 1e-5 and 0.01 < relative(y, size * exact) < 0.035
        found = back(dy * size * 1e-7)[0]  # gradients are small
        root = np.sqrt(np.square(dy[:, ::8].astype(np.float64) * size * 1e-7).mean())
        step = 2.0 ** np.ceil(np.log2(root))
        assert relative(found, rounded(dy * np.float32(size * 1e-7), step) @ kernel.T) < 1e-5
        assert 0.01 < relative(found, dy.astype(np.float64) * size * 1e-7 @ kernel.T) < 0.035
    x[0, 3, 5] = 3000
    y = quantization.product(x, codes, scale)
    np.testing.assert_allclose(y[0, 3], rounded(np.clip(x[0, 3], -448, 448)) @ kernel, rtol=1e-5, atol=1e-5)
    assert not np.any(jax.vjp(lambda x: quantization.product(x, codes, scale), x)[1](0 * dy)[0])
    assert quantization.product(x.astype(jnp.bfloat16), codes, scale).dtype == jnp.bfloat16
    vectors = x[:, 0]  # are not rounded
    assert relative(quantization.product(vectors, codes, scale), vectors.astype(np.float64) @ kernel) < 1e-6


@pytest.mark.parametrize("capability, expected", [("9.0", True), ("8.9", True), ("8.6", False)])
def test_a_gpu_elsewhere_is_asked_itself(capability, expected):
    """As plans are made: this machine's devices know nothing of it."""
    with sharding.compiling_for(SimpleNamespace(platform="cuda", compute_capability=capability)):
        assert quantization.multiplies_fp8() == expected
    assert not quantization.multiplies_fp8()


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
