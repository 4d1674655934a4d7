"""Before and after the small base's training on a GPU: what goes to that machine, what is made of its results."""

import json
import shutil
from pathlib import Path

import gpu_loop
import numpy as np
from gpu_loop import Settings

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import replacing_folder

JOBS = ("base_vae", "base_transformer")
EXAMPLE = "base_transformer.data.style=0.2"
PREPARED = gpu_loop.PREPARED / "base"  # the other files there are gpu_clip.py's


def prepare(drawings_path: Path, vae: Path, initial: Path | None, changes: list[str]) -> None:
    """Writes what a machine without tokenizers, ml_collections and pydantic needs into local_data/gpu: all of it, or
    nothing where something given can't be used."""
    from flax import nnx

    from lorweb_jax.data.embedded.drawing_sets import load_sets
    from lorweb_jax.files.state import shapes
    from lorweb_jax.pipeline.pretrained import load_vae
    from lorweb_jax.small_base.captions import Captions
    from lorweb_jax.small_base.editor import Editor, editor_config
    from lorweb_jax.small_base.jobs.transformer import read_editor
    from lorweb_jax.small_base.tokens import make_tokenizers, tokens_of

    configs = changed_configs(changes)
    length = configs["base_transformer"]["data"]["text_tokens"]
    drawings = load_sets(drawings_path)
    captions = Captions([drawings.captions(i) for i in range(len(drawings.names))])
    vae_config, weights = load_vae(vae)
    configs["vae"] = {name: vae_config[name] for name in ("scaling_factor", "shift_factor")}
    with replacing_folder(PREPARED) as new:
        clip_words, t5_words = make_tokenizers(captions.texts, new / "tokenizers", length)
        clip_ids, t5_ids = tokens_of(captions.texts, new / "tokenizers", length)
        np.savez_compressed(
            new / "captions.npz",
            texts=np.array(captions.texts),
            clip_ids=clip_ids.astype(np.int16),
            t5_ids=t5_ids.astype(np.int16),
            words=np.array([clip_words, t5_words]),
        )
        np.savez(new / "vae.npz", **{name: np.asarray(weights[name], np.float32) for name in weights})
        if initial:
            sizes = editor_config(Settings.of(configs["base_transformer"]), clip_words, t5_words)
            begun = read_editor(initial, sizes, shapes(lambda: Editor(sizes, 1, rngs=nnx.Rngs(0))))
            np.savez(new / "editor.npz", **{name: np.asarray(begun[name], np.float16) for name in begun})
        (new / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")
    cut = (clip_ids[:, -1] == clip_words - 1).sum() - (clip_ids[:, -2] == clip_words - 1).sum()
    print(
        f"{len(captions.texts)} captions, {clip_words} and {t5_words} words, {cut} captions of {length} tokens or cut"
    )


def changed_configs(changes: list[str]) -> dict[str, dict]:
    """{job: its config's fields} with changes such as base_transformer.data.style=0.2; UserError for one that no run
    could use."""
    import runpy

    from lorweb_jax.main import set_field
    from lorweb_jax.settings.config import check

    configs = {name: runpy.run_path(f"configs/{name}.py")["get_config"]() for name in JOBS}
    for change in changes:
        name, _, field = change.partition(".")
        if name not in configs:
            raise UserError(f"{change!r} names none of {', '.join(JOBS)}; give one such as {EXAMPLE}", 2)
        set_field(configs[name], field)
    for config in configs.values():
        check(config)
    return {name: config.to_dict() for name, config in configs.items()}


def finish(out: Path) -> None:
    """Writes runs/base_vae and the models of runs/base_transformer, as the jobs would, of the weights in `out`."""
    from flax import nnx
    from ml_collections import ConfigDict
    from safetensors.numpy import load_file

    from lorweb_jax.common.schema import read_json
    from lorweb_jax.files.state import build
    from lorweb_jax.images.io import write_image
    from lorweb_jax.models.autoencoder.model import AutoencoderKL
    from lorweb_jax.settings import config as configs
    from lorweb_jax.small_base.editor import Editor, editor_config
    from lorweb_jax.small_base.jobs.transformer import write_editor
    from lorweb_jax.small_base.jobs.vae import BaseVAE, write_autoencoder

    record = read_json(out / "base.json", remedy="name the folder that a training by gpu_base.py left")
    if "configs" not in record:
        raise UserError(f"{out / 'base.json'} doesn't say which configs were trained; train again", 2)
    made = {name: ConfigDict(record["configs"][name]) for name in JOBS}
    for name, config in made.items():
        configs.save(config, Path("runs") / name / "config.json")
    job = BaseVAE(made["base_vae"])
    vae = build(lambda: AutoencoderKL(job.vae_config, rngs=nnx.Rngs(0)), load_file(out / "vae.safetensors"))
    write_autoencoder(Path("runs/base_vae"), job, vae, record["scaling_factor"], record["shift_factor"])
    for name, picture in job.log_images(vae, 0).items():
        write_image(Path(f"runs/base_vae/pictures/{name}.png"), picture)
    sizes = editor_config(made["base_transformer"], *map(int, np.load(PREPARED / "captions.npz")["words"]))
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(PREPARED / "tokenizers" / part, Path("runs/base_transformer") / part, dirs_exist_ok=True)
    curves = {key: record[key] for key in ("device", "sizes", "transformer")}
    (Path("runs/base_transformer") / "curves.json").write_text(json.dumps(curves) + "\n")
    editor = build(
        lambda: Editor(sizes, 1, rngs=nnx.Rngs(0)),
        {name: array.astype(np.float32) for name, array in load_file(out / "transformer.safetensors").items()},
    )
    write_editor(Path("runs/base_transformer"), sizes, editor)
