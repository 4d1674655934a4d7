"""The small base's CLIP pair and tokenizers, trained from nothing on OpenMoji drawings and their names.

    python -m lorweb_jax.main --config=configs/base_clip.py

About ten minutes on two free CPU cores. Leaves clip_vision, text_encoder, tokenizer and tokenizer_2 in runs/base_clip, with
quality.json: what the image embedding tells of held-out drawings.
"""

from lorweb_jax.config import base_config, choose_variant


def get_config(variant: str = ""):
    return choose_variant({"": default, "smoke": smoke}, variant)


def default():
    config = base_config("base_clip")
    config.vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
                         projection_dim=64, image_size=32, patch_size=8)
    # hidden_size is the pooled width that the transformer is given.
    config.text = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)

    config.data = dict(
        cache="local_data/drawings",   # rendered drawings are kept here
        edits=3,                       # operations shown of each drawing of a batch, beside the plain drawing
        instruction_tokens=16)         # length that T5 instructions are padded to: the base's max_sequence_length

    # Captions against images; instructions against the difference of two images, by operation and by family.
    config.loss = dict(caption=1.0, operation=1.0, family=0.3)

    config.train.steps = 2000
    config.train.batch = 24            # drawings
    config.train.log_every = 50
    config.train.checkpoint_every = 500
    config.train.picture_every = 1000
    config.train.ema = 0.99

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 100
    return config


def smoke():
    """A few seconds, to see that everything works."""
    config = default()
    config.vision.num_hidden_layers = config.text.num_hidden_layers = 1
    config.train.steps = config.train.log_every = config.train.checkpoint_every = config.train.picture_every = 4
    config.train.batch = 4
    config.optimizer.warmup = 0
    return config
