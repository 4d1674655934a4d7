"""A small FLUX transformer of diffusers with random weights, ours with the same weights, and inputs for both."""

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from flax import nnx

from lorweb_jax.files.state import build
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.pipeline.pretrained import load_transformer

SIZES = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=20,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=12,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 10),
)


def theirs(seed: int = 0, **changes) -> FluxTransformer2DModel:
    """diffusers' model; biases, norm scales and modulations are all far from their usual starting values."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(patch_size=1, **SIZES | changes).eval()
    for name, parameter in model.named_parameters():
        if "norm_" in name and name.endswith("weight"):
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def ours(model: FluxTransformer2DModel, folder, **options) -> Flux:
    """Our model with diffusers' weights, through the files that users have."""
    model.save_pretrained(folder)
    config, parameters = load_transformer(folder, np.float32)
    return build(lambda: Flux(FluxConfig.from_json(config), rngs=nnx.Rngs(0), **options), parameters)


def inputs(batch: int = 2, seed: int = 0, text_tokens: int = 5) -> dict[str, np.ndarray]:
    """6 noisy and 6 conditioning tokens beside those of the text. Timesteps and guidance are small: diffusers'
    sinusoids depend on torch's exp on this machine, by an angle of up to 6e-8 · 1000 · timestep."""
    random = np.random.default_rng(seed)
    y, x = np.divmod(np.arange(6), 3)
    ids = [np.stack([np.full(6, image), y, x], -1) for image in (0, 1)]
    values = dict(
        hidden_states=random.normal(size=(batch, 12, 16)),
        encoder_hidden_states=random.normal(size=(batch, text_tokens, 24)),
        pooled_projections=random.normal(size=(batch, 12)),
        timestep=np.linspace(0.1, 0.2, batch),
        guidance=np.linspace(0.3, 0.1, batch),
        img_ids=np.concatenate(ids),
        txt_ids=np.zeros((text_tokens, 3)),
    )
    return {name: value.astype(np.float32) for name, value in values.items()}


def run(model: FluxTransformer2DModel, values: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in values.items()}, return_dict=False)[0].numpy()
