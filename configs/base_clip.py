"""The small base's CLIP vision tower, trained from nothing on drawings, their names and what is done to them.

    python -m lorweb_jax.main --config=configs/base_clip.py

Leaves clip_vision in runs/base_clip, with quality.json: what the image embedding tells of held-out drawings. Needs the
file of drawings that tools/pack_drawings.py makes. tools/gpu_clip.py trains the same in minutes on a GPU.
"""

from lorweb_jax.settings.config import base_config, choose_variant


def get_config(variant: str = ""):
    return choose_variant({"": default, "smoke": smoke}, variant)


def default():
    config = base_config("base_clip")
    config.vision = dict(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=5,
        projection_dim=64,
        image_size=64,
        patch_size=8,
    )
    # The text tower is needed in training alone.
    config.text = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)

    config.data = dict(
        drawings="local_data/drawings64.npz",  # made by tools/pack_drawings.py
        edits=3,  # edits shown of each drawing of a batch, beside the plain drawing
    )

    # Captions against images; instructions against the difference of two images, by edit and by family; kinds.
    config.loss = dict(caption=1.0, edit=1.0, family=0.3, kind=0.3)

    config.train.steps = 4000
    config.train.batch = 24  # drawings
    config.train.log_every = 50
    config.train.checkpoint_every = 500
    config.train.log_images_every = 2000
    config.train.ema = 0.99

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 100
    return config


def smoke():
    """A few seconds, to see that everything works."""
    config = default()
    config.vision.num_hidden_layers = config.text.num_hidden_layers = 1
    config.train.steps = config.train.log_every = config.train.checkpoint_every = config.train.log_images_every = 4
    config.train.batch = 4
    config.optimizer.warmup = 0
    return config
