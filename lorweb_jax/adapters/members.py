"""Members of one basis as parameters of their own, so that each is trained by itself (method.md §7).

Layers get the same stacked mixture as from any other basis, with coefficients by row: a row (1, 0) of a batch runs with
the first member, a row (0, 1) with the second, a row (0, 0) with the base alone.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import AdaptedLayer, BasisParam, FrozenBasisParam
from lorweb_jax.adapters.mixture import LowRankAdapter
from lorweb_jax.nn import sharding

Blocks = Mapping[str, tuple[int, ...]]  # {stack of blocks: indices}; a stack's name is how its layers' paths begin


class GroupOfLayers(nnx.Module):
    """A member's part of stacked layers that have one input and share their A: on the blocks `shared`, then `free`.

    shared: blocks that another member is on too; their A's a [m, i, r] are frozen. free: the others; their A's
    free_a [m', i, r] are trained. b [m + m', r, Σo] is trained; the layers' outputs follow one another.
    """

    def __init__(self, shared: tuple[int, ...], free: tuple[int, ...], rank: int, inputs: int, outputs: int):
        self.shared, self.free = shared, free

        def zeros(kind: type[nnx.Variable], *shape: int, axes: tuple[str | None, ...]) -> nnx.Variable:
            return kind(jnp.zeros(shape, jnp.float32), axes=axes)

        # Split by rank alone: the parts that q, k and v have of b are cut out of its last axis.
        self.a = zeros(FrozenBasisParam, len(shared), inputs, rank, axes=(None, "rank")) if shared else None
        self.free_a = zeros(BasisParam, len(free), inputs, rank, axes=(None, "rank")) if free else None
        self.b = zeros(BasisParam, len(shared) + len(free), rank, outputs, axes=("rank", None))

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.shared + self.free

    def stacked(self, depth: int, rank: int) -> tuple[jax.Array, jax.Array]:
        """a [l, i, r] and b [l, r, Σo] of all blocks, zero where the member has none and beyond its own rank."""
        a = jnp.concatenate([part[...] for part in (self.a, self.free_a) if part is not None])
        more = (0, rank - a.shape[2])
        a, b = jnp.pad(a, ((0, 0), (0, 0), more)), jnp.pad(self.b[...], ((0, 0), more, (0, 0)))
        if self.blocks == tuple(range(depth)):
            return a, b
        where = np.array(self.blocks)
        a, b = (jnp.zeros((depth, *part.shape[1:]), part.dtype).at[where].set(part) for part in (a, b))
        return a, b


class Members(nnx.Module):
    """Low-rank adapters by name, on the same layers of a model.

    layers: of the model, by path. groups: paths of layers that share their input and their A. ranks: {name: r}.
    blocks: {name: Blocks}. orthogonal: False makes every A free, also where members share a block. A's and B's are zero
    until `fill` gives them values.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaptedLayer],
        groups: Sequence[tuple[str, ...]],
        ranks: Mapping[str, int],
        blocks: Mapping[str, Blocks],
        orthogonal: bool = True,
    ):
        self.groups = {paths: tuple(layers[path] for path in paths) for paths in groups}
        self.names, self.rank = tuple(ranks), max(ranks.values())
        self.members = nnx.Dict({name: nnx.Dict({}) for name in ranks})
        for name, rank in ranks.items():
            for paths, parts in self.groups.items():
                stack = paths[0].partition(".")[0]
                own = blocks[name].get(stack, ())
                others = {block for other in ranks if other != name for block in blocks[other].get(stack, ())}
                shared = tuple(block for block in own if orthogonal and block in others)
                if own:
                    self.members[name][paths[0]] = GroupOfLayers(
                        shared,
                        tuple(block for block in own if block not in shared),
                        rank,
                        parts[0].inputs,
                        sum(part.outputs for part in parts),
                    )

    def parameters(self) -> dict[tuple[str, str, str], nnx.Variable]:
        """{(member, path of the first layer of a group, "a", "free_a" or "b"): its parameter}."""
        return {
            (name, path, part): getattr(group, part)
            for name, groups in self.members.items()
            for path, group in groups.items()
            for part in ("a", "free_a", "b")
            if getattr(group, part) is not None
        }

    @property
    def shared_widths(self) -> list[int]:
        """Widths of the inputs of layers whose A's are orthonormal to another member's, ascending."""
        return sorted({variable.shape[1] for (_, _, part), variable in self.parameters().items() if part == "a"})

    def adapters(self, coefficients_bn: jax.Array) -> dict[str, LowRankAdapter]:
        """What each stack of layers adds, for a row of coefficients, in the order of `names`, for each example."""
        adapters = {}
        for paths, layers in self.groups.items():
            depth, inputs = layers[0].depth, layers[0].inputs
            widths = [layer.outputs for layer in layers]
            parts = [
                self.members[name][paths[0]].stacked(depth, self.rank)
                if paths[0] in self.members[name]
                else (jnp.zeros((depth, inputs, self.rank)), jnp.zeros((depth, self.rank, sum(widths))))
                for name in self.names
            ]
            a, b = (jnp.stack(side, axis=1) for side in zip(*parts))
            c = jnp.broadcast_to(coefficients_bn, (depth, *coefficients_bn.shape))
            for path, own in zip(paths, jnp.split(b, np.cumsum(widths)[:-1], axis=-1)):
                adapters[path] = LowRankAdapter(a, own, c)
        return adapters

    def row(self, weights: Mapping[str, float], batch: int = 1) -> jax.Array:
        """Coefficients [b, n] that give each named member its weight and the others 0, the same for all examples."""
        return jnp.tile(jnp.asarray([weights.get(name, 0.0) for name in self.names], jnp.float32), (batch, 1))

    def fill(self, name: str, member: pair.Member) -> None:
        """Give the parameters of one member its numbers; it must have the same rank and blocks."""
        for paths in self.groups:
            if paths[0] in self.members[name]:
                group = self.members[name][paths[0]]
                a = member.a[paths[0]].transpose(0, 2, 1)
                b = np.concatenate([member.b[path] for path in paths], axis=-1)
                if group.a is not None:
                    group.a.set_value(jnp.asarray(a[list(group.shared)]))
                if group.free_a is not None:
                    group.free_a.set_value(jnp.asarray(a[list(group.free)]))
                group.b.set_value(jnp.asarray(b[list(group.blocks)]))

    def member(self, name: str) -> pair.Member:
        """One member as files hold it."""
        a, b, blocks = {}, {}, {}
        for paths, layers in self.groups.items():
            if paths[0] in self.members[name]:
                group = self.members[name][paths[0]]
                stacked_a, stacked_b = group.stacked(layers[0].depth, group.b.shape[1])
                cuts = np.cumsum([layer.outputs for layer in layers])[:-1]
                for path, own in zip(paths, np.split(sharding.to_host(stacked_b), cuts, axis=-1)):
                    a[path], b[path] = sharding.to_host(stacked_a).transpose(0, 2, 1), own
                    blocks[path] = tuple(sorted(group.blocks))
        return pair.Member(a, b, blocks)


def trained_part(name: str) -> nnx.filterlib.Filter:
    """The parameters of `Members` that are trained of one member."""
    return nnx.All(BasisParam, lambda path, _: _follows(path, "members", name))


def _follows(path: Sequence, first: str, second: str) -> bool:
    return any(here == first and there == second for here, there in zip(path, path[1:]))
