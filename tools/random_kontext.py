"""Write a pipeline folder like FLUX.1 Kontext's, of the real shapes and file sizes, with random weights in bfloat16.

For trying everything at full size (conversion, loading, sharding, memory, speed) where the real weights can't be had.
Numbers are N(0, 0.02²), norm scales 1 + that; tokenizers and scheduler are the small base's.

  everything, 34 GB              tools/random_kontext.py --out random_kontext
  the transformer alone, 24 GB   tools/random_kontext.py --out random_kontext --parts transformer
  full width, few blocks, 2 GB   tools/random_kontext.py --out shallow --parts transformer --blocks 1 2
  a few MB, for tests            tools/random_kontext.py --out small --size small
"""

import argparse
import shutil
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import UserError, run_command  # noqa: E402  (the path above comes first)

BASE = ROOT / "assets" / "small_kontext"
DIFFUSERS = ("transformer", "vae")
COPIED = ("scheduler", "tokenizer", "tokenizer_2")
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "clip_vision", *COPIED)
TEXT_TOKENS = 512
_TILE = 1 << 24  # random numbers that are drawn; tensors repeat them, each from another place

_CLIP_TEXT = dict(
    architectures=["CLIPTextModel"],
    model_type="clip_text_model",
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    max_position_embeddings=77,
    vocab_size=49408,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
_CLIP_VISION = dict(
    architectures=["CLIPVisionModelWithProjection"],
    model_type="clip_vision_model",
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    num_channels=3,
)
SIZES = {
    "kontext": {
        "transformer": {},
        "vae": {},
        "shard_gb": (10.0, 5.0),
        "text_encoder_2": dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
        "text_encoder": _CLIP_TEXT
        | dict(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        ),
        "clip_vision": _CLIP_VISION
        | dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            projection_dim=768,
            image_size=224,
            patch_size=14,
        ),
    },
    "small": {
        "transformer": dict(
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=48,
            axes_dims_rope=(8, 12, 12),
        ),
        "vae": dict(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
        "shard_gb": (0.001, 0.005),
        "text_encoder_2": dict(vocab_size=1024, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        "text_encoder": _CLIP_TEXT
        | dict(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=48,
            vocab_size=4096,
        ),
        "clip_vision": _CLIP_VISION
        | dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=24,
            image_size=32,
            patch_size=8,
        ),
    },
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--out", required=True, type=nonempty_path, help="the pipeline folder; parts that it has are left alone"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="kontext", help="default: kontext")
    parser.add_argument(
        "--blocks",
        nargs=2,
        type=int,
        metavar=("DOUBLE", "SINGLE"),
        help="blocks of the transformer, in place of 19 and 38",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.blocks and min(args.blocks) < 1:
        raise UserError(f"--blocks is {args.blocks}; give at least one block of each kind", 2)
    for part in args.parts:
        if (args.out / part).exists():
            print(f"{args.out / part} is there already")
            continue
        start = time.monotonic()
        partial = args.out / f"{part}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        count, nbytes = _copy(part, partial) if part in COPIED else _random(part, partial, args)
        partial.rename(args.out / part)
        print(
            f"{args.out / part}: {count:,} parameters, {nbytes:,} bytes, {time.monotonic() - start:.1f} s", flush=True
        )
    shutil.copy(BASE / "model_index.json", args.out)


def _copy(part: str, folder: Path) -> tuple[int, int]:
    from lorweb_jax.common.schema import read_json
    from lorweb_jax.files.safetensors_io import write_json

    shutil.copytree(BASE / part, folder)
    if part == "tokenizer_2":
        settings = folder / "tokenizer_config.json"
        write_json(settings, read_json(settings) | {"model_max_length": TEXT_TOKENS})
    return 0, sum(file.stat().st_size for file in folder.iterdir())


def _random(part: str, folder: Path, args: argparse.Namespace) -> tuple[int, int]:
    """Write a model's folder; returns its parameters' count and bytes."""
    import ml_dtypes
    import numpy as np

    from lorweb_jax.common.schema import read_json
    from lorweb_jax.files.safetensors_io import Spec, write_json, write_sharded
    from lorweb_jax.files.table import Layout

    config, rows, shapes = model(part, SIZES[args.size][part], args.blocks)
    layout, dtype = Layout(rows, shapes), np.dtype(ml_dtypes.bfloat16)
    noise = 0.02 * np.random.default_rng(args.seed).standard_normal(_TILE, np.float32)
    tiles = {False: noise.astype(dtype), True: (1 + noise).astype(dtype)}

    def produce(key: str):
        tile = tiles[layout.parts[key][0][0].endswith(".scale")]  # norms' scales lie around 1
        return np.resize(np.roll(tile, zlib.crc32(key.encode())), layout.tensors[key])

    specs = {key: Spec(shape, dtype) for key, shape in layout.tensors.items()}
    write_sharded(
        folder,
        "diffusion_pytorch_model" if part in DIFFUSERS else "model",
        specs,
        produce,
        shard_bytes(part, args.size),
    )
    write_json(folder / "config.json", config)
    if part == "clip_vision":
        side = config["image_size"]
        processor = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        write_json(folder / "preprocessor_config.json", read_json(BASE / part / "preprocessor_config.json") | processor)
    nbytes = sum(spec.nbytes for spec in specs.values())
    return nbytes // dtype.itemsize, nbytes


def shard_bytes(part: str, size: str) -> int:
    """The largest file of a part: diffusers and transformers split their models at different sizes."""
    return int(1e9 * SIZES[size]["shard_gb"][part not in DIFFUSERS])


def model(part: str, sizes: dict, blocks: list[int] | None) -> tuple[dict, list, dict]:
    """(config.json, conversion table, {our path: shape}) of a part."""
    from flax import nnx

    from lorweb_jax.common.schema import checked
    from lorweb_jax.files.state import shapes
    from lorweb_jax.models.autoencoder.model import VAEConfig
    from lorweb_jax.models.clip import folder as clip
    from lorweb_jax.models.flux1.config import FluxConfig
    from lorweb_jax.models.t5 import model as t5
    from lorweb_jax.pipeline.pretrained import KINDS

    if part in KINDS:
        if part == "transformer" and blocks:
            sizes = sizes | dict(num_layers=blocks[0], num_single_layers=blocks[1])
        config = (FluxConfig if part == "transformer" else VAEConfig)(**sizes).to_json()
        return config, KINDS[part].rows(config, "diffusers"), KINDS[part].shapes(config)
    if part == "text_encoder_2":
        config = t5.T5Config(**sizes)
        return config.to_json(), t5.TABLE, shapes(lambda: t5.T5Encoder(config, rngs=nnx.Rngs(0)))
    if part == "text_encoder":
        text = checked(sizes, clip.CLIPTextConfig, part)
        return sizes, clip.TEXT_TABLE, shapes(lambda: clip.ClipText(text, rngs=nnx.Rngs(0)))
    vision = checked(sizes, clip.CLIPVisionConfig, part)
    return sizes, clip.VISION_TABLE, shapes(lambda: clip.ClipVision(vision, rngs=nnx.Rngs(0)))


if __name__ == "__main__":
    run_command(main)
