"""Pair Customization: a style learned from one image and its stylised version, over the project's small base.

    python -m lorweb_jax.main --config=configs/pair.py

Minutes on two CPU cores. Leaves in runs/pair: checkpoints, TensorBoard and text logs, pictures of both images as they
are drawn again and of the style on other prompts, and both adapters in the published format
(export/content_lora.safetensors and export/style_lora.safetensors).

Variants, as in --config=configs/pair.py:joint
    kontext    the published recipe at full size: FLUX.1, rank 32, 512 pixels, 1,500 updates, the style from the 750th
    joint      both losses at one point and in one update, instead of the style after the content
    disjoint   each block has one adapter, content on the even and style on the odd ones, with A's that are trained
    early_late the same with content on the early and style on the late single blocks, as in SplitFlux
    smoke      a few seconds, to see that everything works

For your own pair: --config.data.content=photo.png --config.data.style=painting.png --config.data.caption="a sbu dog"
--config.data.style_words="in watercolour". The caption holds a rare word, such as sbu, that marks this content and is
left out when the style is used. For kontext, say also where FLUX.1 lies: --config.pipeline=FOLDER. With
--config.data.condition=photo.png both images are learned as edits of that one, for a style that is put on photographs.
"""

from lorweb_jax.settings.config import add_computation, base_config, choose_variant


def get_config(variant: str = ""):
    return choose_variant(
        {
            "": default,
            "kontext": kontext,
            "joint": joint,
            "disjoint": disjoint,
            "early_late": early_late,
            "smoke": smoke,
        },
        variant,
    )


def default():
    config = base_config("pair")
    config.pipeline = "assets/small_kontext"  # a FLUX.1 folder in diffusers' layout, Kontext or not

    config.data = dict(
        # Files of one aspect; or, as here, a drawing that pip has installed and an operation on it.
        content="embedded:dog",
        style="embedded:lines_pencil",
        condition="",  # a third image, which both are edits of (FLUX.1 Kontext's reference); "" learns from text alone
        cache="local_data",  # where embedded drawings are rendered
        caption="a drawing of a sbu dog in openmoji style",  # of the content image
        style_words="in black lines",  # the stylised image's caption is the content's with these after it
        long_edge=64,  # pixels; both sides become multiples of 32
        augment=False,  # random ratio, crop and flip, the same for all images, as published
    )

    config.pair = dict(
        content_rank=8,
        style_rank=8,
        # Blocks with each adapter, of the double and of the single ones, counted from 0: all, none, even, odd, early,
        # late, or indices such as 0-10,12. Where both are, their A's are orthonormal and stay as they are; a block with
        # one of them has a free A, which is trained.
        double_content="all",
        double_style="all",
        single_content="all",
        single_style="all",
        orthogonal=True,  # False makes every A free
        style_start=150,  # the first update with a style pass, counted from 0
        joint=False,  # both passes at one point and in one update, instead of the style after the content's update
        # Examples of a micro-batch share one time ("batch", as published), or each has its own ("example").
        times="batch",
    )

    config.guidance = 1.0  # guidance input while training
    add_computation(config)

    # Images that are logged while training: change neither what is trained nor a checkpoint.
    config.evaluation = dict(
        # Drawn by the base, and by the style with its words after them.
        prompts=tuple(f"a drawing of a {word} in openmoji style" for word in ("cat", "grinning face", "sailboat")),
        batch=8,  # images drawn at once
        steps=12,  # sampling steps
        guidance=3.5,
    )

    config.train.steps = 400
    config.train.batch = 8
    config.train.log_every = 20
    config.train.checkpoint_every = 100
    config.train.log_images_every = 200

    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    return config


def kontext():
    """Published recipe: AdamW 1e-5 constant, clip 1.0 a pass, bf16 compute; a batch is four GPUs' with accumulation 2,
    one example and one time each."""
    config = default()
    config.pipeline = "FLUX.1-Kontext-dev"
    config.data.content, config.data.style = "content.png", "style.png"
    config.data.caption, config.data.style_words = "a photo of a sbu dog", "in digital illustration style"
    config.data.long_edge, config.data.augment = 512, True
    config.pair.content_rank = config.pair.style_rank = 32
    config.pair.style_start, config.pair.times = 750, "example"
    config.compute_dtype = config.train.param_dtype = "bfloat16"
    config.remat, config.unroll = "auto", 1
    config.evaluation.prompts = ("a photo of a cat", "a photo of a man", "a photo of a house")
    config.evaluation.steps, config.evaluation.batch = 28, 2
    config.train.steps, config.train.batch, config.train.accumulate = 1500, 8, 2
    config.train.checkpoint_every = config.train.log_images_every = 250
    config.optimizer.learning_rate = 1e-5
    return config


def joint():
    config = default()
    config.pair.joint = True
    return config


def disjoint():
    config = default()
    config.pair.double_content = config.pair.single_content = "even"
    config.pair.double_style = config.pair.single_style = "odd"
    return config


def early_late():
    config = default()
    config.pair.double_content = config.pair.double_style = "none"
    config.pair.single_content, config.pair.single_style = "early", "late"
    return config


def smoke():
    config = default()
    config.pair.content_rank = config.pair.style_rank = 2
    config.pair.style_start = 2
    config.train.batch, config.train.accumulate = 2, 2
    config.train.steps = config.train.log_every = config.train.checkpoint_every = config.train.log_images_every = 4
    config.evaluation.batch, config.evaluation.steps = 2, 2
    return config
