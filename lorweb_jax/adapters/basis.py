"""A learned basis of low-rank updates for stacks of linear layers, and the router's parameters (method.md §3)."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.adapters.coefficients import Fixed, Internal, Routed, RouterParameters
from lorweb_jax.adapters.config import BasisConfig
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.adapters.mixture import LowRankAdapter, RoutedAdapter
from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import sharding
from lorweb_jax.settings.rules import Whole, as_value, shown


class BasisParam(nnx.Param):
    """A trained parameter of a basis or its router: the one type for gradient, optimizer, checkpoint and export."""


class FrozenBasisParam(nnx.Variable):
    """A parameter of a basis that isn't trained. It is no weight of the base model: it is kept in float32 whatever
    dtype those are stored in, and checkpoints and exports hold it, since no other file does."""


_PARAMS = (BasisParam, FrozenBasisParam)


class AdaptedLayer(Protocol):
    """A stack of equal linear layers, as a backbone's record has it (models/backbone.py): l layers from width i to o.

    role: of sharding.ROLES, how the layer and its adapter are split over devices.
    """

    @property
    def depth(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def role(self) -> str: ...


class LayerShape(NamedTuple):
    """Widths and depth of a stack of linear layers where nothing else is known of it, as from a file's arrays."""

    depth: int
    inputs: int
    outputs: int
    role: str = "any"


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class LayerBasis(nnx.Module):
    """The basis of one stack of linear layers: a [l, n, i, r], b [l, n, r, o], keys [l, n, k], projection [l, k, q],
    and log_temperature [l] where that is learnt.

    keys, projection and log_temperature are None without a router. A member of lower rank than r has zero columns of A
    and rows of B, one that adapts only some blocks has zeros for the others.
    """

    def __init__(self, config: BasisConfig, shape: AdaptedLayer, *, rngs: nnx.Rngs):
        n, r, k = config.size, config.rank, config.key_dim
        depth, inputs, axes = shape.depth, shape.inputs, sharding.basis_axes(shape.role)
        kinds = {part: FrozenBasisParam if part in config.frozen else BasisParam for part in ("a", "b")}
        # PyTorch's Kaiming rule reads [n, i, r] as a convolution kernel: fan-in i·r.
        self.a = kinds["a"](_uniform(rngs.params(), (depth, n, inputs, r), (inputs * r) ** -0.5), axes=axes["a"])
        self.b = kinds["b"](jnp.zeros((depth, n, r, shape.outputs), jnp.float32), axes=axes["b"])
        routed, linear = config.coefficients.has_router, config.projection == "linear"
        width = config.coefficients.query_width(inputs) if routed else None
        if routed and not linear and width != k:
            raise UserError(
                f"basis.projection is none, but a query is {width} wide and key_dim is {k}; use projection linear", 2
            )
        keys = projection = log_temperature = None
        if routed:
            normal = jax.random.normal(rngs.params(), (depth, config.own, k), jnp.float32)
            keys = BasisParam(normal if config.key_scale == 1.0 else normal * config.key_scale, axes=axes["keys"])
        if routed and linear:
            projection = BasisParam(_uniform(rngs.params(), (depth, k, width), width**-0.5), axes=axes["projection"])
        if routed and config.temperature_mode == "learnt":
            start = jnp.full((depth,), math.log(config.temperature), jnp.float32)
            log_temperature = BasisParam(start, axes=())
        self.keys, self.projection, self.log_temperature = keys, projection, log_temperature

    @property
    def router(self) -> RouterParameters:
        parts = (self.keys, self.projection, self.log_temperature)
        return RouterParameters(*(None if part is None else part[...] for part in parts))


class Basis(nnx.Module):
    """A basis for several stacks of linear layers.

    `layers` gives each stack's shape by the path of its layer. The basis knows nothing else of the model: `adapters`
    returns, by the same paths, what each layer is to add.
    """

    def __init__(self, config: BasisConfig, layers: Mapping[str, AdaptedLayer], *, rngs: nnx.Rngs):
        self.config = config
        self.layers = nnx.Dict({path: LayerBasis(config, shape, rngs=rngs) for path, shape in layers.items()})

    def coefficients(
        self, query_bq: jax.Array | None = None, batch: int = 1, temperature_b: jax.Array | None = None
    ) -> dict[str, jax.Array] | None:
        """Every stack's coefficients c [l, b, n], computed once for an analogy; None where layers compute them from
        their own input (query "internal").

        query_bq: the external query [b, q] or [b, tokens, width], of use to a routed basis. batch: b, where there is no
        query. temperature_b: of a routed basis's scores, of each example, while it is annealed. Raises UserError for a
        query of the wrong width.
        """
        match self.config.coefficients:
            case Routed() as routed:
                parameters = {path: layer.router for path, layer in self.layers.items()}
                own = routed.of_stacks(parameters, query_bq, temperature_b)
                more = ((0, 0), (0, 0), (0, self.config.size - self.config.own))
                return {path: jnp.pad(c, more) for path, c in own.items()} if self.config.appended else own
            case Fixed() as fixed:
                return self._same_for_all_blocks(fixed.rows([fixed.default] * batch))
        return None

    def named(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Every stack's coefficients c [l, b, n], each example of a batch by a row of `BasisConfig.table`.

        Raises UserError for a name that the table hasn't got, and where coefficients aren't fixed.
        """
        return self._same_for_all_blocks(self._table().rows(names))

    def _table(self) -> Fixed:
        if not isinstance(self.config.coefficients, Fixed):
            raise UserError("this basis has a router and no named mixes; give a member's index, or coefficients")
        return self.config.coefficients

    def _same_for_all_blocks(self, c_bn: jax.Array) -> dict[str, jax.Array]:
        return {path: jnp.repeat(c_bn[None], layer.a.shape[0], axis=0) for path, layer in self.layers.items()}

    def adapters(self, coefficients: Mapping[str, jax.Array] | None) -> dict[str, LowRankAdapter | RoutedAdapter]:
        """The adapter of each stack of layers, for the c [l, b, n] of `coefficients` or `named`.

        coefficients: None, as `coefficients` returns it for an internal query, lets layers compute their own.
        """
        scale = self.config.scale
        if coefficients is None:
            internal = self.config.coefficients
            if not isinstance(internal, Internal):
                raise UserError("the coefficients of this basis are known in advance; give those of `coefficients`")
            return {
                path: RoutedAdapter(layer.a[...], layer.b[...], *layer.router, scale, internal)
                for path, layer in self.layers.items()
            }
        return {
            path: LowRankAdapter(layer.a[...], layer.b[...], coefficients[path], scale)
            for path, layer in self.layers.items()
        }

    def mix(self, which: int | str | Mapping[str, Any]) -> Mix:
        """A mix of this basis: a member by its index, counted from 0; a row of `BasisConfig.table` or an appended
        adapter by its name; or given coefficients {path: c [l, n]}.

        Raises UserError for an index or name that there isn't, and for coefficients of other paths or shapes.
        """
        if not isinstance(which, Mapping):
            if isinstance(which, str):
                row = self._named_row(which)
            else:
                row = np.eye(self.config.size)[as_value(which, "the member", Whole(0, self.config.size - 1))]
            which = {path: np.tile(row, (layer.a.shape[0], 1)) for path, layer in self.layers.items()}
        return self._fitting(Mix(which, self.fingerprint()))

    def _named_row(self, name: str) -> np.ndarray:
        if (members := self.config.members(name)) is not None:
            return np.isin(np.arange(self.config.size), members).astype(np.float32)
        if self.config.appended and name not in dict(self.config.rows):
            there = [each for each, _ in (*self.config.rows, *self.config.appended)]
            raise UserError(f"there is no mix {shown(name)} in this basis; it has {', '.join(there)}")
        return np.asarray(self._table().rows([name]))[0]

    def own(self, mix: Mix) -> Mix:
        """The mix itself; UserError unless it is one of this basis."""
        if not isinstance(mix, Mix):
            raise UserError(f"the mix is {shown(mix)}; make one by a pipeline's `coefficients` or `mix`")
        if mix.basis != (own := self.fingerprint()):
            raise UserError(
                f"the mix belongs to another basis ({mix.basis}, this one is {own}); make it by the `coefficients` or "
                "`mix` of the pipeline that it is for"
            )
        return self._fitting(mix)

    def _fitting(self, mix: Mix) -> Mix:
        shapes = {path: (layer.a.shape[0], self.config.size) for path, layer in self.layers.items()}
        for path, shape in shapes.items():
            actual = mix.coefficients[path].shape if path in mix.coefficients else None
            if actual != shape:
                raise UserError(
                    f"the coefficients don't fit the basis: of {path} there are {list(actual) if actual else 'none'}, "
                    f"{list(shape)} were expected; give all {len(shapes)} paths, as in `Mix.coefficients`"
                )
        if more := mix.coefficients.keys() - shapes.keys():
            raise UserError(
                f"the coefficients don't fit the basis, which has no {min(map(str, more))}; give its {len(shapes)} "
                "paths, as in `Mix.coefficients`"
            )
        return mix

    def fingerprint(self) -> str:
        """A short hash of a sample of each member's A and B in every layer; any training changes it.

        A basis keeps its fingerprint through files in float32. Rounded to another dtype it counts as another basis.
        """
        digest = hashlib.sha256()
        arrays = {path: {"a": layer.a[...], "b": layer.b[...]} for path, layer in self.layers.items()}
        for path, samples in sorted(_samples(arrays).items()):
            digest.update(f"{path} {[array.shape for array in arrays[path].values()]}".encode())
            for values in samples:
                digest.update(sharding.to_host(values).tobytes())
        return digest.hexdigest()[:16]

    def to_arrays(self) -> dict[str, dict[str, jax.Array]]:
        """{path: {"a", "b", "keys", "projection", "log_temperature"}}, what runs hold; absent parts are left out."""
        return {
            path: {name: param[...] for name, param in vars(layer).items() if isinstance(param, _PARAMS)}
            for path, layer in self.layers.items()
        }

    @classmethod
    def from_arrays(cls, config: BasisConfig, arrays: Mapping[str, Mapping[str, Any]]) -> "Basis":
        """A basis with these values; shapes come from the arrays, dtypes are kept, but float32 for what is frozen.

        Raises UserError for parts that are missing, of other axes or not as the config says.
        """
        if not isinstance(config, BasisConfig) or not isinstance(arrays, Mapping) or not arrays:
            raise UserError(
                'a basis is made of a BasisConfig and {path: {"a", "b", "keys", "projection"}} of at '
                "least one layer; give these"
            )
        for path, parts in arrays.items():
            ranks = [getattr(parts.get(name), "ndim", None) for name in "ab"] if isinstance(parts, Mapping) else []
            if ranks != [4, 4]:
                raise UserError(f"the basis of {path} has no arrays a [l, n, i, r] and b [l, n, r, o]; give both")
        shapes = {
            path: LayerShape(parts["a"].shape[0], parts["a"].shape[2], parts["b"].shape[3])
            for path, parts in arrays.items()
        }
        basis = nnx.eval_shape(lambda: cls(config, shapes, rngs=nnx.Rngs(0)))
        for path, parts in arrays.items():
            layer = basis.layers[path]
            for name, param in vars(layer).items():
                if isinstance(param, _PARAMS):
                    if name not in parts or tuple(parts[name].shape) != tuple(param.shape):
                        actual = tuple(parts[name].shape) if name in parts else "nothing"
                        raise UserError(
                            f"the basis of {path} has {actual} as {name}; its config asks for "
                            f"{tuple(param.shape)}; use the config that belongs to this file"
                        )
                    dtype = jnp.float32 if isinstance(param, FrozenBasisParam) else None
                    param.set_value(jnp.asarray(parts[name], dtype))
        return basis


@jax.jit
def _samples(arrays: dict[str, dict[str, jax.Array]]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of every A_n the middle row and of every B_n the middle column, both [l, n, r] in float32."""

    def middle(a, b):
        return a[:, :, a.shape[2] // 2].astype(jnp.float32), b[..., b.shape[3] // 2].astype(jnp.float32)

    return {path: middle(**parts) for path, parts in arrays.items()}
