"""What a basis is made of. Nothing here imports jax, so that config files may."""

import dataclasses
import math
from typing import TYPE_CHECKING

from lorweb_jax.common.errors import UserError
from lorweb_jax.settings.fields import BASIS, INTERNAL_MODES
from lorweb_jax.settings.rules import Real, Whole, shown

if TYPE_CHECKING:
    from lorweb_jax.adapters.coefficients import Coefficients

# A file's basis may be larger than one that a config asks for; the words are the same.
_RULES = {
    **{
        name: BASIS[f"basis.{name}"]
        for name in (
            *("activation", "reduction", "pooling", "query", "projection"),
            *("normalised", "temperature", "temperature_mode", "key_scale"),
        )
    },
    **{name: Whole(1, 65_536) for name in ("size", "rank", "key_dim", "heads")},
    "query_dim": Whole(1, 2**31, also=(None,)),
    "scale": Real(-1e6, 1e6),
}


@dataclasses.dataclass(frozen=True)
class BasisConfig:
    """The sizes of a basis, what decides its coefficients, and what of it is trained. The defaults are the paper's.

    size: n, members of the basis. rank: r of each. key_dim: k. heads: h, a divisor of k.
    activation, reduction: see router.Router.
    query: "external" (an image encoder's embeddings, width query_dim), "internal" (the layer's own input), or
      "fixed" (no router: rows of `table`).
    query_mode: which images or tokens the query is made of. pooling: "avg" or "max", of an internal query.
    projection: "linear" [k, q], or "none", where the query's width must equal k.
    scale: alpha / r, what the sum over members is multiplied by.
    normalised, temperature: see router.Router. temperature_mode: "fixed"; "learnt", one number a layer that begins at
      `temperature`; or "annealed" while training, from `temperature` to 1, which it is afterwards. key_scale: standard
      deviation of fresh keys. The published recipe has none of these, the published format no place for normalised.
    encoder: which image encoder makes the external query, a name or a folder; "" if unknown. encoder_sketch: of its
      weights (models/image_encoder/identity.py), or "".
    table: rows of fixed coefficients by name, {name: n numbers}, such as {"content": (1, 0), "style": (0, 1)}; the
      first one is the default. Empty: one row "all" of ones, so that the basis is an ordinary LoRA of rank n·r.
    frozen: which of "a" and "b" are not trained (FrozenBasisParam).
    appended: adapters that the basis took up (adapters/append.py), its last members: {name: how many}. The router has
      no keys for them.
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
    normalised: bool = False
    temperature: float = 1.0
    temperature_mode: str = "fixed"
    key_scale: float = 1.0
    encoder: str = ""
    encoder_sketch: str = ""
    table: tuple[tuple[str, tuple[float, ...]], ...] = ()
    frozen: tuple[str, ...] = ()
    appended: tuple[tuple[str, int], ...] = ()

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
        # As tuples, whatever they were given as: a config is hashed.
        object.__setattr__(self, "table", self._checked_table())
        object.__setattr__(self, "frozen", self._checked_frozen())
        object.__setattr__(self, "appended", self._checked_appended())

    def _checked_table(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        try:
            table = {name: tuple(map(float, row)) for name, row in dict(self.table).items()}
        except (TypeError, ValueError):
            table = {None: ()}
        if not all(
            isinstance(name, str) and name and len(row) == self.size and all(map(math.isfinite, row))
            for name, row in table.items()
        ):
            raise UserError(
                f"basis.table is {shown(self.table)}; give rows of {self.size} finite numbers by name, such as "
                '{"style": (0, 1)}',
                2,
            )
        if table and self.query != "fixed":
            raise UserError(
                f'basis.table is of use to fixed coefficients alone, but basis.query is "{self.query}"; '
                'set that to "fixed"',
                2,
            )
        return tuple(table.items())

    def _checked_frozen(self) -> tuple[str, ...]:
        if not isinstance(self.frozen, (str, tuple, list)) or not all(part in ("a", "b") for part in self.frozen):
            raise UserError(f'basis.frozen is {shown(self.frozen)}; give none, one or both of "a" and "b"', 2)
        return tuple(sorted(set(self.frozen)))

    def _checked_appended(self) -> tuple[tuple[str, int], ...]:
        try:
            appended = dict(self.appended)
        except (TypeError, ValueError):
            appended = {None: 0}
        counts = Whole(1, self.size)
        if (
            not all(isinstance(name, str) and name and counts.takes(count) for name, count in appended.items())
            or sum(appended.values()) >= self.size
        ):
            raise UserError(
                f"basis.appended is {shown(self.appended)}; give numbers of members by name, fewer in all than the "
                f"{self.size} of the basis",
                2,
            )
        return tuple(appended.items())

    @property
    def own(self) -> int:
        """How many members are the basis's own: those that a router has keys for."""
        return self.size - sum(count for _, count in self.appended)

    def members(self, name: str) -> range | None:
        """The members that an appended adapter takes, None if there is none of this name."""
        first = self.own
        for each, count in self.appended:
            if each == name:
                return range(first, first + count)
            first += count
        return None

    @property
    def rows(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        """The table of fixed coefficients, the default one where none was given; empty where there is a router."""
        if self.query != "fixed":
            return ()
        return self.table or (("all", (1.0,) * self.own + (0.0,) * (self.size - self.own)),)

    @property
    def coefficients(self) -> "Coefficients":
        """What decides the coefficients: Routed, Internal or Fixed."""
        from lorweb_jax.adapters.coefficients import Fixed, Internal, Routed
        from lorweb_jax.adapters.router import Router

        if self.query == "fixed":
            return Fixed(self.rows)
        temperature = self.temperature if self.temperature_mode == "fixed" else 1.0
        router = Router(self.heads, self.activation, self.reduction, self.normalised, temperature)
        if self.query == "internal":
            return Internal(router, self.query_mode, self.pooling)
        return Routed(router, self.query_mode, self.query_dim)
