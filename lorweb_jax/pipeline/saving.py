"""An attached basis, or one mix of it, into files of other programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import AdaptedLayer, Basis
from lorweb_jax.adapters.formats.basis_file import write_basis
from lorweb_jax.adapters.formats.lora_file import (
    NAMES,
    TruncationError,
    factors_of,
    mixed_factors,
    truncate,
    write_lora,
)
from lorweb_jax.adapters.formats.mix_file import write_mix
from lorweb_jax.adapters.formats.pair_file import write_member
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import require_free, told_if_unwritable
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline.arguments import RANK, as_dtype, as_path
from lorweb_jax.settings.rules import Choice, Real, as_value
from lorweb_jax.settings.texts import as_text

PUBLISHED = "published"  # names of Pair Customization's own format
WORDS = "style_words"  # in the header of a LoRA that is a style
ROLE = "adapter"  # in the header of a LoRA that is a content adapter: "content"
_ALPHA = Real(0, 1e6, above=True)


def save_basis(basis: Basis, path: str | Path, source: Path | None, dtype: str) -> None:
    """See Pipeline.save_basis. source: what the basis was read from, which is never replaced."""
    path, dtype = _target(path, source), as_dtype(dtype)
    arrays = arrays_of(basis)
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
    factors, error = mixed_factors(arrays_of(basis), mix.coefficients, basis.config.scale), None
    if rank is not None:
        factors, error = truncate(factors, rank)
    with told_if_unwritable(path):
        write_lora(path, factors, dtype, alpha, names, layers)
    return error


def save_mix(
    basis: Basis, path: str | Path, mix: Mix, source: Path | None, prompt: str, pictures: Sequence[tuple[str, str]]
) -> None:
    """See Pipeline.save_mix. source: as in save_basis."""
    path, mix = _target(path, source), basis.own(mix)
    names = [(as_text(a, "a picture's name"), as_text(a2, "a picture's name")) for a, a2 in pictures]
    write_mix(path, mix, as_text(prompt, "the prompt"), names)


def save_member(
    path: Path,
    member: pair.Member,
    layers: Mapping[str, AdaptedLayer],
    *,
    names: str,
    dtype: Any = np.float32,
    rank: int | None = None,
    alpha: bool | float = False,
    words: str = "",
    role: str = "style",
) -> TruncationError | None:
    """An adapter as an ordinary LoRA, or with names PUBLISHED in Pair Customization's own format.

    words: the style's, which go into an ordinary LoRA's header. role: "content" goes there too, so that the file isn't
    taken for a style. Returns the error of a lower rank. Raises UserError where the published format can't hold the
    adapter.
    """
    error, blocks = None, member.blocks
    if names == PUBLISHED:
        if alpha or words:
            raise UserError("the published format has no place for an alpha or for words; leave them out", 2)
        if rank is not None:
            raise UserError(
                "the nearest update of a lower rank has no A that q, k and v share, as the published format asks for; "
                "leave the rank out, or write an ordinary LoRA",
                2,
            )
        with told_if_unwritable(path):
            write_member(path, member, dtype)
        return None
    factors = factors_of(member)
    if rank is not None:
        factors, error = truncate(factors, rank)
    header = ({WORDS: words} if words else {}) | ({ROLE: role} if role == "content" else {})
    with told_if_unwritable(path):
        write_lora(path, factors, dtype, alpha, names, layers, blocks, header or None)
    return error


def save_styles(
    styles: Sequence[Any],
    layers: Mapping[str, AdaptedLayer],
    path: str | Path,
    inputs: Sequence[Path],
    *,
    names: str,
    rank: int | None,
    dtype: str,
    alpha: bool | float,
) -> TruncationError | None:
    """See Pipeline.save_style. inputs: files and folders that are never replaced. The words of a single style stay with
    it."""
    if not styles:
        raise UserError("there is no style to save; give one of `Pipeline.style`")
    member = pair.summed([style.member for style in styles], [style.weight for style in styles])
    names = as_value(names, "names", Choice((*NAMES, PUBLISHED)))
    return save_member(
        _target(path, *inputs),
        member,
        layers,
        names=names,
        dtype=as_dtype(dtype),
        rank=None if rank is None else as_value(rank, "the rank", RANK),
        alpha=alpha if isinstance(alpha, bool) else as_value(alpha, "alpha", _ALPHA),
        words=styles[0].words if len(styles) == 1 and names != PUBLISHED else "",
    )


def mix_as_member(basis: Basis, mix: Mix) -> pair.Member:
    """One mix as an adapter of rank n·r, exactly."""
    factors = mixed_factors(arrays_of(basis), basis.own(mix).coefficients, basis.config.scale)
    return pair.Member(
        {path: a.transpose(0, 2, 1) for path, (a, _) in factors.items()},
        {path: b for path, (_, b) in factors.items()},
        {path: tuple(range(len(a))) for path, (a, _) in factors.items()},
    )


def _target(path: Any, *sources: Path | None) -> Path:
    """A .safetensors file to write, which may replace another one but not what basis and styles were read from."""
    path = as_path(path, "the file", ".safetensors")
    require_free(path, [source for source in sources if source], overwrite=True)
    return path


def arrays_of(basis: Basis) -> dict[str, dict[str, np.ndarray]]:
    """`Basis.to_arrays` in numpy."""
    return {path: {name: to_host(array) for name, array in parts.items()} for path, parts in basis.to_arrays().items()}
