"""What files hold of FLUX: its transformer, its autoencoder or both, in which layout, stored in which way."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from lorweb_jax.adapters.formats import identify
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import read_json, shown
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.gguf_file import MAGIC, read_gguf
from lorweb_jax.files.scaled import MARKER, unscaled
from lorweb_jax.files.state import shapes
from lorweb_jax.files.table import Row
from lorweb_jax.models.autoencoder import table as vae_table
from lorweb_jax.models.autoencoder.model import AutoencoderKL, VAEConfig
from lorweb_jax.models.flux1.config import FluxConfig, black_forest_config
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone


class Kind(NamedTuple):
    """One model: its shapes and its tables for a config.json, and what tells its files from others."""

    sizes: Callable[[dict[str, Any], str | Path], Any]  # UserError for a config.json that makes no sense
    shapes: Callable[[dict[str, Any]], dict[str, Any]]
    rows: Callable[[dict[str, Any], str], list[Row]]
    infer_config: Callable[[Mapping[str, tuple[int, ...]], str], dict[str, Any]]
    marks: dict[str, str]  # layout -> how a key of it begins
    prefixes: tuple[str, ...]  # what files put before every name
    single_file: str  # the name in Black Forest Labs' layout
    class_name: str  # in diffusers' config.json


def _vae_rows(config: dict[str, Any], layout: str) -> list[Row]:
    sizes = VAEConfig.from_json(config)
    table = vae_table.diffusers if layout == "diffusers" else vae_table.black_forest
    return table(len(sizes.block_out_channels), sizes.layers_per_block)


KINDS = {
    "transformer": Kind(
        FluxConfig.from_json,
        lambda config: shapes(lambda: Flux(FluxConfig.from_json(config), rngs=nnx.Rngs(0))),
        lambda config, layout: backbone(FluxConfig.from_json(config)).table(layout),
        black_forest_config,
        {"diffusers": "single_transformer_blocks.", "black_forest": "single_blocks."},
        ("", "model.diffusion_model.", "diffusion_model.", "transformer."),
        "flux1-kontext.safetensors",
        "FluxTransformer2DModel",
    ),
    "vae": Kind(
        VAEConfig.from_json,
        lambda config: shapes(lambda: AutoencoderKL(VAEConfig.from_json(config), rngs=nnx.Rngs(0))),
        _vae_rows,
        vae_table.black_forest_config,
        {"diffusers": "encoder.down_blocks.", "black_forest": "encoder.down."},
        ("", "vae.", "first_stage_model."),
        "ae.safetensors",
        "AutoencoderKL",
    ),
}
# What all-in-one checkpoints hold beside these two: how keys begin -> what it is.
_BESIDE = {
    "text_encoders.clip_l.": "CLIP's text encoder",
    "text_encoders.t5xxl.": "T5's text encoder",
    "text_encoders.": "text encoders",
    "text_encoder.": "CLIP's text encoder",
    "text_encoder_2.": "T5's text encoder",
    "cond_stage_model.": "text encoders",
    "conditioner.": "text encoders",
    "clip_l.": "CLIP's text encoder",
    "t5xxl.": "T5's text encoder",
    "model_ema.": "averaged weights",
}


class Source(NamedTuple):
    """Weights of one model, recognised: kind is a key of KINDS, layout one of LAYOUTS."""

    kind: str
    layout: str
    config: dict[str, Any]  # as diffusers' config.json
    checkpoint: Checkpoint


class Contents(NamedTuple):
    """The models of FLUX in a file, and what else it holds, in words."""

    sources: list[Source]
    left_out: list[str]


def recognise(path: str | Path, config_path: str | Path | None = None) -> Source:
    """The one model in `path`; see recognise_all. UserError if it holds two."""
    sources = recognise_all(path, [config_path] if config_path else []).sources
    if len(sources) > 1:
        raise UserError(
            f"{path} is an all-in-one checkpoint; convert it into diffusers' folders first, with "
            "tools/convert_flux_weights.py"
        )
    return sources[0]


def recognise_all(path: str | Path, config_paths: Sequence[str | Path] = ()) -> Contents:
    """What `path` (a safetensors or GGUF file, or a folder with config.json) holds, by its tensors' names.

    All-in-one checkpoints hold both models and more. fp8 weights with scales are multiplied by them, packed ones
    unpacked, when they are read. A model's config is that of `config_paths` with its class, or config.json in the
    folder or beside the file, or (Black Forest Labs' layout only) read off the shapes.
    Raises UserError, which says what else it is, if the files are not a FLUX transformer or autoencoder.
    """
    checkpoint, what = _open(Path(path))
    if other := identify.not_flux(checkpoint):
        raise UserError(f"{path} is {other[0]}, not a FLUX transformer or autoencoder; {other[1]}")
    parts = [
        (kind, layout, prefix)
        for kind, model in KINDS.items()
        for layout, mark in model.marks.items()
        for prefix in model.prefixes
        if any(key.startswith(prefix + mark) for key in checkpoint)
    ]
    if not parts:
        raise _unknown(path, checkpoint, what)
    if len({kind for kind, *_ in parts}) < len(parts):
        raise UserError(f"{path} holds two FLUX {parts[0][0]}s; keep one of them in a file of its own")
    of_models = {key for _, _, prefix in parts for key in checkpoint if key.startswith(prefix)}
    rest = [key for key in checkpoint if key not in of_models and key != MARKER]
    whole = len(parts) > 1 or bool(rest)
    configs = [(file, read_json(file)) for file in config_paths]
    sources = []
    for kind, layout, prefix in parts:
        group = unscaled(checkpoint.below(prefix))
        where = f"{path}, an all-in-one checkpoint: its {kind}" if whole else f"{path}: the FLUX {kind}"
        sources.append(Source(kind, layout, _config(kind, layout, group, where, configs, len(parts)), group))
    return Contents(sources, _in_words(rest))


def _open(path: Path) -> tuple[Checkpoint, str]:
    """(the tensors, what kind of file it is if that isn't safetensors)."""
    if path.is_dir() and not any(path.glob("*.safetensors*")) and len(packed := list(path.glob("*.gguf"))) == 1:
        path = packed[0]
    if path.is_file():
        with open(path, "rb") as stream:
            begins = stream.read(len(MAGIC))
        if begins == MAGIC:
            checkpoint, architecture = read_gguf(path)
            return checkpoint, f" of the architecture {shown(architecture)}"
    return Checkpoint(path), ""


def _unknown(path: str | Path, checkpoint: Checkpoint, what: str) -> UserError:
    if other := identify.by_names(checkpoint):
        return UserError(f"{path} is {other[0]}, not a FLUX transformer or autoencoder; {other[1]}")
    first = shown(next(iter(checkpoint))) if checkpoint else "none at all"
    return UserError(
        f"{path} holds {len(checkpoint)} tensors{what} ({first}, …), which are not a FLUX transformer's "
        "or autoencoder's in diffusers' or Black Forest Labs' layout; give such a file or folder"
    )


def _config(
    kind: str,
    layout: str,
    checkpoint: Checkpoint,
    where: str,
    configs: Sequence[tuple[str | Path, dict[str, Any]]],
    models: int,
) -> dict[str, Any]:
    for file, config in configs:
        name = config.get("_class_name")
        if name == KINDS[kind].class_name or name is None and models == 1:
            return _checked(kind, config, file)
        if models == len(configs) == 1:
            raise UserError(
                f"{file} is the config of {shown(name)}, and {where} needs one of "
                f"{KINDS[kind].class_name}; give the config that belongs to it"
            )
    if layout == "black_forest":
        return _checked(kind, KINDS[kind].infer_config(checkpoint.shapes, where), where)
    beside = checkpoint.path / "config.json" if checkpoint.path.is_dir() else checkpoint.path.with_name("config.json")
    if not beside.exists():
        raise UserError(
            f"{where} is in diffusers' layout, whose sizes stand in a config.json, and {beside} does not "
            "exist; put it there, or name it with --model-config"
        )
    return _checked(kind, read_json(beside), beside)


def _checked(kind: str, config: dict[str, Any], source: str | Path) -> dict[str, Any]:
    KINDS[kind].sizes(config, source)
    return config


def _in_words(keys: Sequence[str]) -> list[str]:
    """What these tensors are that belong to neither model."""
    counts: dict[str, int] = {}
    for key in keys:
        what = next((what for start, what in _BESIDE.items() if key.startswith(start)), shown(key.split(".")[0]))
        counts[what] = counts.get(what, 0) + 1
    return [f"{what} ({count} tensors)" for what, count in counts.items()]
