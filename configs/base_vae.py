"""The small base's autoencoder, trained from nothing on OpenMoji drawings.

    python -m lorweb_jax.main --config=configs/base_vae.py

Leaves runs/base_vae/vae, a diffusers folder (0.97 M parameters, 2 MB), pictures of held-out drawings beside their
reconstructions, and quality.json (peak signal-to-noise ratio on held-out drawings).
"""

from lorweb_jax.config import base_config, choose_variant


def get_config(variant: str = ""):
    return choose_variant({"": default, "smoke": smoke}, variant)


def default():
    config = base_config("base_vae")
    config.model = dict(
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, latent_channels=16,
        # Without attention a quadrant's latents depend less on its neighbours in the canvas.
        mid_block_add_attention=False, sample_size=64)

    config.data = dict(
        cache="local_data/drawings",  # rendered drawings are kept here
        size=32,                      # side of a quadrant, pixels
        plain=0.3)                    # share of quadrants shown without an operation

    config.loss = dict(absolute=1.0, squared=1.0, edge=0.5, kl=1e-3, consistency=0.05)

    config.train.steps = 3400
    config.train.batch = 4            # canvases of four drawings
    config.train.log_every = 50
    config.train.checkpoint_every = 500
    config.train.picture_every = 500

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 50
    config.optimizer.weight_decay = 0.0
    return config


def smoke():
    """A few seconds, to see that everything works."""
    config = default()
    config.train.steps = config.train.log_every = config.train.checkpoint_every = config.train.picture_every = 4
    config.optimizer.warmup = 0
    return config
