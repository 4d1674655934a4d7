"""One mix of a basis as an ordinary LoRA, y = W x + (alpha / R) · B A x: in full or at a lower rank, and written.

diffusers' names are `transformer.<layer>.lora_A.weight [R,i]`, `.lora_B.weight [o,R]` and, for tools that want it,
`.alpha`; lora_names.py has the others'. lora_read.py reads such files.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.adapters.basis import AdaptedLayer
from lorweb_jax.adapters.formats import lora_names
from lorweb_jax.adapters.formats.layer_names import layer_name
from lorweb_jax.adapters.pair import Member
from lorweb_jax.common.errors import UserError
from lorweb_jax.files.safetensors_io import write

NAMES = ("diffusers", "kohya", "comfyui")


class Factors(NamedTuple):
    """A stack's update Δ[l] = a[l] b[l]: a [l, i, R], b [l, R, o], float32."""

    a: np.ndarray
    b: np.ndarray


class TruncationError(NamedTuple):
    """Relative Frobenius errors of a truncation: overall (over all layers together), and by layer name."""

    overall: float
    layers: dict[str, float]


def mixed_factors(
    arrays: Mapping[str, Mapping[str, Any]], coeffs: Mapping[str, Any], scale: float = 1.0
) -> dict[str, Factors]:
    """One analogy's mix as a LoRA of rank n·r, exactly: Δ = scale · Σ_n c_n A_n B_n.

    arrays: {path: {"a" [l,n,i,r], "b" [l,n,r,o]}}; coeffs: {path: c [l, n]}. Coefficients and scale go into b, so
    that a is the basis's own and the same for every analogy.
    """
    factors = {}
    for path, parts in arrays.items():
        a, b, c = (np.asarray(x, np.float32) for x in (parts["a"], parts["b"], coeffs[path]))
        l, n, i, r = a.shape
        if c.shape != (l, n):
            raise UserError(
                f"the coefficients of {path} are {list(c.shape)}, expected {[l, n]} for one analogy; "
                "give the coefficients of this basis for one analogy"
            )
        weighted = b * (np.float32(scale) * c)[:, :, None, None]
        factors[path] = Factors(a.transpose(0, 2, 1, 3).reshape(l, i, n * r), weighted.reshape(l, n * r, -1))
    return factors


def factors_of(member: Member) -> dict[str, Factors]:
    """The update of an adapter as a LoRA."""
    return {path: Factors(a.transpose(0, 2, 1), member.b[path]) for path, a in member.a.items()}


def truncate(factors: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], TruncationError]:
    """The nearest update of at most `rank` in every layer (Eckart–Young), and what that loses.

    The SVD is of the product of the two factors' triangular parts [R, R]; [i, o] is never formed. Singular values are
    shared out evenly between a and b. Raises UserError unless 1 <= rank <= R.
    """
    full = max(a.shape[2] for a, _ in factors.values())
    if not 1 <= rank <= full:
        raise UserError(f"rank is {rank}; it must be from 1 to {full}, the mix's full rank")
    cut, errors = {}, {}
    lost_total = norm_total = 0.0
    for path, (a, b) in factors.items():
        pairs = []
        for block in range(a.shape[0]):
            u, s, vt = _svd_of_product(a[block], b[block])
            root = np.sqrt(s[:rank])
            pairs.append((_pad(u[:, :rank] * root, rank, 1), _pad(root[:, None] * vt[:rank], rank, 0)))
            lost, norm = np.square(s[rank:]).sum(), np.square(s).sum()
            errors[layer_name(path, block)] = float(np.sqrt(lost / norm)) if norm > 0 else 0.0
            lost_total, norm_total = lost_total + lost, norm_total + norm
        cut[path] = Factors(*(np.stack(side).astype(np.float32) for side in zip(*pairs)))
    return cut, TruncationError(float(np.sqrt(lost_total / norm_total)) if norm_total > 0 else 0.0, errors)


def _svd_of_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SVD of a b for a [i, R], b [R, o] with R small, in float64: u [i, m], s [m], vt [m, o]."""
    q_a, r_a = np.linalg.qr(a.astype(np.float64))
    q_b, r_b = np.linalg.qr(b.astype(np.float64).T)
    u, s, vt = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    return q_a @ u, s, vt @ q_b.T


def _pad(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Zeros appended, where a layer is narrower than the rank asked for."""
    widths = [(0, size - n) if k == axis else (0, 0) for k, n in enumerate(array.shape)]
    return np.pad(array, widths)


def write_lora(
    path: str | Path,
    factors: Mapping[str, Factors],
    dtype: Any = np.float32,
    alpha: bool | float = False,
    names: str = "diffusers",
    layers: Mapping[str, AdaptedLayer] | None = None,
    blocks: Mapping[str, Collection[int]] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write an ordinary LoRA in `dtype`.

    alpha: True stores alpha = R with every layer; a number stores that and divides B by alpha / R, so that the update
    stays the same. kohya's names always have an alpha. names: one of NAMES. In kohya's and ComfyUI's, layers are fused
    as in Black Forest Labs' files; layers, of the model by path, tells the widths of parts without an update.
    blocks: {path: those with an update}, where others are left out, and so are zero ranks. notes: for the header.
    Raises UserError for numbers beyond the range of `dtype`, and for an alpha that leaves B no precision in it.
    """
    if names not in NAMES:
        raise UserError(f"the names are {names!r}; choose one of {', '.join(NAMES)}", 2)
    ending = (".lora_A.weight", ".lora_B.weight") if names == "diffusers" else (".lora_down.weight", ".lora_up.weight")
    alpha = alpha or names == "kohya"
    tensors = {}
    for name, a, b in _named(factors, names, layers or {}, blocks):
        stored = a.shape[1] if alpha is True else float(alpha)
        with np.errstate(over="ignore"):  # `write` refuses what isn't finite
            tensors[name + ending[0]] = a.T.astype(dtype)
            tensors[name + ending[1]] = (b.T * np.float32(a.shape[1] / stored if alpha else 1.0)).astype(dtype)
            if alpha:
                tensors[f"{name}.alpha"] = np.asarray(stored, dtype)
    _require_precision(tensors, alpha, dtype)
    write(path, tensors, {"format": "pt", **(notes or {})})


def _require_precision(tensors: Mapping[str, np.ndarray], alpha: bool | float, dtype: Any) -> None:
    """UserError where an alpha has made all of a layer's B smaller than what `dtype` keeps with full precision."""
    if isinstance(alpha, bool):  # B is as the basis has it
        return
    smallest = float(np.finfo(dtype).tiny)
    for name, values in tensors.items():
        largest = 0.0 if name.endswith(".alpha") else float(np.abs(values).max(initial=0.0))
        if 0 < largest < smallest:
            raise UserError(
                f"with alpha {alpha:g} the largest number of {name} is {largest:.1e}, below what "
                f"{np.dtype(dtype).name} keeps with full precision ({smallest:.1e}); give a smaller alpha",
                2,
            )


def _named(
    factors: Mapping[str, Factors],
    names: str,
    layers: Mapping[str, AdaptedLayer],
    blocks: Mapping[str, Collection[int]] | None,
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(layer's name in the file, a [i, R], b [R, o]) of every layer that has an update."""

    def update(path: str, block: int) -> tuple[np.ndarray, np.ndarray] | None:
        if path not in factors or blocks is not None and block not in blocks[path]:
            return None
        a, b = factors[path].a[block], factors[path].b[block]
        return (a, b) if blocks is None else _without_zero_ranks(a, b)

    if names == "diffusers":
        for stack, (a, _) in factors.items():
            for block in range(len(a)):
                if (own := update(stack, block)) is not None:
                    yield "transformer." + layer_name(stack, block), *own
        return
    for name, parts in lora_names.fused(factors):
        for block in range(next(factors[part].a.shape[0] for part in parts if part in factors)):
            own = [update(part, block) for part in parts]
            if all(part is None for part in own):
                continue
            where = name.replace("{l}", str(block))
            yield (
                f"lora_unet_{where.replace('.', '_')}" if names == "kohya" else f"diffusion_model.{where}",
                *_fused(own, [_width(part, factors, layers) for part in parts]),
            )


def _without_zero_ranks(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same update of a [i, R] and b [R, o] without ranks that are zero in both; at least one is kept."""
    used = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
    used = used if used.size else np.array([0])
    return (a, b) if used.size == a.shape[1] else (a[:, used], b[used])


def _width(path: str, factors: Mapping[str, Factors], layers: Mapping[str, AdaptedLayer]) -> int:
    if path in factors:
        return factors[path].b.shape[2]
    if path not in layers:
        raise UserError(f"{path} has no update, and its width isn't known; name the model, or write diffusers' names")
    return layers[path].outputs


def _fused(parts: list[tuple[np.ndarray, np.ndarray] | None], widths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Layers side by side as one: a [i, R] of all different A's, b [R, Σ o] with zeros where one isn't asked."""
    sides: list[np.ndarray] = []
    rows: list[list[np.ndarray]] = []
    for place, part in enumerate(parts):
        if part is None:
            continue
        a, b = part
        number = next((k for k, side in enumerate(sides) if np.array_equal(side, a)), len(sides))
        if number == len(sides):
            sides.append(a)
            rows.append([np.zeros((a.shape[1], width), b.dtype) for width in widths])
        rows[number][place] = b
    return np.concatenate(sides, axis=1), np.concatenate([np.concatenate(row, axis=1) for row in rows])
