"""The small base's transformer and text encoders, trained from nothing to draw from text and to edit by instruction.

    python -m lorweb_jax.main --config=configs/base_transformer.py

Needs the trained autoencoder (configs/base_vae.py). Leaves transformer, text_encoder, text_encoder_2 and both
tokenizers in runs/base_transformer, with pictures of edits of drawings it never saw. tools/gpu_base.sh trains the same
in minutes on a GPU.
"""

from lorweb_jax.settings.config import base_config, choose_variant


def get_config(variant: str = ""):
    return choose_variant({"": default, "smoke": smoke}, variant)


def default():
    config = base_config("base_transformer")
    config.transformer = dict(
        num_layers=2,
        num_single_layers=6,
        num_attention_heads=4,
        attention_head_dim=40,
        in_channels=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 16, 16),
    )
    config.text = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)
    config.text_2 = dict(d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4)
    config.unroll = 8  # blocks compiled side by side; all of them, since there are few

    config.data = dict(
        drawings="local_data/drawings64.npz",  # the pack: tools/pack_drawings.py makes it
        signs=0,  # that are shown, in all sets; 0 takes all there are
        cache="local_data/drawings",  # latents are kept here
        size=64,  # side of a quadrant, pixels
        vae="runs/base_vae/vae",
        variants=1,  # of each drawing: as it is, and in other colours
        encoded=0,  # signs that are trained on, with a sixth as many held out; 0 takes all
        text_tokens=20,  # length that captions are padded to
        spatial=0.25,  # share of edits chosen of those that move what is drawn; others are of all kinds
        style=0.12,  # share of edits that draw the same thing in another set's style
        last_only=0.4,  # share of canvases of which only the last drawing is to change
        edited_before=0.5,  # share of the other drawings on those canvases that come edited already
        twice=0.5,  # share of those canvases that show the last drawing twice
        vague=0.15,  # share of instructions that leave the operation's parameter open
        silent=0.03,  # share of empty instructions that change nothing
        caption_drop=0.05,  # share of captions left out: for guidance without a classifier
        condition_drop=0.12,  # share of text to image that shows an edit's result under its instruction
    )

    config.initial = ""  # a folder of transformer, text_encoder and text_encoder_2 to start from

    # A group of examples, of which a batch has config.train.batch: edits of canvases and of single drawings, text to
    # image at a drawing's and at the canvas's size. And what each form weighs in the loss.
    config.forms = dict(canvas=3, single=4, drawing=3, large=1)
    config.form_weights = dict(canvas=0.5, single=0.15, drawing=0.22, large=0.13)

    config.loss_weight = "uniform"
    config.guidance = (1.0, 4.0)  # guidance values that the model is shown
    config.evaluation = dict(steps=12)  # sampling steps of the logged images and of quality.json

    config.train.steps = 20000
    config.train.batch = 6  # groups
    config.train.log_every = 50
    config.train.checkpoint_every = 250
    config.train.log_images_every = 2500
    config.train.ema = 0.999

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 6e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 40
    config.optimizer.weight_decay = 0.01
    return config


def smoke():
    """A few seconds, to see that everything works."""
    config = default()
    config.data.signs = 3
    config.transformer.num_layers = config.transformer.num_single_layers = 1
    config.data.variants = 1
    config.train.steps = config.train.log_every = config.train.checkpoint_every = config.train.log_images_every = 4
    config.train.batch = 1
    config.optimizer.warmup = 0
    return config
