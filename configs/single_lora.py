"""The baseline: one LoRA as large as the whole basis (rank n·r, no router), same layers, data and recipe.

    python -m lorweb_jax.main --config=configs/single_lora.py

Takes as long as configs/basis.py. Leaves an ordinary LoRA in runs/single_lora/export/lora.safetensors.

Variants: kontext (full size: rank 128, as large as the paper's basis), kontext_16 (the same on 16 chips), smoke.
"""

from configs import basis
from lorweb_jax.settings.config import choose_variant


def get_config(variant: str = ""):
    variants = {"": basis.default, "kontext": basis.kontext, "kontext_16": basis.kontext_16, "smoke": basis.smoke}
    return choose_variant({name: lambda make=make: single(make()) for name, make in variants.items()}, variant)


def single(config):
    """The same capacity in one member whose coefficient is 1."""
    config.basis.rank = config.basis.size * config.basis.rank
    config.basis.size = 1
    config.basis.query = "fixed"
    config.basis.scale = config.routing.rate = 1.0
    return config
