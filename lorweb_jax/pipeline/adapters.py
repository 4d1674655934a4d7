"""A basis from whatever holds one: a published file or folder, an ordinary LoRA, or a run's folder."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import AdaptedLayer, BasisConfig
from lorweb_jax.adapters.formats.basis_file import Arrays, read_basis, require_fits
from lorweb_jax.adapters.formats.identify import lora_scheme
from lorweb_jax.adapters.formats.lora_read import read_lora
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.fingerprint import of_folder
from lorweb_jax.common.finite import require_finite
from lorweb_jax.common.outputs import require_new_folder
from lorweb_jax.common.schema import checked, read_json
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.hub_cache import BASIS_FILES, existing
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.models.image_encoder.identity import Identity, identity, is_sketch, publishable

ENCODER = "encoder.json"  # in a run's folder: which image encoder the basis was trained with
_PARAMETER = re.compile(r"(?:.*\.)?layers\.(?P<path>.+)\.(?P<part>a|b|keys|projection|log_temperature)")


def load_basis(
    path: str | Path, layers: Mapping[str, AdaptedLayer], config_path: str | Path | None = None
) -> tuple[BasisConfig, Arrays]:
    """What `Basis.from_arrays` takes: (config, {path: {"a" [l,n,i,r], "b" [l,n,r,o], "keys" [l,n,k], "projection"
    [l,k,q]}}).

    path: a published basis (its file, or a folder with the file and config.yaml), an ordinary LoRA's file (a basis
    of one member with the coefficient 1), the folder of a training run, or a Hub name of such files. A run of Pair
    Customization is a basis of its adapters, with the mixes style (the default), content and both by name.
    layers: of the model by path, which the basis must fit (`Backbone.adapted`). Raises UserError if it holds none
    of these, or a basis of another model.
    """
    path = existing_basis(path)
    if is_run(path):
        config, arrays = _pair_of_run(path, layers) if job_of(path) == "pair" else basis_of_run(path)
        require_fits(arrays, layers, str(path))
        return config, arrays
    if lora_scheme(Checkpoint(path)):
        return read_lora(path, layers)
    return read_basis(path, config_path, layers)


def existing_basis(path: str | Path) -> Path:
    """The file or folder of a basis or LoRA, by its path or its Hub name; UserError where there is none."""
    return existing(path, BASIS_FILES, "a run's folder, a LoRWeB basis or a LoRA")


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a training run, one that was broken off before its first checkpoint included."""
    if (path / "checkpoints").is_dir():
        return True
    if not (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        return False
    with contextlib.suppress(UserError):
        return "job" in read_json(path / "config.json")
    return False


def job_of(workdir: Path) -> str:
    """The job of a training run, such as "pair"; UserError where its config is missing or damaged."""
    from lorweb_jax.runs.checkpoints import CONFIG
    from lorweb_jax.settings import config as configs

    return configs.load(workdir / CONFIG).job


def _pair_of_run(workdir: Path, layers: Mapping[str, AdaptedLayer]) -> tuple[BasisConfig, Arrays]:
    from lorweb_jax.pipeline.pair_run import members_of_run

    members = members_of_run(workdir, layers)
    names = sorted(members, reverse=True)  # style first, if there is one
    table = {name: [float(each == name) for each in names] for name in names}
    if len(names) > 1:
        table["both"] = [1.0] * len(names)
    say(
        f"{workdir} is a run of Pair Customization: as a basis its mix {names[0]!r} takes part in full and without "
        "style guidance; a strength scales it, and python -m lorweb_jax.stylize guides by it"
    )
    rank = max(member.rank for member in members.values())
    config = BasisConfig(size=len(names), rank=rank, query="fixed", query_dim=None, table=table)
    return config, pair.stack([members[name] for name in names], layers)


def basis_of_run(workdir: Path, step: int | None = None) -> tuple[BasisConfig, Arrays]:
    """The trained basis of a run, at its newest checkpoint or at `step`. UserError if it trains none."""
    from lorweb_jax.runs.checkpoints import restore_trainables  # orbax, which published files don't need

    flat, run_config = restore_trainables(workdir, step)
    if "basis" not in run_config:
        raise UserError(
            f"{workdir} is a run of the job {run_config.job!r}, which trains no basis; "
            "give the folder of a run of configs/basis.py"
        )
    arrays = arrays_of_flat(flat)
    for path, parts in arrays.items():
        for part, array in parts.items():
            require_finite(
                array,
                f"the checkpoint of {workdir}: {path}.{part}",
                "take an earlier checkpoint, or train again with a lower learning rate",
            )
    source = f"{workdir / 'config.json'}: basis"
    config = checked(run_config.to_dict()["basis"], BasisConfig, source)
    # The width of an external query is the image encoder's, which a run finds out when it is built.
    projection = next((parts["projection"] for parts in arrays.values() if "projection" in parts), None)
    if config.coefficients.from_images and projection is not None:
        config = replace(config, query_dim=projection.shape[2])
    if config.coefficients.from_images and not config.encoder_sketch:
        config = replace(config, **_encoder_of(workdir, run_config))
    a, keys = (next(iter(arrays.values())).get(part) for part in ("a", "keys"))
    for name, stored in (
        ("size", a.shape[1]),
        ("rank", a.shape[3]),
        ("key_dim", config.key_dim if keys is None else keys.shape[2]),
    ):
        if getattr(config, name) != stored:
            raise UserError(
                f"{source}: {name} is {getattr(config, name)}, but the run's checkpoint has {stored}; use the "
                "config.json that belongs to it"
            )
    return config, arrays


def _encoder_of(workdir: Path, run_config: Any) -> dict[str, str]:
    """{"encoder", "encoder_sketch"}: as the run recorded them at its end; else of the folder that its config names, if
    that still holds the same encoder; else the name alone."""
    if (workdir / ENCODER).exists():
        encoder = read_json(workdir / ENCODER, Identity)
        if encoder.sketch and not is_sketch(encoder.sketch):
            raise UserError(f"{workdir / ENCODER} holds no sketch of an image encoder; delete it to go without")
        return {"encoder": publishable(encoder.name), "encoder_sketch": encoder.sketch}
    from lorweb_jax.runs.folder import SOURCES

    folder = Path(run_config.basis.encoder or Path(run_config.get("pipeline", ""), "clip_vision"))
    try:
        began_with = read_json(workdir / SOURCES, dict[str, str])["basis.encoder"]
        if of_folder(folder) == began_with:
            encoder = identity(folder)
            return {"encoder": encoder.name, "encoder_sketch": encoder.sketch}
    except (UserError, KeyError):  # of an older run, or no longer there
        pass
    return {"encoder": publishable(run_config.basis.encoder)}


def write_run(workdir: Path, config: BasisConfig, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a basis as a run's folder with one checkpoint, step 0, that `basis_of_run` and every command can read.

    It holds no optimizer and no data position. UserError if the folder is there already and not empty.
    """
    import orbax.checkpoint as ocp  # only needed here

    from lorweb_jax.runs import checksums

    workdir = Path(workdir)
    require_new_folder(workdir)
    flat = {
        f"layers.{path}.{part}": np.asarray(array) for path, parts in arrays.items() for part, array in parts.items()
    }
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave({"trainable": flat})))
    checksums.write(workdir / "checkpoints" / "0")
    write_json(workdir / "config.json", {"job": "basis", "train": {"ema": 0.0}, "basis": asdict(config)})


def arrays_of_flat(flat: Mapping[str, Any]) -> Arrays:
    """{"….layers.<path>.a": array} (a Basis's flat state, below any module) -> {path: {"a": array}}."""
    arrays: Arrays = {}
    for name, array in flat.items():
        match = _PARAMETER.fullmatch(name)
        if not match:
            raise UserError(f"the checkpoint holds {name}, which is no part of a basis; give a run that trained one")
        arrays.setdefault(match["path"], {})[match["part"]] = np.asarray(array)
    return arrays
