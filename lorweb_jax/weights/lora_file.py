"""Ordinary LoRA files, as PEFT and diffusers read them: `transformer.<layer>.lora_A.weight [R,i]`,
`.lora_B.weight [o,R]` and, for tools that want it, `.alpha`. y = W x + (alpha / R) · B A x, with alpha = R if absent.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.basis.basis import BasisConfig
from lorweb_jax.errors import UserError
from lorweb_jax.weights.checkpoint import Checkpoint
from lorweb_jax.weights.layer_names import layer_name, split_layer_name
from lorweb_jax.weights.safetensors_io import write

_PREFIX = "transformer."
_KEY = re.compile(r"transformer\.(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")


class Factors(NamedTuple):
    """A stack's update Δ[l] = a[l] b[l]: a [l, i, R], b [l, R, o], float32."""

    a: np.ndarray
    b: np.ndarray


class TruncationError(NamedTuple):
    """Relative Frobenius errors of a truncation: overall (over all layers together), and by layer name."""

    overall: float
    layers: dict[str, float]


def mixed_factors(arrays: Mapping[str, Mapping[str, Any]], coeffs: Mapping[str, Any], scale: float = 1.0
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
            raise UserError(f"the coefficients of {path} are {list(c.shape)}, expected {[l, n]} for one analogy; "
                            "give the coefficients of this basis for one analogy")
        weighted = b * (np.float32(scale) * c)[:, :, None, None]
        factors[path] = Factors(a.transpose(0, 2, 1, 3).reshape(l, i, n * r), weighted.reshape(l, n * r, -1))
    return factors


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


def write_lora(path: str | Path, factors: Mapping[str, Factors], dtype: Any = np.float32,
               alpha: bool = False) -> None:
    """Write an ordinary LoRA in `dtype`; with `alpha`, alpha = R is stored with every layer."""
    tensors = {}
    for stack, (a, b) in factors.items():
        for block in range(a.shape[0]):
            name = _PREFIX + layer_name(stack, block)
            tensors[f"{name}.lora_A.weight"] = a[block].T.astype(dtype)
            tensors[f"{name}.lora_B.weight"] = b[block].T.astype(dtype)
            if alpha:
                tensors[f"{name}.alpha"] = np.asarray(a.shape[2], dtype)
    write(path, tensors, {"format": "pt"})


def read_lora(path: str | Path, layers: Mapping[str, tuple[int, int, int]]
              ) -> tuple[BasisConfig, dict[str, dict[str, np.ndarray]]]:
    """An ordinary LoRA as a basis of one member with the fixed coefficient 1: (config, {path: {"a", "b"}}).

    layers: {path: (l, i, o)} of the model. Layers of lower rank are filled up with zeros, blocks without an update
    are zero, kinds of layers without any are left out; alpha / R is multiplied into b. Raises UserError for a layer
    outside the blocks, a width that is not the model's, or keys of another format.
    """
    checkpoint = Checkpoint(path)
    found: dict[str, dict[str, np.ndarray]] = {}
    for key in checkpoint:
        match = _KEY.fullmatch(key)
        if not match or not split_layer_name(match["layer"]):
            raise UserError(f"{path} holds {key}; expected transformer.<layer>.lora_A.weight and .lora_B.weight of "
                            "layers inside the blocks: give a LoRA in diffusers' format for such layers")
        found.setdefault(match["layer"], {})[match["part"]] = checkpoint.read(key).astype(np.float32)
    if not found:
        raise UserError(f"{path} holds no tensors; give a LoRA in diffusers' format")
    for name, parts in found.items():
        _require_pair(name, parts, layers, str(path))
    rank = max(parts["lora_A.weight"].shape[0] for parts in found.values())
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for name, parts in found.items():
        stack, block = split_layer_name(name)
        depth, i, o = layers[stack]
        if stack not in arrays:
            arrays[stack] = {"a": np.zeros((depth, 1, i, rank), np.float32),
                             "b": np.zeros((depth, 1, rank, o), np.float32)}
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        own = a.shape[0]
        arrays[stack]["a"][block, 0, :, :own] = a.T
        arrays[stack]["b"][block, 0, :own] = b.T * (float(parts["alpha"]) / own if "alpha" in parts else 1.0)
    return BasisConfig(size=1, rank=rank, query="fixed", query_dim=None), arrays


def _require_pair(name: str, parts: Mapping[str, np.ndarray], layers: Mapping[str, tuple[int, int, int]],
                  path: str) -> None:
    stack, block = split_layer_name(name)
    if stack not in layers or block >= layers[stack][0]:
        raise UserError(f"{path} adapts {name}, which the model hasn't got; use the LoRA with its own model")
    if not {"lora_A.weight", "lora_B.weight"} <= set(parts):
        raise UserError(f"{path} has only one of lora_A and lora_B for {name}; download it again")
    a, b = parts["lora_A.weight"].shape, parts["lora_B.weight"].shape
    _, i, o = layers[stack]
    if len(a) != 2 or len(b) != 2 or a[1] != i or b[0] != o or a[0] != b[1]:
        raise UserError(f"{path}: {name} has lora_A {list(a)} and lora_B {list(b)}, expected [R, {i}] and [{o}, R]; "
                        "use the LoRA with its own model")
