"""Put the small base together: one pipeline folder in diffusers' layout out of the runs that trained its parts.

python -m lorweb_jax.main --config=configs/base_vae.py
python -m lorweb_jax.main --config=configs/base_clip.py
python -m lorweb_jax.main --config=configs/base_transformer.py
python tools/build_base.py --runs runs --out assets/small_kontext --overwrite
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import UserError, run_command  # noqa: E402
from lorweb_jax.common.outputs import replacing_folder, require_new_folder  # noqa: E402
from lorweb_jax.files.safetensors_io import write_json  # noqa: E402

# part of the pipeline -> the run that trained it
PARTS = {
    "vae": "base_vae",
    "clip_vision": "base_clip",
    "transformer": "base_transformer",
    "text_encoder": "base_transformer",
    "text_encoder_2": "base_transformer",
    "tokenizer": "base_transformer",
    "tokenizer_2": "base_transformer",
}
RECORDS = ("quality.json", "config.json", "curves.json")  # of a run, that are kept
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.35.1",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
INDEX = {
    "_class_name": "FluxKontextPipeline",
    "_diffusers_version": "0.35.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--runs", type=nonempty_path, default=Path("runs"), help="where the three runs lie (default: runs)"
    )
    parser.add_argument("--out", type=nonempty_path, default=Path("assets/small_kontext"), help="the folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace a pipeline folder that is there")
    args = parser.parse_args()
    if not (args.overwrite and (args.out / "model_index.json").is_file()):
        require_new_folder(args.out)
    sources = {part: args.runs / run / part for part, run in PARTS.items()}
    if missing := [str(source) for source in sources.values() if not source.is_dir()]:
        raise UserError(f"there is no {', '.join(missing)}; train the parts first (see --help)")
    with replacing_folder(args.out) as new:
        for part, source in sources.items():
            shutil.copytree(source, new / part)
        (new / "training").mkdir()
        for run in dict.fromkeys(PARTS.values()):
            records = [path for name in RECORDS if (path := args.runs / run / name).is_file()]
            for path in records:
                shutil.copy(path, new / "training" / f"{run}_{path.name}")
            if not records:  # a part that was taken over, with its records
                for path in (args.out / "training").glob(f"{run}_*.json"):
                    shutil.copy(path, new / "training")
        write_json(new / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(new / "model_index.json", INDEX)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"wrote {args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
