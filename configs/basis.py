"""A basis of LoRAs with its router, trained on analogies over the small base that comes with the project.

    python -m lorweb_jax.main --config=configs/basis.py

Minutes on two CPU cores. Leaves in runs/basis: checkpoints, TensorBoard and text logs, pictures of a, a', b, the
result and the truth, tables that compare the basis with the frozen base and with copying b, and the basis in the
published format (export/basis.safetensors with its config.yaml).

Variants, as in --config=configs/basis.py:tanh
    published  the same with the router as the paper has it: as fast as the members, the sum over them not scaled
    kontext    the paper's recipe at full size: FLUX.1 Kontext, N = 32, r = 4, 10,000 steps on Relation252K
    kontext_16 the same for 16 chips, such as a v6e-16: 16 examples a step, one on each
    tanh       coefficients by tanh instead of softmax
    internal   coefficients from each layer's own input instead of the image encoder
    smoke      a few seconds, to see that everything works

For kontext, say where the weights and data lie: --config.pipeline, --config.basis.encoder (a CLIP ViT-L/14 folder)
and --config.data.root, to `python -m lorweb_jax.precompute` first and then to lorweb_jax.main.
"""

import dataclasses

from ml_collections.config_dict import placeholder

from lorweb_jax.adapters.config import BasisConfig
from lorweb_jax.settings.config import add_computation, base_config, choose_variant
from lorweb_jax.settings.fields import BASIS


def get_config(variant: str = ""):
    return choose_variant(
        {
            "": default,
            "published": published,
            "kontext": kontext,
            "kontext_16": kontext_16,
            "tanh": tanh,
            "internal": internal,
            "smoke": smoke,
        },
        variant,
    )


def default():
    config = base_config("basis")
    config.pipeline = "assets/small_kontext"  # a FLUX Kontext folder in diffusers' layout
    # The paper's basis and router, with fewer members and narrower keys; lorweb_jax/adapters/config.py has its values
    # and what each field is.
    config.basis = {
        field.name: field.default for field in dataclasses.fields(BasisConfig) if f"basis.{field.name}" in BASIS
    }
    config.basis.size, config.basis.key_dim = 16, 64
    config.basis.scale = 16.0  # softmax gives each member about 1/16 at first
    config.basis.query_dim = placeholder(int)  # its width: None takes the image encoder's, another is refused
    config.basis.encoder = ""  # folder of the router's image encoder; "" is <pipeline>/clip_vision

    config.data = dict(
        root="embedded",  # a data set (docs/data.md), or "embedded": drawings that pip has installed
        held_out="",  # a second data set, of tasks that are evaluated, not trained on
        cache="local_data",  # where the embedded data set is built
        quadrant_size=64,  # side of a, a', b and b' in the grid, pixels
        buckets=(),  # several (height, width) in its place, for pictures of several aspects (docs/data.md)
        caption_drop=0.05,  # share of captions that are left empty
        reverse_probability=0.0,  # share of analogies shown in reverse, a' -> a
        task_balanced=True,  # every task equally often, however many pairs it has
        workers=0,  # processes that read images; 0 reads in the main one
    )

    # Folder that `python -m lorweb_jax.precompute` filled with text embeddings and image embeddings: training takes
    # them from there and has no encoders on its devices. "" computes them in every step.
    config.precomputed = ""

    # What may spread the work over the members, beside basis.scale, .normalised, .temperature, .temperature_mode and
    # .key_scale; the published recipe has none of it (`published`).
    config.routing = dict(
        rate=0.03,  # the router's learning rate as a multiple of the members'; 0: keys and projections stay as they are
        balance=0.0,  # weight in the loss of log n − H(mean share of the members over the batch), in nats
        member_dropout=0.0,  # share of the members that each example and layer goes without in a training step
    )

    config.loss_weight = "bell"  # by timestep: bell, as published, or uniform
    config.guidance = 1.0  # guidance input while training
    add_computation(config)
    config.unstacked = True  # the small base has few blocks

    # Images that are logged while training, and tables at its end: changes neither what is trained nor a checkpoint.
    config.evaluation = dict(
        tasks=12,  # of each split, in the logged images; the tables have all of them. 0: no images
        per_task=2,  # analogies of every task in the tables; 0: no tables
        validate=0,  # held-out analogies whose loss marks the best checkpoint, kept in best/; 0: none are looked at
        batch=12,  # analogies sampled at once
        steps=12,  # sampling steps
        guidance=2.5,
    )

    config.train.steps = 600
    config.train.batch = 12
    config.train.log_every = 20
    config.train.checkpoint_every = 100
    config.train.log_images_every = 200

    config.optimizer.learning_rate = 8e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 20
    return config


def published():
    config = default()
    config.basis.scale, config.routing.rate = BasisConfig.scale, 1.0
    config.optimizer.learning_rate = 4e-3
    return config


def kontext():
    """Published recipe: AdamW 1e-3 constant, weight decay 0.05, clip 1.0, batch 6, long edge 512, bf16 compute."""
    config = published()
    config.pipeline, config.basis.encoder = "FLUX.1-Kontext-dev", "clip-vit-large-patch14"
    config.basis.size, config.basis.key_dim = BasisConfig.size, BasisConfig.key_dim
    config.data.root, config.data.quadrant_size, config.data.workers = "Relation252K", 256, 8
    config.precomputed = "local_data/precomputed"
    config.compute_dtype = config.train.param_dtype = "bfloat16"
    config.remat, config.unroll, config.unstacked = "auto", 1, False
    config.evaluation.steps, config.evaluation.batch = 28, 2
    config.train.steps, config.train.batch = 10_000, 6
    config.train.checkpoint_every = 250
    config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup = 1e-3, "constant", 0
    return config


def kontext_16():
    """`kontext` where batch 6 would leave chips idle: 16 examples a step, weights split over 16 devices."""
    config = kontext()
    config.train.batch = config.mesh.fsdp = 16
    return config


def tanh():
    config = published()
    config.basis.activation = "tanh"
    return config


def internal():
    config = published()
    config.basis.query, config.basis.query_mode = "internal", "aa'bb'"
    return config


def smoke():
    config = default()
    config.basis.size, config.basis.key_dim, config.basis.scale = 4, 16, 4.0
    config.data.quadrant_size = 32
    config.train.batch = 4
    config.train.steps = config.train.log_every = config.train.checkpoint_every = config.train.log_images_every = 4
    config.optimizer.warmup = 0
    config.evaluation.tasks, config.evaluation.per_task, config.evaluation.batch, config.evaluation.steps = 2, 1, 2, 2
    return config
