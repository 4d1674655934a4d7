"""Every router mode against a float64 formula (method.md §4), and the golden coefficients."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from flax import nnx
from golden import INPUTS, golden_dir

from lorweb_jax.adapters.basis import Basis, BasisConfig, LayerShape
from lorweb_jax.adapters.coefficients import Internal
from lorweb_jax.adapters.formats.basis_file import layer_name, read_basis
from lorweb_jax.adapters.mixture import LowRankAdapter
from lorweb_jax.adapters.router import Router, internal_query
from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.record import backbone

TOLERANCE = 1e-6


def formula(query, keys, projection, heads, activation, reduction):
    """One example's coefficients, head by head, in float64."""
    p = query.astype(np.float64) if projection is None else projection.astype(np.float64) @ query.astype(np.float64)
    width = len(p) // heads
    total = np.zeros(len(keys))
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = [float(p[part] @ key[part].astype(np.float64)) / math.sqrt(width) for key in keys]
        if activation == "tanh":
            total += [math.tanh(score) for score in scores]
        else:
            powers = [math.exp(score - max(scores)) for score in scores]
            total += np.array(powers) / sum(powers)
    if reduction == "mean":
        return total / heads
    return np.minimum(np.maximum(total, 0 if activation == "softmax" else -1), 1)


@pytest.mark.parametrize(
    "heads,activation,reduction,projection",
    list(itertools.product([1, 2, 4], ["softmax", "tanh"], ["mean", "sum"], ["linear", "none"])),
)
def test_equals_the_formula(heads, activation, reduction, projection):
    random = np.random.default_rng(heads)
    k, q = 8, 8 if projection == "none" else 11
    query, keys = (random.normal(size=size).astype(np.float32) for size in ((3, q), (5, k)))
    matrix = None if projection == "none" else random.normal(size=(k, q)).astype(np.float32)
    found = Router(heads, activation, reduction)(jnp.asarray(query), jnp.asarray(keys), matrix)
    expected = [formula(example, keys, matrix, heads, activation, reduction) for example in query]
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


# How many of the condition's m tokens each mode takes: ⌊m/4⌋ whole quarters, so 21 of 30 and not 22.
TAKEN = {
    8: {"caa'bb'": 8, "caa'b": 6, "caa'": 4},
    30: {"caa'bb'": 30, "caa'b": 21, "caa'": 15},
    7: {"caa'bb'": 7, "caa'b": 3, "caa'": 3},
}


@pytest.mark.parametrize("m,mode,pooling", list(itertools.product(TAKEN, ["aa'bb'", *TAKEN[8]], ["avg", "max"])))
def test_internal_queries_pool_the_named_tokens(m, mode, pooling):
    """5 text tokens, m noisy ones, m of the condition in raster order."""
    x = np.random.default_rng(0).normal(size=(2, 5 + 2 * m, 6)).astype(np.float32)
    picked = (x if mode == "aa'bb'" else x[:, 5 + m : 5 + m + TAKEN[m][mode]]).astype(np.float64)
    expected = picked.mean(1) if pooling == "avg" else picked.max(1)
    np.testing.assert_allclose(internal_query(jnp.asarray(x), 5, mode, pooling), expected, rtol=1e-5, atol=1e-6)
    # A stream of one kind (a double block's): its own second half is taken, the text stream's, too.
    if mode != "aa'bb'":
        np.testing.assert_allclose(
            internal_query(jnp.asarray(x[:, 5:]), 0, mode, pooling), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("mode,m", [("caa'b", 3), ("caa'", 1)])
def test_too_few_tokens_are_told(mode, m):
    with pytest.raises(UserError, match=f"takes none of the {m} tokens"):
        internal_query(jnp.zeros((1, 5 + 2 * m, 6)), 5, mode, "avg")


def test_modulation_inputs_are_used_as_they_are():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(internal_query(x, 4, "caa'b", "max"), x)


@pytest.mark.parametrize("case", ["a", "c"])
def test_golden_coefficients(case, tmp_path):
    """Softmax with one head (a), and four heads whose sum is clipped (c), in all 46 layers at once."""
    words = json.loads((golden_dir() / "configs.json").read_text())[case]
    (tmp_path / "config.yaml").write_text(json.dumps({"config": {"process": [{"network": words}]}}))
    basis = Basis.from_arrays(*read_basis(golden_dir() / f"basis_{case}.safetensors", tmp_path / "config.yaml"))
    with np.load(golden_dir() / f"case_{case}.npz") as file:
        expected = {key.removeprefix("mix/"): file[key] for key in file.files if key.startswith("mix/")}
        stacked = basis.coefficients(jnp.asarray(file["external_query"]))
    found = {layer_name(path, block): value for path, values in stacked.items() for block, value in enumerate(values)}
    assert found.keys() == expected.keys() and len(found) == 46
    for name, theirs in expected.items():
        assert np.linalg.norm(found[name] - theirs) <= TOLERANCE * np.linalg.norm(theirs), name


def test_errors():
    basis = Basis(BasisConfig(size=2, rank=1, key_dim=4, query_dim=6), {"layer": LayerShape(1, 3, 5)}, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="5 wide and the basis expects 6"):
        basis.coefficients(jnp.zeros((1, 5)))
    internal = Basis(
        BasisConfig(size=2, rank=1, key_dim=4, query="internal", query_mode="caa'", query_dim=None),
        {"layer": LayerShape(1, 3, 5)},
        rngs=nnx.Rngs(0),
    )
    assert internal.coefficients(jnp.zeros((1, 3))) is None  # not known before the layers run
    with pytest.raises(UserError, match="has a router and no named mixes"):
        internal.mix("content")
    with pytest.raises(UserError, match="known in advance"):
        basis.adapters(None)
    for change, message in [
        ({"heads": 3}, "3 heads"),
        ({"activation": "relu"}, "softmax or tanh"),
        ({"size": 0}, "size"),
        ({"query": "internal", "query_mode": "cat-aa'b"}, "caa'bb'"),
    ]:
        with pytest.raises(UserError, match=message):
            BasisConfig(**{"key_dim": 128, **change})
    with pytest.raises(UserError, match="use projection linear"):
        Basis(BasisConfig(key_dim=4, projection="none", query_dim=6), {"layer": LayerShape(1, 3, 5)}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "mode,pooling,activation",
    [("aa'bb'", "avg", "softmax"), ("caa'b", "max", "tanh"), ("caa'bb'", "avg", "softmax"), ("caa'", "max", "softmax")],
)
def test_internal_queries_in_the_transformer(mode, pooling, activation, tmp_path):
    """Against diffusers' transformer with the formula hooked onto each of its linear layers, in torch."""
    tiny = pytest.importorskip("tiny_flux")
    import torch

    theirs, values = tiny.theirs(), tiny.inputs(text_tokens=12)  # m = 6 in every stream
    model = tiny.ours(theirs, tmp_path)
    config = BasisConfig(
        size=3,
        rank=2,
        key_dim=4,
        query="internal",
        query_mode=mode,
        pooling=pooling,
        activation=activation,
        query_dim=None,
    )
    basis = Basis(config, backbone(model.config).adapted, rngs=nnx.Rngs(0))
    for layer in basis.layers.values():
        layer.b.set_value(jnp.asarray(np.random.default_rng(1).normal(size=layer.b.shape), jnp.float32))

    def hook(name, a, b, keys, projection):
        def add(module, given, out):
            x = pooled = given[0]
            if x.ndim == 3:
                skipped = 12 if name.startswith("single") and mode != "aa'bb'" else 0
                pooled = x[:, skipped:]
                if mode != "aa'bb'":
                    pooled = pooled[:, pooled.shape[1] // 2 :]
                    pooled = pooled[:, : {"caa'bb'": 6, "caa'b": 3, "caa'": 3}[mode]]
                pooled = pooled.mean(1) if pooling == "avg" else pooled.amax(1)
            scores = torch.einsum("bi,ki,nk->bn", pooled, projection, keys) / 2
            mix = scores.softmax(-1) if activation == "softmax" else scores.tanh()
            return out + torch.einsum("b...i,nir,bn,nro->b...o", x, a, mix, b)

        return add

    modules = dict(theirs.named_modules())
    for path, parts in basis.to_arrays().items():
        for block in range(len(parts["a"])):
            name = layer_name(path, block)
            modules[name].register_forward_hook(
                hook(name, *(torch.tensor(np.asarray(parts[part][block])) for part in ("a", "b", "keys", "projection")))
            )
    expected = tiny.run(theirs, values)
    run = jax.jit(lambda model, values, adapters: model(*values, adapters=adapters))
    found = run(model, [values[name] for name in INPUTS], basis.adapters(None))
    assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize("mode,pooling", list(itertools.product(TAKEN[8], ["avg", "max"])))
def test_internal_coefficients(mode, pooling):
    """Of a layer with m = 30 condition tokens against the formula in float64, to the 1e-5 of method.md §4."""
    random = np.random.default_rng(3)
    i, k, n = 6, 8, 5
    x, keys, projection = (random.normal(size=size).astype(np.float32) for size in ((2, 5 + 60, i), (n, k), (k, i)))
    internal = Internal(Router(2, "softmax", "mean"), mode, pooling)
    picked = x[:, 35 : 35 + TAKEN[30][mode]].astype(np.float64)
    queries = picked.mean(1) if pooling == "avg" else picked.max(1)
    expected = [formula(query, keys, projection, 2, "softmax", "mean") for query in queries]
    assert relative(internal.of_input((keys, projection), jnp.asarray(x), 5), expected) <= 1e-5


def test_the_einsum_and_its_gradients():
    """Eq. 4 with different coefficients in each row, and its gradients, against one einsum in float64."""
    random = np.random.default_rng(4)
    for s in ((7,), ()):
        shapes = {"x": (3, *s, 5), "a": (4, 5, 2), "b": (4, 2, 6), "c": (3, 4), "g": (3, *s, 6)}
        values = {name: random.normal(size=shape) for name, shape in shapes.items()}
        t = "s" * len(s)

        def update(x, a, b, c):
            return LowRankAdapter(a, b, c, 0.5)(x)

        arguments = [jnp.asarray(values[name], jnp.float32) for name in "xabc"]
        found, pullback = jax.vjp(update, *arguments)
        found = [found, *pullback(jnp.asarray(values["g"], jnp.float32))]
        x, a, b, c, g = values.values()
        for ours, equation, *factors in (
            (found[0], f"b{t}i,nir,bn,nro->b{t}o", x, a, c, b),
            (found[1], f"b{t}o,nir,bn,nro->b{t}i", g, a, c, b),
            (found[2], f"b{t}i,b{t}o,bn,nro->nir", x, g, c, b),
            (found[3], f"b{t}i,nir,bn,b{t}o->nro", x, a, c, g),
            (found[4], f"b{t}i,nir,b{t}o,nro->bn", x, a, g, b),
        ):
            assert relative(ours, 0.5 * np.einsum(equation, *factors)) <= 1e-5
