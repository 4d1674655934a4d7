"""An attached basis, or one mix of it, into files of other programs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.formats.basis_file import write_basis
from lorweb_jax.adapters.formats.lora_file import NAMES, TruncationError, mixed_factors, truncate, write_lora
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.outputs import require_free, told_if_unwritable
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline.arguments import RANK, as_dtype, as_path
from lorweb_jax.settings.rules import Choice, Real, as_value

_ALPHA = Real(0, 1e6, above=True)


def save_basis(basis: Basis, path: str | Path, source: Path | None, dtype: str) -> None:
    """See Pipeline.save_basis. source: what the basis was read from, which is never replaced."""
    path, dtype = _target(path, source), as_dtype(dtype)
    arrays = _arrays(basis)
    if jax.process_index() == 0:
        with told_if_unwritable(path):
            write_basis(path, basis.config, arrays, dtype)


def save_lora(
    basis: Basis,
    mix: Mix,
    layers: Mapping[str, tuple[int, int, int]],
    path: str | Path,
    source: Path | None,
    *,
    rank: int | None,
    dtype: str,
    alpha: bool | float,
    names: str,
) -> TruncationError | None:
    """See Pipeline.save_lora. layers: {path: (l, i, o)} of the transformer. source: as in save_basis."""
    path, dtype = _target(path, source), as_dtype(dtype)
    mix = basis.own(mix)
    if rank is not None:
        rank = as_value(rank, "the rank", RANK)
    names = as_value(names, "names", Choice(NAMES))
    alpha = alpha if isinstance(alpha, bool) else as_value(alpha, "alpha", _ALPHA)
    factors, error = mixed_factors(_arrays(basis), mix.coefficients, basis.config.scale), None
    if rank is not None:
        factors, error = truncate(factors, rank)
    with told_if_unwritable(path):
        write_lora(path, factors, dtype, alpha, names, layers)
    return error


def mix_as_member(basis: Basis, mix: Mix) -> pair.Member:
    """One mix as an adapter of rank n·r, exactly."""
    factors = mixed_factors(_arrays(basis), basis.own(mix).coefficients, basis.config.scale)
    return pair.Member(
        {path: a.transpose(0, 2, 1) for path, (a, _) in factors.items()},
        {path: b for path, (_, b) in factors.items()},
        {path: tuple(range(len(a))) for path, (a, _) in factors.items()},
    )


def _target(path: Any, source: Path | None) -> Path:
    """A .safetensors file to write, which may replace another one but not what the basis was read from."""
    path = as_path(path, "the file", ".safetensors")
    require_free(path, [source] if source else [], overwrite=True)
    return path


def _arrays(basis: Basis) -> dict[str, dict[str, np.ndarray]]:
    return {path: {name: to_host(array) for name, array in parts.items()} for path, parts in basis.to_arrays().items()}
