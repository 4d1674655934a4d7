"""The small base's autoencoder, trained on drawings and photographs: from nothing, or on from another of its shape.

    python -m lorweb_jax.main --config=configs/base_vae.py
    python -m lorweb_jax.main --config=configs/base_vae.py --config.initial=assets/small_kontext/vae

Leaves runs/base_vae/vae, a diffusers folder (0.97 M parameters, 2 MB), pictures of held-out drawings beside their
reconstructions, and quality.json (peak signal-to-noise ratio on held-out drawings).
"""

from lorweb_jax.settings.config import base_config, choose_variant


def get_config(variant: str = ""):
    return choose_variant({"": default, "smoke": smoke}, variant)


def default():
    config = base_config("base_vae")
    config.model = dict(
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        # Without attention a quadrant's latents depend less on its neighbours in the canvas.
        mid_block_add_attention=False,
        sample_size=128,
    )
    config.initial = ""  # a vae folder whose weights training begins with; "" begins with random ones

    config.data = dict(
        drawings="local_data/drawings64.npz",  # the pack: tools/pack_drawings.py makes it
        signs=0,  # that are shown, in all sets; 0 takes all there are
        size=64,  # side of a quadrant, pixels
        plain=0.3,  # share of quadrants shown without an operation
        enlarged=0.1,  # share of canvases that show one drawing, twice as large
    )

    config.loss = dict(absolute=1.0, squared=1.0, edge=0.5, kl=1e-3, consistency=0.05)

    config.train.steps = 6000
    config.train.batch = 8  # canvases of four drawings
    config.train.log_every = 50
    config.train.checkpoint_every = 500
    config.train.log_images_every = 500

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 50
    config.optimizer.weight_decay = 0.0
    return config


def smoke():
    """A few seconds, to see that everything works."""
    config = default()
    config.data.signs = 3
    config.train.steps = config.train.log_every = config.train.checkpoint_every = config.train.log_images_every = 4
    config.train.batch = 4
    config.optimizer.warmup = 0
    return config
