"""The autoencoder against diffusers' AutoencoderKL (torch, float32) and the golden edit."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import golden_dir
from safetensors.numpy import load_file

from lorweb_jax.common.errors import UserError
from lorweb_jax.models.autoencoder.model import AutoencoderKL, VAEConfig

TOLERANCE = 1e-5


def relative(ours, theirs) -> float:
    """Largest absolute error over the largest absolute value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def load(folder: Path) -> AutoencoderKL:
    """The autoencoder of a diffusers folder, by a loader independent of lorweb_jax.files."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    model = AutoencoderKL(VAEConfig.from_json(json.loads((folder / "config.json").read_text())), rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *parts, leaf = [str(part) for part in path]
        key = ".".join(parts).replace("to_out_0", "to_out.0")
        array = weights.pop(f"{key}.{'bias' if leaf == 'bias' else 'weight'}")
        if leaf == "kernel":
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        assert array.shape == variable.shape, path
        variable[...] = jnp.asarray(array)
    assert not weights
    return model


def torch_model(folder: Path):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def folder() -> Path:
    return golden_dir() / "tiny_pipeline" / "vae"


def compare(folder: Path, size: tuple[int, int]) -> None:
    import torch

    theirs, ours = torch_model(folder), load(folder)
    image = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(image).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(posterior.mean).sample.permute(0, 2, 3, 1).numpy()
    mean, logvar = jax.jit(lambda model, x: model.encode(x))(ours, image)
    z = posterior.mean.permute(0, 2, 3, 1).numpy()
    assert relative(mean, z) <= TOLERANCE
    assert relative(logvar, posterior.logvar.permute(0, 2, 3, 1).numpy()) <= TOLERANCE
    assert relative(jax.jit(lambda model, x: model.decode(x))(ours, z), decoded) <= TOLERANCE


@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_encode_and_decode_equal_diffusers(folder, size):
    pytest.importorskip("torch")
    compare(folder, size)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True},
        {
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "layers_per_block": 2,
        },
    ],
)
def test_other_configs_equal_diffusers(tmp_path, settings):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, **({"layers_per_block": 1} | settings))
    diffusers.AutoencoderKL.from_config(config.to_json()).save_pretrained(tmp_path)
    assert VAEConfig.from_json(json.loads((tmp_path / "config.json").read_text())) == config
    compare(tmp_path, (16, 24))


def test_the_golden_edit(folder):
    golden = np.load(golden_dir() / "e2e_square.npz")
    model = load(folder)
    decoded = model.decode(golden["vae_decode_in"].transpose(0, 2, 3, 1))
    assert relative(decoded, golden["vae_decode_out"].transpose(0, 2, 3, 1)) <= TOLERANCE

    latents = model.latents(golden["preprocessed_control_image"].transpose(0, 2, 3, 1))
    b, h, w, c = latents.shape
    packed = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h * w // 4, 4 * c)
    assert relative(packed, golden["image_latents_packed"]) <= TOLERANCE


def test_image_undoes_shift_and_scale(folder):
    """float64 formula of method.md §1: latent = (z − shift)·scale."""
    model = load(folder)
    z = np.random.default_rng(1).normal(size=(1, 2, 3, 16))
    latents = ((z - model.config.shift_factor) * model.config.scaling_factor).astype(np.float32)
    assert relative(model.image(latents), np.asarray(model.decode(z.astype(np.float32)))) <= TOLERANCE


def test_a_sample_has_the_posteriors_mean_and_variance(folder):
    """Over 4096 draws the sample mean is within 5 standard errors, the variance within 5 %."""
    model = load(folder)
    image = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (1, 8, 8, 3)), jnp.float32)
    mean, logvar = model.encode(image)
    draws = jax.jit(jax.vmap(lambda key: model.latents(image, key)))(jax.random.split(jax.random.key(0), 4096))
    draws = np.asarray(draws) / model.config.scaling_factor + model.config.shift_factor
    sigma = np.exp(0.5 * np.asarray(logvar))
    assert (np.abs(draws.mean(0) - np.asarray(mean)) <= 5 * sigma / 64).all()
    assert abs((draws.var(0) / sigma**2).mean() - 1) <= 0.05


@pytest.mark.parametrize(
    "change, words",
    [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"down_block_types": ["AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
    ],
)
def test_an_unsupported_config_is_a_user_error(folder, change, words):
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(UserError, match=words):
        VAEConfig.from_json(config)


def test_an_image_of_odd_size_is_a_user_error(folder):
    with pytest.raises(UserError, match="multiples of 8"):
        load(folder).encode(jnp.zeros((1, 12, 16, 3)))
