"""Sums, differences, multiples and interpolations of mixes, against float64; what tells one basis from another."""

import numpy as np
import pytest
from flax import nnx

from lorweb_jax import Basis, BasisConfig, Mix, UserError
from lorweb_jax.adapters.basis import LayerShape
from lorweb_jax.adapters.formats.lora_file import mixed_factors

CONFIG = BasisConfig(size=3, rank=2, key_dim=4, query_dim=6)
SHAPES = {"double.layer": LayerShape(2, 5, 7), "single.layer": LayerShape(3, 4, 4)}


def a_basis(seed=0, config=CONFIG) -> Basis:
    basis = Basis(config, SHAPES, rngs=nnx.Rngs(seed))
    random = np.random.default_rng(seed)
    arrays = {
        path: parts | {"b": random.normal(size=parts["b"].shape).astype(np.float32)}
        for path, parts in basis.to_arrays().items()
    }
    return Basis.from_arrays(config, arrays)


@pytest.fixture(scope="module")
def basis():
    return a_basis()


@pytest.fixture(scope="module")
def mixes(basis):
    random = np.random.default_rng(1)
    return [basis.mix({path: random.normal(size=(shape[0], 3)) for path, shape in SHAPES.items()}) for _ in range(2)]


def test_arithmetic(basis, mixes):
    a, b = mixes
    for mix, formula in (
        (a + b, lambda x, y: x + y),
        (a - b, lambda x, y: x - y),
        (-a, lambda x, y: -x),
        (0.5 * (a + b), lambda x, y: (x + y) / 2),
        (np.float32(2) * a, lambda x, y: 2 * x),
        (a * np.int64(3) / 4, lambda x, y: 3 * x / 4),
        (sum([a, b]), lambda x, y: x + y),
        (Mix.lerp(a, b, 0.3), lambda x, y: 0.7 * x + 0.3 * y),
        (Mix.lerp(a, b, -1), lambda x, y: 2 * x - y),
    ):
        assert mix.basis == basis.fingerprint()
        for path, c in mix.coefficients.items():
            expected = formula(*(m.coefficients[path].astype(np.float64) for m in (a, b)))
            np.testing.assert_allclose(c, expected, rtol=1e-6, atol=1e-6)
    for path in SHAPES:
        for t, end in ((0, a), (1, b)):
            np.testing.assert_array_equal(Mix.lerp(a, b, t).coefficients[path], end.coefficients[path])


def test_members_are_points_too(basis, mixes):
    """A mix is the sum of its members, where each block has the same coefficients."""
    for path, (depth, *_) in SHAPES.items():
        np.testing.assert_array_equal(basis.mix(2).coefficients[path], [[0, 0, 1]] * depth)
    mix = basis.mix({path: [[0.5, -2, 3]] * depth for path, (depth, *_) in SHAPES.items()})
    total = 0.5 * basis.mix(0) - 2 * basis.mix(1) + 3 * basis.mix(np.int32(2))
    for path in SHAPES:
        np.testing.assert_array_equal(total.coefficients[path], mix.coefficients[path])


def test_a_mix_can_not_be_changed(basis):
    given = {path: np.ones((shape[0], 3), np.float32) for path, shape in SHAPES.items()}
    mix = basis.mix(given)
    with pytest.raises(ValueError):
        mix.coefficients["single.layer"][0, 0] = 2
    with pytest.raises(TypeError):
        mix.coefficients["single.layer"] = given["single.layer"]
    with pytest.raises(AttributeError):
        mix.basis = "another"
    given["single.layer"][:] = 5
    assert (mix.coefficients["single.layer"] == 1).all()


def test_the_update_is_linear_in_the_mix(basis, mixes):
    """The LoRA of a combination against the combination of dense updates, in float64."""
    arrays = {path: {name: np.asarray(x) for name, x in parts.items()} for path, parts in basis.to_arrays().items()}

    def dense(mix, path):
        parts = [arrays[path][name].astype(np.float64) for name in ("a", "b")]
        return np.einsum("lnir,ln,lnro->lio", parts[0], mix.coefficients[path], parts[1])

    a, b = mixes
    factors = mixed_factors(arrays, (2 * a - 0.5 * b).coefficients)
    for path in SHAPES:
        expected = 2 * dense(a, path) - 0.5 * dense(b, path)
        np.testing.assert_allclose(factors[path].a @ factors[path].b, expected, rtol=1e-5, atol=1e-5)


def test_fingerprints(basis):
    """The same wherever the same numbers are; another after the slightest training of any member, A or B."""
    arrays = {path: {name: np.array(x) for name, x in parts.items()} for path, parts in basis.to_arrays().items()}
    same = {path: {name: x.astype(np.float64) for name, x in parts.items()} for path, parts in arrays.items()}
    assert Basis.from_arrays(CONFIG, same).fingerprint() == basis.fingerprint()
    seen = {basis.fingerprint(), a_basis(1).fingerprint()}
    for part in ("a", "b"):
        for member in range(3):
            changed = {path: parts | {part: parts[part].copy()} for path, parts in arrays.items()}
            changed["single.layer"][part][1, member] *= np.float32(1.001)
            seen.add(Basis.from_arrays(CONFIG, changed).fingerprint())
    assert len(seen) == 8


def test_two_bases_of_the_same_shapes(basis, mixes):
    other = a_basis(1).mix(0)
    with pytest.raises(UserError, match="two bases"):
        mixes[0] + other
    with pytest.raises(UserError, match="another basis"):
        basis.own(other)
    with pytest.raises(UserError, match="don't fit"):
        basis.own(Mix({"double.layer": np.ones((2, 3))}, basis.fingerprint()))
