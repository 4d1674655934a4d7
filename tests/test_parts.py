"""A linear layer whose input comes in parts, against the product with the joined input in float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from flax import nnx

from lorweb_jax.adapters.coefficients import Internal
from lorweb_jax.adapters.mixture import AdapterSum, LowRankAdapter, RoutedAdapter
from lorweb_jax.adapters.router import Router
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Linear
from lorweb_jax.nn.quantization import dequantize

B, S, TEXT, WIDTHS, O, N, R, K = 2, 14, 4, (6, 24), 10, 3, 2, 8
I = sum(WIDTHS)


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """CPUs join the parts, others don't."""
    monkeypatch.setattr(sharding, "device_in_use", lambda: SimpleNamespace(platform=request.param))
    return request.param


def numbers(*shape):
    return np.random.default_rng(len(shape) + shape[0]).normal(size=shape).astype(np.float32)


def parted(x):
    return tuple(jnp.split(jnp.asarray(x), np.cumsum(WIDTHS)[:-1], axis=-1))


@pytest.mark.parametrize("shape", [(B, S, I), (B, I)])
@pytest.mark.parametrize("kind", ["none", "int8", "fp8"])
def test_the_product_of_parts_is_that_of_the_joined_input(kind, shape, platform):
    layer = Linear(I, O, role="row", quantization=kind, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(numbers(O))
    kernel = layer.kernel[...] if kind == "none" else dequantize(layer.kernel[...], layer.scale[...])
    x = numbers(*shape)
    expected = x.astype(np.float64) @ np.asarray(kernel, np.float64) + np.asarray(layer.bias[...], np.float64)
    assert relative(layer(parted(x)), expected) <= 1e-6
    assert relative(layer(jnp.asarray(x)), expected) <= 1e-6
    concatenations = str(jax.make_jaxpr(layer)(parted(x))).count("concatenate")
    assert concatenations == (platform == "cpu" or kind == "fp8")
    dy = numbers(*shape[:-1], O)
    gradient = jax.vjp(layer, parted(x))[1](jnp.asarray(dy))[0]
    assert relative(jnp.concatenate(gradient, -1), dy.astype(np.float64) @ np.asarray(kernel, np.float64).T) <= 1e-6


def low_rank(x, a, b, c):
    """Σ_n c_n (x A_n) B_n in float64, x [b, s, i] and c [b, n]."""
    x, a, b, c = (np.asarray(array, np.float64) for array in (x, a, b, c))
    return np.einsum("bsi,nir,bn,nro->bso", x, a, c, b)


def test_adapters_take_parts():
    x, a, b, c = numbers(B, S, I), numbers(N, I, R), numbers(N, R, O), numbers(B, N)
    one = LowRankAdapter(jnp.asarray(a), jnp.asarray(b), jnp.asarray(c), 0.5)
    expected = 0.5 * low_rank(x, a, b, c)
    assert relative(one(parted(x), TEXT), expected) <= 1e-6
    assert relative(AdapterSum((one, one))(parted(x), TEXT), 2 * expected) <= 1e-6
    layer = Linear(I, O, role="row", rngs=nnx.Rngs(0))
    assert relative(layer(parted(x), one, TEXT) - layer(jnp.asarray(x)), expected) <= 1e-5


@pytest.mark.parametrize("mode", ["aa'bb'", "caa'bb'", "caa'b", "caa'"])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_the_internal_query_of_parts_is_that_of_the_joined_input(mode, pooling):
    x, a, b, keys, projection = numbers(B, S, I), numbers(N, I, R), numbers(N, R, O), numbers(N, K), numbers(K, I)
    tokens = x if mode == "aa'bb'" else x[:, TEXT:][:, (S - TEXT) // 2 :]
    tokens = tokens[:, : {"caa'b": 3, "caa'": 2}.get(mode, S)]  # of the condition's 5
    query = (tokens.mean(1) if pooling == "avg" else tokens.max(1)).astype(np.float64)
    c = np.tanh(query @ projection.T.astype(np.float64) @ keys.T / np.sqrt(K))
    internal = Internal(Router(1, "tanh", "mean"), mode, pooling)
    arrays = (jnp.asarray(array) for array in (a, b, keys, projection))
    adapter = RoutedAdapter(*arrays, None, 0.5, internal)
    assert relative(adapter.coefficients(parted(x), TEXT), c) <= 1e-5
    assert relative(adapter(parted(x), TEXT), 0.5 * low_rank(x, a, b, c)) <= 1e-5
