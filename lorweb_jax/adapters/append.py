"""Adapters that a basis takes up as members of its own, such as a style that was learned elsewhere."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorweb_jax.adapters.basis import AdaptedLayer
from lorweb_jax.adapters.config import BasisConfig
from lorweb_jax.adapters.pair import Member
from lorweb_jax.common.errors import UserError

Arrays = Mapping[str, Mapping[str, Any]]


def append(
    config: BasisConfig, arrays: Arrays, members: Mapping[str, Member], layers: Mapping[str, AdaptedLayer]
) -> tuple[BasisConfig, dict[str, dict[str, np.ndarray]]]:
    """A basis with more members, by name: (config, arrays), as `Basis.from_arrays` takes them.

    The update of a layer becomes scale · Σ_n c_n A_n B_n + Σ_name w_name A_name B_name. The router has no keys for the
    appended members: its coefficients stay what they were, softmax included, and w is 0 unless a mix names one
    (`Basis.mix`). An adapter of rank R takes ⌈R / r⌉ members of the basis's rank r, all with the coefficient w.
    layers: of the model, by path; those that only an adapter has get a basis of zeros.
    Raises UserError for a name that is taken, and for a basis whose layers choose their own coefficients, where no mix
    could name a member.
    """
    if not config.coefficients.in_advance:
        raise UserError(
            "the layers of this basis choose their own coefficients (an internal query), so that no mix could name an "
            "appended member; guide its edits by the style instead (python -m lorweb_jax.stylize --basis)"
        )
    taken = dict(config.rows + config.appended)
    for name, member in members.items():
        if name in taken:
            raise UserError(f"the basis has a member or a mix {name} already; give another name", 2)
        config, arrays = _appended(config, arrays, name, member, layers)
    return config, {path: dict(parts) for path, parts in arrays.items()}


def _appended(
    config: BasisConfig, arrays: Arrays, name: str, member: Member, layers: Mapping[str, AdaptedLayer]
) -> tuple[BasisConfig, Arrays]:
    count = -(-member.rank // config.rank)
    joined = {}
    for path in dict.fromkeys([*arrays, *member.a]):
        parts = arrays.get(path) or _zeros(config, arrays, layers[path])
        l, _, i, r = parts["a"].shape
        a, b = np.zeros((l, count * r, i), np.float32), np.zeros((l, count * r, parts["b"].shape[3]), np.float32)
        if path in member.a:
            a[:, : member.rank], b[:, : member.rank] = member.a[path], member.b[path] / np.float32(config.scale)
        more = {"a": a.reshape(l, count, r, i).transpose(0, 1, 3, 2), "b": b.reshape(l, count, r, -1)}
        joined[path] = {**parts, **{side: np.concatenate([parts[side], more[side]], axis=1) for side in more}}
    return (
        dataclasses.replace(
            config,
            size=config.size + count,
            table={row: (*numbers, *(0.0,) * count) for row, numbers in config.rows},
            appended=(*config.appended, (name, count)),
        ),
        joined,
    )


def _zeros(config: BasisConfig, arrays: Arrays, layer: AdaptedLayer) -> dict[str, np.ndarray]:
    """A layer's part of a basis whose members do nothing there."""
    zeros = {
        "a": np.zeros((layer.depth, config.size, layer.inputs, config.rank), np.float32),
        "b": np.zeros((layer.depth, config.size, config.rank, layer.outputs), np.float32),
    }
    example = next(iter(arrays.values()))
    for part in ("keys", "projection", "log_temperature"):
        if part in example:
            zeros[part] = np.zeros((layer.depth, *example[part].shape[1:]), np.float32)
    return zeros
