"""What each field of each job's config may be: the tables that settings/checks.py goes by. Nothing here imports jax."""

from lorweb_jax.settings.rules import (
    BATCH,
    BUCKETS,
    GUIDANCE,
    SAMPLING_STEPS,
    SEED,
    SHARE,
    SHOWN_AT_ONCE,
    SIDE,
    WORKERS,
    Blocks,
    Choice,
    Either,
    Flag,
    Folder,
    Real,
    Rule,
    Several,
    Steps,
    Text,
    Whole,
)

_COUNT = Whole(1, 10**9)  # of steps
_WIDTH = Whole(1, 65_536)  # of features
_LAYERS = Whole(1, 1000)
_WEIGHT = Real(0, 1e6)  # of a part of a loss
_DTYPE = Choice(("float32", "bfloat16", "float16"))
_TOKENS = Whole(1, 512)

INTERNAL_MODES = ("aa'bb'", "caa'bb'", "caa'b", "caa'")
QUERY_MODES = ("cat-aa'b", "ca'-ca", "ca'-ca+cb", *INTERNAL_MODES, "paa'b", "cat-paa'b", "paa'b3", "cat-paa'b3")

COMMON: dict[str, Rule] = {
    "seed": SEED,
    "train.steps": _COUNT,
    "train.batch": BATCH,
    "train.accumulate": BATCH,
    "train.log_every": _COUNT,
    "train.checkpoint_every": _COUNT,
    "train.log_images_every": _COUNT,
    "train.ema": Real(0, 1, below=True),
    "train.param_dtype": _DTYPE,
    "optimizer.name": Choice(("adamw", "muon")),
    "optimizer.learning_rate": Real(0, 10, above=True),
    "optimizer.schedule": Choice(("constant", "cosine")),
    "optimizer.warmup": Whole(0, 10**9),
    "optimizer.b1": Real(0, 1, below=True),
    "optimizer.b2": Real(0, 1, below=True),
    "optimizer.moments": Choice(("float32", "bfloat16", "int8")),
    "optimizer.weight_decay": Real(0, 100),
    "optimizer.clip": Real(0, 1e12, above=True),
    "mesh.data": Whole(1, 2**20, also=(-1,)),
    "mesh.fsdp": Whole(1, 2**20, also=(-1,)),
    "mesh.tensor": Whole(1, 2**20, also=(-1,)),
    "trackers": Several(Choice(("wandb", "trackio")), 0, 2),
    "profile": Steps(),
    "compile_cache": Flag(),
}

# How the frozen transformer is computed, of the jobs that train beside it.
_FROZEN: dict[str, Rule] = {
    "pipeline": Folder(),
    "guidance": GUIDANCE,
    "compute_dtype": _DTYPE,
    "quantization": Choice(("none", "int8", "fp8")),
    "offload": Choice(("none", "blocks")),
    "remat": Choice(("auto", "none", "dots", "qkv", "outputs", "attention", "full")),
    "attention": Choice(("auto", "xla", "cudnn", "pallas")),
    "unroll": _LAYERS,
    "unstacked": Flag(),
}

BASIS: dict[str, Rule] = _FROZEN | {
    "basis.size": Whole(1, 4096),
    "basis.rank": Whole(1, 4096),
    "basis.key_dim": _WIDTH,
    "basis.heads": _WIDTH,
    "basis.activation": Choice(("softmax", "tanh")),
    "basis.reduction": Choice(("mean", "sum")),
    "basis.query": Choice(("external", "internal", "fixed")),
    "basis.query_mode": Choice(QUERY_MODES),
    "basis.pooling": Choice(("avg", "max")),
    "basis.projection": Choice(("linear", "none")),
    "basis.query_dim": Whole(1, 2**20, also=(None,)),
    "basis.scale": Real(0, 1e6, above=True),
    "basis.normalised": Flag(),
    "basis.temperature": Real(1e-6, 1e6),
    "basis.temperature_mode": Choice(("fixed", "learnt", "annealed")),
    "basis.key_scale": Real(0, 1e6, above=True),
    "basis.encoder": Folder(empty=True),
    "data.root": Folder(),
    "data.held_out": Folder(empty=True),
    "data.cache": Folder(),
    "data.quadrant_size": Either(Whole(8, 4096, multiple=8, also=(0,)), Several(SIDE, 2, 2)),
    "data.buckets": BUCKETS,
    "data.caption_drop": SHARE,
    "data.reverse_probability": SHARE,
    "data.task_balanced": Flag(),
    "data.workers": WORKERS,
    "precomputed": Folder(empty=True),
    "loss_weight": Choice(("bell", "uniform")),
    "routing.rate": Real(0, 1e3),
    "routing.balance": _WEIGHT,
    "routing.member_dropout": Real(0, 1, below=True),
    "evaluation.tasks": Whole(0, 10**6),
    "evaluation.per_task": Whole(0, 10**6),
    "evaluation.validate": Whole(0, 10**6),
    "evaluation.batch": SHOWN_AT_ONCE,
    "evaluation.steps": SAMPLING_STEPS,
    "evaluation.guidance": GUIDANCE,
}

BLOCKS = ("all", "none", "even", "odd", "early", "late")  # lists of blocks; see adapters/pair.py
PAIR: dict[str, Rule] = _FROZEN | {
    "pair.content_rank": Whole(1, 4096),
    "pair.style_rank": Whole(1, 4096),
    **{f"pair.{kind}_{member}": Blocks(BLOCKS) for kind in ("double", "single") for member in ("content", "style")},
    "pair.orthogonal": Flag(),
    "pair.style_start": Whole(0, 10**9),
    "pair.joint": Flag(),
    "pair.times": Choice(("batch", "example")),
    "data.content": Folder(),
    "data.style": Folder(),
    "data.condition": Folder(empty=True),
    "data.cache": Folder(),
    "data.caption": Text(),
    "data.style_words": Text(),
    "data.long_edge": Whole(32, 4096),
    "data.augment": Flag(),
    "evaluation.prompts": Several(Text(), 1, 100),
    "evaluation.batch": SHOWN_AT_ONCE,
    "evaluation.steps": SAMPLING_STEPS,
    "evaluation.guidance": GUIDANCE,
}

BASE_VAE: dict[str, Rule] = {
    "model.block_out_channels": Several(_WIDTH, 1, 10),
    "model.layers_per_block": _LAYERS,
    "model.norm_num_groups": _WIDTH,
    "model.latent_channels": _WIDTH,
    "model.mid_block_add_attention": Flag(),
    "model.sample_size": Whole(1, 65_536),
    "initial": Folder(empty=True),
    "data.drawings": Folder(),
    "data.signs": Whole(0, 10**6),
    "data.size": SIDE,
    "data.plain": SHARE,
    "data.enlarged": SHARE,
    "loss.absolute": _WEIGHT,
    "loss.squared": _WEIGHT,
    "loss.edge": _WEIGHT,
    "loss.kl": _WEIGHT,
    "loss.consistency": _WEIGHT,
}

BASE_CLIP: dict[str, Rule] = {
    "vision.hidden_size": _WIDTH,
    "vision.intermediate_size": _WIDTH,
    "vision.num_hidden_layers": _LAYERS,
    "vision.num_attention_heads": _WIDTH,
    "vision.projection_dim": _WIDTH,
    "vision.image_size": Whole(1, 4096),
    "vision.patch_size": Whole(1, 4096),
    "text.hidden_size": _WIDTH,
    "text.intermediate_size": _WIDTH,
    "text.num_hidden_layers": _LAYERS,
    "text.num_attention_heads": _WIDTH,
    "data.drawings": Folder(),
    "data.edits": Whole(1, 1000),
    "loss.caption": _WEIGHT,
    "loss.edit": _WEIGHT,
    "loss.family": _WEIGHT,
    "loss.kind": _WEIGHT,
}

FORMS = ("canvas", "single", "drawing", "large")  # of examples; see small_base/corpus.py
BASE_TRANSFORMER: dict[str, Rule] = {
    "transformer.num_layers": _LAYERS,
    "transformer.num_single_layers": _LAYERS,
    "transformer.num_attention_heads": _WIDTH,
    "transformer.attention_head_dim": _WIDTH,
    "transformer.in_channels": _WIDTH,
    "transformer.guidance_embeds": Flag(),
    "transformer.axes_dims_rope": Several(Whole(2, 65_536, multiple=2), 3, 3),
    "text.hidden_size": _WIDTH,
    "text.intermediate_size": _WIDTH,
    "text.num_hidden_layers": _LAYERS,
    "text.num_attention_heads": _WIDTH,
    "text_2.d_model": _WIDTH,
    "text_2.d_kv": _WIDTH,
    "text_2.d_ff": _WIDTH,
    "text_2.num_layers": _LAYERS,
    "text_2.num_heads": _WIDTH,
    "initial": Folder(empty=True),
    "unroll": _LAYERS,
    "data.drawings": Folder(),
    "data.signs": Whole(0, 10**6),
    "data.cache": Folder(),
    "data.size": SIDE,
    "data.vae": Folder(),
    "data.variants": Whole(1, 2),
    "data.encoded": Whole(0, 10**6),
    "data.spatial": SHARE,
    "data.text_tokens": _TOKENS,
    "data.style": SHARE,
    "data.last_only": SHARE,
    "data.edited_before": SHARE,
    "data.twice": SHARE,
    "data.vague": SHARE,
    "data.silent": SHARE,
    "data.caption_drop": SHARE,
    "data.condition_drop": SHARE,
    **{f"forms.{form}": Whole(1, 1000) for form in FORMS},
    **{f"form_weights.{form}": _WEIGHT for form in FORMS},
    "loss_weight": Choice(("bell", "uniform")),
    "guidance": Several(GUIDANCE, 2, 2),
    "evaluation.steps": SAMPLING_STEPS,
}

JOBS: dict[str, dict[str, Rule]] = {
    "basis": BASIS,
    "pair": PAIR,
    "base_vae": BASE_VAE,
    "base_clip": BASE_CLIP,
    "base_transformer": BASE_TRANSFORMER,
}


def paths(job: str) -> frozenset[str]:
    """The fields of a job that are paths."""
    return frozenset(name for name, rule in JOBS.get(job, {}).items() if isinstance(rule, Folder))
