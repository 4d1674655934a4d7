"""The transformer and the autoencoder of FLUX in files: loading, saving, conversion. sources.py recognises them."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import read_json
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.conversion import FINISHED, Progress, Run, check, one_sentence_if_full, record, write_files
from lorweb_jax.files.safetensors_io import Spec, index_of, shards_of, write_json, write_sharded
from lorweb_jax.files.state import require_equal
from lorweb_jax.files.table import Layout, RowRange, Stored, tensors_of
from lorweb_jax.models.flux1.record import LAYOUTS
from lorweb_jax.pipeline.sources import KINDS, Source, recognise, recognise_all

__all__ = [
    "KINDS",
    "LAYOUTS",
    "Source",
    "convert",
    "load_transformer",
    "load_vae",
    "open_model",
    "recognise",
    "recognise_all",
    "save_folder",
    "save_transformer",
    "save_vae",
    "verify",
]

_STEM = "diffusion_pytorch_model"
_SHARD_BYTES = 10_000_000_000


def open_model(path: str | Path, kind: str) -> tuple[dict[str, Any], Stored]:
    """(config.json's contents, weights that are not yet read) of a FLUX transformer or vae in either layout.

    Raises UserError for a missing or foreign file, and with the differences where file and config disagree.
    """
    sources = recognise_all(path).sources
    source = next((source for source in sources if source.kind == kind), None)
    if source is None:
        raise UserError(f"{path} holds a FLUX {sources[0].kind}, expected a {kind}; give the {kind} folder")
    model = KINDS[kind]
    return source.config, Stored(
        source.checkpoint, model.rows(source.config, source.layout), model.shapes(source.config)
    )


def load_transformer(path: str | Path, dtype: Any = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json's contents, {our path: array}) of a FLUX transformer in its dtype or in `dtype`; see open_model."""
    config, stored = open_model(path, "transformer")
    return config, stored.load(dtype)


def load_vae(path: str | Path, dtype: Any = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same for the autoencoder."""
    config, stored = open_model(path, "vae")
    return config, stored.load(dtype)


def save_transformer(folder: str | Path, config: Mapping[str, Any], flat: Mapping[str, Any], dtype: Any = None) -> None:
    """Write `folder`/config.json and weights in diffusers' layout, in the arrays' dtypes or in `dtype`."""
    save_folder(folder, config, flat, KINDS["transformer"].rows(dict(config), "diffusers"), dtype)


def save_vae(folder: str | Path, config: Mapping[str, Any], flat: Mapping[str, Any], dtype: Any = None) -> None:
    """The same for the autoencoder."""
    save_folder(folder, config, flat, KINDS["vae"].rows(dict(config), "diffusers"), dtype)


def save_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    flat: Mapping[str, Any],
    rows: list,
    dtype: Any = None,
    stem: str = _STEM,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write any model that has a conversion table as a folder: weights `stem`.safetensors (or shards), config.json.

    Files of an earlier writing with the same stem are replaced. transformers' models have the stem "model".
    """
    folder = Path(folder)
    earlier = set(folder.glob(f"{stem}*.safetensors")) | set(folder.glob(f"{stem}*.safetensors.index.json"))
    files = write_sharded(folder, stem, *tensors_of(flat, rows, dtype), max_shard_bytes)
    index = {folder / f"{stem}.safetensors.index.json"} if len(files) > 1 else set()
    for file in earlier - set(files) - index:
        file.unlink()
    write_json(folder / "config.json", _without_paths(config))


def target_of(source: Source, layout: str, out: str | Path) -> Path:
    """What `convert` will write. UserError if the name exists already."""
    model = KINDS[source.kind]
    target = Path(out) / (model.single_file if layout == "black_forest" else source.kind)
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; remove it or give another output folder")
    return target


def convert(
    source: Source,
    layout: str,
    out: str | Path,
    dtype: Any = None,
    max_shard_bytes: int = _SHARD_BYTES,
    progress: Progress | None = None,
) -> tuple[Path, dict[str, Spec]]:
    """Write `source` in `layout` below the folder `out`; returns (what was written, its tensors).

    diffusers: out/transformer or out/vae, with config.json and checksums.json. black_forest: out/flux1-kontext or
    out/ae.safetensors, and .checksums.json. The name appears when everything is written and its header read again;
    until then all is in a folder NAME.partial, whose finished files the same call keeps after a kill or a full
    disk. Raises UserError if the name exists already, or if the source's tensors are not exactly those of its config.
    """
    model, checkpoint = KINDS[source.kind], source.checkpoint
    single = layout == "black_forest"
    target = target_of(source, layout, out)
    parameter_shapes = model.shapes(source.config)
    here = Layout(model.rows(source.config, source.layout), parameter_shapes)
    there = Layout(model.rows(source.config, layout), parameter_shapes)
    here.require(checkpoint)
    rows = {key: there.rows_in(here, key) for key in there.tensors}
    specs = {
        key: Spec(shape, np.dtype(dtype or checkpoint.dtype(rows[key][0].key))) for key, shape in there.tensors.items()
    }
    files = {target.name: specs} if single else shards_of(_STEM, specs, max_shard_bytes)
    task = {
        "source": [[file.name, (found := file.stat()).st_size, found.st_mtime_ns] for file in checkpoint.files],
        "layout": layout,
        "dtype": dtype and np.dtype(dtype).name,
        "shard size": None if single else max_shard_bytes,
    }
    partial = target.with_name(target.name + ".partial")
    digests = write_files(partial, files, lambda key: [_run(checkpoint, part) for part in rows[key]], task, progress)
    with one_sentence_if_full(partial):
        if len(files) > 1:
            write_json(partial / f"{_STEM}.safetensors.index.json", index_of(files))
        written = Checkpoint(partial / target.name if single else partial)
        require_equal(written.shapes, there.tensors, str(partial))
        write_json(_checksums(target if single else partial), record(written, digests))
        if not single:
            write_json(partial / "config.json", _without_paths(source.config))
    os.replace(partial / target.name if single else partial, target)
    (partial if single else target).joinpath(FINISHED).unlink()
    if single:
        partial.rmdir()
    return target, specs


def _run(checkpoint: Checkpoint, rows: RowRange) -> Run:
    """Rows of a tensor as bytes to be copied, or decoded."""
    entry = checkpoint.entries[rows.key]
    return Run(checkpoint.extent(*rows), entry.dtype, entry.decoder, rows.start * math.prod(entry.shape[1:]))


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the folder that its model once lay in, which diffusers notes and nobody reads."""
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def _checksums(path: Path) -> Path:
    """Where the checksums of a file or a folder stand."""
    return path / "checksums.json" if path.is_dir() else path.with_suffix(".checksums.json")


def verify(path: str | Path, progress: Progress | None = None) -> list[Checkpoint]:
    """Read again what `convert` wrote (a file, a folder, or the folder that holds several) and compare checksums.

    Returns what was found to be as it was written. Raises UserError for any difference, or if no checksums are there.
    """
    path = Path(path)
    paths = [
        each
        for each in (path, *sorted(path.glob("*")))
        if (each.is_dir() or each.suffix == ".safetensors" and each.exists()) and _checksums(each).exists()
    ]
    if not paths:
        raise UserError(
            f"{path} has no {_checksums(path).name}, which converting writes; give what convert_flux_weights.py wrote"
        )
    checkpoints = [Checkpoint(each) for each in paths]
    for each, checkpoint in zip(paths, checkpoints):
        check(checkpoint, read_json(_checksums(each)), progress)
    return checkpoints
