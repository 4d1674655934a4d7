"""Model FLOPs of one step of a row of the benchmark."""

from benchmark.rows import BenchmarkRow
from lorweb_jax.planning.flops import base_flops, basis_flops

# (of the transformer, of the basis) by kind of row.
_COUNTED = {
    "base": ("velocity", None),
    "inside": ("forward", None),
    "low-rank": ("velocity", "velocity"),
    "folded": ("velocity", None),
    "weights": ("weights", None),
    "inputs": ("inputs", None),
    "basis": ("basis", "basis"),
}
_TORCH = {"sample": "inside", "train": "weights", "lora": "basis"}


def step_flops(row: BenchmarkRow) -> int:
    """FLOPs of one step of a row of the table."""
    setting = row.setting
    what = "lora" if row.kind.startswith("lora") else setting.what
    base, added = _COUNTED[_TORCH[what] if row.torch else row.kind]
    sizes = (setting.batch, setting.tokens, setting.text_tokens)
    total = base_flops(base, setting.backbone, *sizes)
    return total + (basis_flops(added, setting.backbone, setting.basis, *sizes) if added else 0)
