"""A learned basis of low-rank updates for stacks of linear layers, and the router's parameters (method.md §3)."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.adapters.mix import Mix
from lorweb_jax.adapters.mixture import LowRankMix, RoutedMix
from lorweb_jax.adapters.router import coefficients
from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import sharding
from lorweb_jax.settings.fields import BASIS, INTERNAL_MODES, Real, Whole, as_value, shown

# A file's basis may be larger than one that a config asks for; the words are the same.
_RULES = {
    **{name: BASIS[f"basis.{name}"] for name in ("activation", "reduction", "pooling", "query", "projection")},
    **{name: Whole(1, 65_536) for name in ("size", "rank", "key_dim", "heads")},
    "query_dim": Whole(1, 2**31, also=(None,)),
    "scale": Real(-1e6, 1e6),
}


class BasisParam(nnx.Param):
    """A trainable of the basis or its router: the one type that gradient, optimizer, checkpoint and export name."""


@dataclasses.dataclass(frozen=True)
class BasisConfig:
    """What a basis is made of.

    size: n, members of the basis. rank: r of each. key_dim: k. heads: h, a divisor of k.
    query: "external" (an image encoder's embeddings, width query_dim), "internal" (the layer's own input), or
      "fixed" (every coefficient 1: an ordinary LoRA of rank n·r).
    query_mode: which images or tokens the query is made of. pooling: of an internal query.
    projection: "linear" [k, q], or "none", where the query's width must equal k.
    scale: alpha / r. encoder: which image encoder makes the external query, a name or a folder; "" if that isn't
      said. encoder_sketch: of its weights (models/image_encoder/identity.py), or "".
    """

    size: int = 32
    rank: int = 4
    key_dim: int = 128
    heads: int = 1
    activation: str = "softmax"
    reduction: str = "mean"
    query: str = "external"
    query_mode: str = "cat-aa'b"
    pooling: str = "avg"
    projection: str = "linear"
    query_dim: int | None = 2304
    scale: float = 1.0
    encoder: str = ""
    encoder_sketch: str = ""

    def __post_init__(self):
        for name, rule in _RULES.items():
            if not rule.takes(getattr(self, name)):
                raise UserError(f"basis.{name} is {shown(getattr(self, name))}; give {rule}", 2)
        if self.key_dim % self.heads:
            raise UserError(
                f"basis.key_dim {self.key_dim} can't be shared by {self.heads} heads; choose a number of "
                "heads that divides it",
                2,
            )
        if self.query == "internal" and self.query_mode not in INTERNAL_MODES:
            raise UserError(
                f"basis.query_mode is {self.query_mode!r}; an internal query takes one of {', '.join(INTERNAL_MODES)}",
                2,
            )

    @property
    def routed(self) -> bool:
        return self.query != "fixed"


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class LayerBasis(nnx.Module):
    """The basis of one stack of linear layers: a [l, n, i, r], b [l, n, r, o], keys [l, n, k], projection [l, k, q]."""

    def __init__(self, config: BasisConfig, depth: int, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        n, r, k = config.size, config.rank, config.key_dim
        # PyTorch's Kaiming rule reads [n, i, r] as a convolution kernel: fan-in i·r.
        self.a = BasisParam(_uniform(rngs.params(), (depth, n, inputs, r), (inputs * r) ** -0.5))
        self.b = BasisParam(jnp.zeros((depth, n, r, outputs), jnp.float32))
        width = inputs if config.query == "internal" else config.query_dim
        linear = config.projection == "linear"
        if config.routed and not linear and width != k:
            raise UserError(
                f"basis.projection is none, but a query is {width} wide and key_dim is {k}; use projection linear", 2
            )
        self.keys = BasisParam(jax.random.normal(rngs.params(), (depth, n, k), jnp.float32)) if config.routed else None
        self.projection = (
            BasisParam(_uniform(rngs.params(), (depth, k, width), width**-0.5)) if config.routed and linear else None
        )


class Basis(nnx.Module):
    """A basis for several stacks of linear layers.

    `layers` names each stack by the path of its layer and gives (depth, inputs, outputs). The basis knows nothing
    else of the model: `adapters` returns, by the same paths, what each layer is to add.
    """

    def __init__(self, config: BasisConfig, layers: Mapping[str, tuple[int, int, int]], *, rngs: nnx.Rngs):
        self.config = config
        self.layers = nnx.Dict({path: LayerBasis(config, *shape, rngs=rngs) for path, shape in layers.items()})

    def coefficients(self, query_bq: jax.Array | None = None, batch: int = 1) -> dict[str, jax.Array]:
        """Every layer's coefficients [l, b, n], computed once for an analogy.

        query_bq: the external query; several tokens [b, tokens, width] are flattened. Without a router (query
        "fixed") all coefficients are 1, for `batch` examples. Raises UserError for an internal query, whose
        coefficients aren't known before the layer runs, and for a query of the wrong width.
        """
        config = self.config
        if config.query == "internal":
            raise UserError(
                "this basis routes by an internal query: its coefficients depend on each layer's input "
                "and can't be computed beforehand; edit without folding"
            )
        if config.query == "fixed":
            return {
                path: jnp.ones((layer.b.shape[0], batch, config.size), jnp.float32)
                for path, layer in self.layers.items()
            }
        query_bq = query_bq.reshape(query_bq.shape[0], -1)
        if query_bq.shape[1] != config.query_dim:
            raise UserError(
                f"the query is {query_bq.shape[1]} wide and the basis expects {config.query_dim} "
                f"({config.query_mode}); use the image encoder and query mode that it was trained with"
            )

        # Rows are few, projections many: rows travel, and every device works with its share of k.
        query_bq = sharding.constrain(query_bq, "data", None)

        def one_layer(keys, projection):
            return coefficients(
                query_bq, keys, projection, heads=config.heads, activation=config.activation, reduction=config.reduction
            )

        return {
            path: sharding.constrain(
                jax.vmap(one_layer)(layer.keys[...], _value(layer.projection)), None, "batch", None
            )
            for path, layer in self.layers.items()
        }

    def adapters(self, coeffs: dict[str, jax.Array] | None = None) -> dict[str, LowRankMix | RoutedMix]:
        """What each stack of layers adds, for the coefficients [l, b, n] of `coefficients` (None: internal query)."""
        config = self.config
        if coeffs is None:
            return {
                path: RoutedMix(
                    layer.a[...],
                    layer.b[...],
                    layer.keys[...],
                    _value(layer.projection),
                    config.scale,
                    config.query_mode,
                    config.pooling,
                    config.heads,
                    config.activation,
                    config.reduction,
                )
                for path, layer in self.layers.items()
            }
        return {
            path: LowRankMix(layer.a[...], layer.b[...], coeffs[path], config.scale)
            for path, layer in self.layers.items()
        }

    def mix(self, which: int | Mapping[str, Any]) -> Mix:
        """A mix of this basis: of one member (its index, counted from 0), or of given coefficients {path: c [l, n]}.

        Raises UserError for an index beyond the members, and for coefficients of other paths or shapes.
        """
        if not isinstance(which, Mapping):
            row = np.eye(self.config.size)[as_value(which, "the member", Whole(0, self.config.size - 1))]
            which = {path: np.tile(row, (layer.a.shape[0], 1)) for path, layer in self.layers.items()}
        return self._fitting(Mix(which, self.fingerprint()))

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
            found = mix.coefficients[path].shape if path in mix.coefficients else None
            if found != shape:
                raise UserError(
                    f"the coefficients don't fit the basis: of {path} there are {list(found) if found else 'none'}, "
                    f"{list(shape)} were expected; give all {len(shapes)} paths, as in `Mix.coefficients`"
                )
        if more := mix.coefficients.keys() - shapes.keys():
            raise UserError(
                f"the coefficients don't fit the basis, which has no {min(map(str, more))}; give its {len(shapes)} "
                "paths, as in `Mix.coefficients`"
            )
        return mix

    def fingerprint(self) -> str:
        """A short hash of some numbers of every member in every layer, which no other training leaves as they are.

        A basis keeps it through files in float32; rounded to another dtype it counts as another basis.
        """
        digest = hashlib.sha256()
        arrays = {path: {"a": layer.a[...], "b": layer.b[...]} for path, layer in self.layers.items()}
        for path, samples in sorted(_samples(arrays).items()):
            digest.update(f"{path} {[array.shape for array in arrays[path].values()]}".encode())
            for values in samples:
                digest.update(sharding.to_host(values).tobytes())
        return digest.hexdigest()[:16]

    def to_arrays(self) -> dict[str, dict[str, jax.Array]]:
        """{path: {"a", "b", "keys", "projection"}}, what files hold; absent parts are left out."""
        return {
            path: {name: param[...] for name, param in vars(layer).items() if isinstance(param, BasisParam)}
            for path, layer in self.layers.items()
        }

    @classmethod
    def from_arrays(cls, config: BasisConfig, arrays: Mapping[str, Mapping[str, Any]]) -> "Basis":
        """A basis with these values; shapes come from the arrays, dtypes are kept.

        Raises UserError for parts that are missing, of other axes or not as the config says.
        """
        if not isinstance(config, BasisConfig) or not isinstance(arrays, Mapping) or not arrays:
            raise UserError(
                'a basis is made of a BasisConfig and {path: {"a", "b", "keys", "projection"}} of at '
                "least one layer; give these"
            )
        for path, parts in arrays.items():
            axes = (
                {name: getattr(parts.get(name), "ndim", None) for name in ("a", "b")}
                if isinstance(parts, Mapping)
                else {}
            )
            if axes != {"a": 4, "b": 4}:
                raise UserError(f"the basis of {path} has no arrays a [l, n, i, r] and b [l, n, r, o]; give both")
        shapes = {
            path: (parts["a"].shape[0], parts["a"].shape[2], parts["b"].shape[3]) for path, parts in arrays.items()
        }
        basis = nnx.eval_shape(lambda: cls(config, shapes, rngs=nnx.Rngs(0)))
        for path, parts in arrays.items():
            layer = basis.layers[path]
            for name, param in vars(layer).items():
                if isinstance(param, BasisParam):
                    if name not in parts or tuple(parts[name].shape) != tuple(param.shape):
                        found = tuple(parts[name].shape) if name in parts else "nothing"
                        raise UserError(
                            f"the basis of {path} has {found} as {name}; its config asks for "
                            f"{tuple(param.shape)}; use the config that belongs to this file"
                        )
                    param.set_value(jnp.asarray(parts[name]))
        return basis


@jax.jit
def _samples(arrays: dict[str, dict[str, jax.Array]]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of every A_n the middle row and of every B_n the middle column, both [l, n, r] in float32."""

    def middle(a, b):
        return a[:, :, a.shape[2] // 2].astype(jnp.float32), b[..., b.shape[3] // 2].astype(jnp.float32)

    return {path: middle(**parts) for path, parts in arrays.items()}


def _value(param: BasisParam | None) -> jax.Array | None:
    return None if param is None else param[...]
