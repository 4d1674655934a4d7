"""The published basis format (method.md §6): one safetensors file and a config.yaml beside it.

Keys are `transformer.<layer>.lora_A [n,i,r]`, `.lora_B [n,r,o]`, `.lora_keys [n,k]`, `.att_lora_to_q.weight [k,q]`,
with diffusers' layer names, block index included. Ours stack the blocks: {path: {"a", "b", "keys", "projection"}}.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml

from lorweb_jax.adapters.basis import AdaptedLayer
from lorweb_jax.adapters.config import BasisConfig
from lorweb_jax.adapters.formats import identify
from lorweb_jax.adapters.formats.layer_names import layer_name, split_layer_name, stack_blocks
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.outputs import replacing
from lorweb_jax.common.schema import Between, Heads, Width, checked, read_yaml, shown
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import FORMAT, write
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.identity import NAMES, is_sketch, publishable

Arrays = dict[str, dict[str, np.ndarray]]

# Our part of a layer's basis -> how its key ends in the published file.
_SUFFIXES = {"a": "lora_A", "b": "lora_B", "keys": "lora_keys", "projection": "att_lora_to_q.weight"}
_PREFIX = "transformer."
# In the header, where other readers don't look: a sketch of the image encoder that the basis was trained with.
_SKETCH = "lorweb_jax.image_encoder"
# network_kwargs as published -> the field of BasisConfig that holds the same value. lora_softmax, external_query and
# external_query_dim are translated in code.
_SAME = {
    "loras_num": "size",
    "lora_keys_dim": "key_dim",
    "lora_heads": "heads",
    "mixing_coeffs_type": "reduction",
    "query_mode": "query_mode",
    "query_projection_type": "projection",
    "pooling_type": "pooling",
    "external_query_model": "encoder",
}


@dataclasses.dataclass(frozen=True)
class _Process:
    network: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Job:
    process: Annotated[list[_Process], Between(1, math.inf)]


@dataclasses.dataclass(frozen=True)
class _Document:
    """config.yaml."""

    config: _Job


@dataclasses.dataclass(frozen=True)
class _Kwargs:
    """`network_kwargs` as published; null is what is left out."""

    loras_num: Width | None = None
    lora_keys_dim: Width | None = None
    lora_heads: Heads | None = None
    lora_softmax: bool | None = None
    mixing_coeffs_type: Literal["mean", "sum"] | None = None
    external_query: bool | None = None
    external_query_dim: Width | None = None
    external_query_model: str | None = None
    query_mode: str | None = None
    query_projection_type: Literal["linear", "none"] | None = None
    pooling_type: Literal["avg", "max"] | None = None


@dataclasses.dataclass(frozen=True)
class _Network:
    linear: Width
    network_kwargs: dict[str, Any]


_KNOWN = {field.name for field in dataclasses.fields(_Kwargs)}


def read_basis(
    path: str | Path, config_path: str | Path | None = None, layers: Mapping[str, AdaptedLayer] | None = None
) -> tuple[BasisConfig, Arrays]:
    """(config, {path: {"a" [l,n,i,r], "b" [l,n,r,o], "keys" [l,n,k], "projection" [l,k,q]}}) in the file's dtype.

    path: the .safetensors file, or a folder that holds one. config_path: its config.yaml, by default beside the file;
    without one, sizes come from the tensors, the published defaults fill the rest, and a sentence on stderr says so.
    layers: of the model it must fit, by path. Raises UserError that names the layer, what it has and what it
    should have.
    """
    checkpoint = Checkpoint(path)
    arrays = _read_arrays(checkpoint)
    file = checkpoint.files[0]
    beside = Path(config_path) if config_path else file.with_name("config.yaml")
    if config_path or os.path.lexists(beside):  # a link to nothing is no basis without a config
        config = config_from_network(read_network(beside), arrays, str(beside))
    else:
        config = config_from_tensors(arrays)
        print(
            f"{file.parent} has no config.yaml: taking {config.heads} head, {config.activation}, "
            f"{config.reduction}, {config.query} query {config.query_mode}; "
            "give the right file with --basis-config if that's wrong",
            file=sys.stderr,
        )
    if layers is not None:
        require_fits(arrays, layers, str(file))
    if sketch := checkpoint.metadata.get(_SKETCH):
        if not is_sketch(sketch):
            raise UserError(
                f"{file} has {_SKETCH} = {shown(sketch)} in its header, which is no sketch of an image "
                "encoder; download it again"
            )
        config = dataclasses.replace(config, encoder_sketch=sketch)
    return config, arrays


def write_basis(
    path: str | Path, config: BasisConfig, arrays: Mapping[str, Mapping[str, Any]], dtype: Any = None
) -> None:
    """Write the .safetensors file and config.yaml beside it, in the arrays' dtypes or in `dtype`.

    The format has no scale: a scale other than 1 is multiplied into lora_B. Nor has it a temperature: keys are divided
    by it, which gives the same coefficients. A config.yaml that describes this basis is
    left as it is. Nothing of this machine is written, such as the encoder's path; a line says so where the published
    program doesn't know the encoder. Raises UserError for a basis without a router, numbers that `dtype` can't hold,
    and where config.yaml is of something else.
    """
    path = Path(path)
    network = network_from_config(config)
    config_file = path.with_name("config.yaml")
    others = [file.name for file in path.parent.glob("*.safetensors") if file.name != path.name]
    described = config_file.exists() and _describes(config_file, config, arrays)
    if config_file.exists() and not described and (others or not path.exists()):
        raise UserError(
            f"{config_file} belongs to {others[0] if others else 'something else'} and differs from this "
            "basis's config; write this basis into a folder of its own"
        )
    tensors = {}
    for stack, parts in arrays.items():
        for part, stacked in parts.items():
            if part == "log_temperature":
                continue
            stacked = np.asarray(stacked)
            if part == "keys":
                stacked = _divided(stacked, config, parts.get("log_temperature"))
            if part == "b" and config.scale != 1.0:
                stacked = stacked * np.asarray(config.scale, stacked.dtype)
            with np.errstate(over="ignore"):  # `write` tells
                stacked = stacked.astype(dtype or stacked.dtype)
            for layer, array in enumerate(stacked):
                tensors[f"{_PREFIX}{layer_name(stack, layer)}.{_SUFFIXES[part]}"] = array
    write(path, tensors, FORMAT | ({_SKETCH: config.encoder_sketch} if config.encoder_sketch else {}))
    if not described:
        with replacing(config_file) as temporary:
            document = {"job": "extension", "config": {"name": path.stem, "process": [{"network": network}]}}
            temporary.write_text(yaml.safe_dump(document, sort_keys=False))
    if (name := network["network_kwargs"].get("external_query_model")) not in (None, *NAMES):
        say(
            f"{config_file} names the image encoder {name}: it is neither {' nor '.join(NAMES)}, the only ones that "
            "the published program builds, so that this basis can be used by lorweb_jax alone"
        )


def _divided(keys_lnk: np.ndarray, config: BasisConfig, log_temperature: Any) -> np.ndarray:
    """Keys that give the same scores at temperature 1."""
    temperature = np.float32(config.temperature if config.temperature_mode == "fixed" else 1.0)
    if log_temperature is not None:
        temperature = np.exp(np.asarray(log_temperature, np.float32))[:, None, None]
    return keys_lnk if np.all(temperature == 1.0) else (keys_lnk / temperature).astype(keys_lnk.dtype)


def unpublishable(config: BasisConfig) -> str:
    """Why the published format can't hold a basis; empty where it can."""
    if not config.coefficients.has_router:
        return (
            "this basis has fixed coefficients and no router, which the published format cannot hold; "
            "export it as an ordinary LoRA instead"
        )
    if config.appended:
        return (
            f"the basis has appended members ({', '.join(name for name, _ in config.appended)}) without router keys, "
            "which the published format cannot hold; export the basis that they were appended to"
        )
    if config.normalised:
        return (
            "this basis normalises query and keys (basis.normalised), which the published format cannot hold; "
            "give its run's folder, or export one analogy's mix as an ordinary LoRA"
        )
    return ""


def _describes(config_file: Path, config: BasisConfig, arrays: Mapping[str, Mapping[str, Any]]) -> bool:
    try:
        stated = config_from_network(read_network(config_file), arrays)
    except UserError:
        return False
    folded = {"scale": 1.0, "temperature": 1.0, "temperature_mode": "fixed", "key_scale": 1.0}
    return stated == dataclasses.replace(config, **folded, encoder=publishable(config.encoder), encoder_sketch="")


def read_network(path: str | Path) -> dict[str, Any]:
    """`config.process[0].network` of a config.yaml. UserError if the file is missing or holds no such thing."""
    return read_yaml(path, _Document, remedy="give the basis's config.yaml").config.process[0].network


def config_from_network(network: Mapping[str, Any], arrays: Arrays, where: str = "the config") -> BasisConfig:
    """BasisConfig of the published words {linear, network_kwargs}; the query's width comes from the tensors.

    Raises UserError for unknown network_kwargs and where a size disagrees with the tensors.
    """
    outer = checked(dict(network), _Network, f"{where}: config.process[0].network")
    if unknown := sorted(set(outer.network_kwargs) - _KNOWN):
        raise UserError(
            f"{where} has unknown network_kwargs {', '.join(map(shown, unknown))}; known are "
            f"{', '.join(sorted(_KNOWN))}: remove what this basis doesn't need"
        )
    kwargs = checked(outer.network_kwargs, _Kwargs, f"{where}: config.process[0].network.network_kwargs")
    sizes = _sizes(arrays)
    fields = {ours: value for theirs, ours in _SAME.items() if (value := getattr(kwargs, theirs)) is not None}
    fields["rank"] = outer.linear
    fields["activation"] = "tanh" if kwargs.lora_softmax is False else "softmax"
    fields["query"] = "internal" if kwargs.external_query is False else "external"
    if fields["query"] == "external" and "query_mode" in fields:
        queries.query_mode(fields["query_mode"])  # refuses an unknown one
    fields["projection"] = fields.get("projection") or "linear"
    for name, actual in (
        ("rank", sizes["rank"]),
        ("size", sizes["size"]),
        ("key_dim", sizes["key_dim"]),
        ("projection", sizes["projection"]),
    ):
        if fields.setdefault(name, actual) != actual:
            raise UserError(
                f"{where} says {name} = {fields[name]}, but the tensors have {actual}; "
                "use the config.yaml that belongs to this file"
            )
    fields["query_dim"] = sizes["query_dim"] if fields["query"] == "external" else None
    return BasisConfig(**fields)


def network_from_config(config: BasisConfig) -> dict[str, Any]:
    """Inverse of `config_from_network`. UserError for what the format cannot hold, see `unpublishable`."""
    if reason := unpublishable(config):
        raise UserError(reason)
    kwargs = {theirs: getattr(config, ours) for theirs, ours in _SAME.items()}
    kwargs |= {"lora_softmax": config.activation == "softmax", "external_query": config.query == "external"}
    if config.query == "external":
        # The published field is the width of one embedding; three are concatenated in the cat- modes.
        kwargs["external_query_dim"] = config.query_dim // (3 if config.query_mode.startswith("cat-") else 1)
    if config.query == "external" and config.encoder:
        kwargs["external_query_model"] = publishable(config.encoder)
    else:
        del kwargs["external_query_model"]
    return {"type": "lora", "linear": config.rank, "linear_alpha": config.rank, "network_kwargs": kwargs}


def config_from_tensors(arrays: Arrays) -> BasisConfig:
    """Sizes from the tensors; one head, softmax and the paper's query where nothing tells."""
    sizes = _sizes(arrays)
    internal = sizes["projection"] == "linear" and all(
        parts["projection"].shape[2] == parts["a"].shape[2] for parts in arrays.values()
    )
    if internal:
        return BasisConfig(**sizes | {"query": "internal", "query_mode": "aa'bb'", "query_dim": None})
    return BasisConfig(**sizes)


def require_fits(arrays: Arrays, layers: Mapping[str, AdaptedLayer], what: str) -> None:
    """UserError that names the first layer whose depth or widths are not the model's."""
    for path, parts in arrays.items():
        if path not in layers:
            raise UserError(
                f"{what} adapts {layer_name(path, 0)}, which the model hasn't got; use the basis with "
                "the model that it was trained on"
            )
        actual = (parts["a"].shape[0], parts["a"].shape[2], parts["b"].shape[3])
        expected = (layers[path].depth, layers[path].inputs, layers[path].outputs)
        if actual != expected:
            blocks = "{} blocks of width {} -> {}".format
            raise UserError(
                f"{what}: {layer_name(path, 0)} has {blocks(*actual)}, the model has {blocks(*expected)}; "
                "use the basis with the model that it was trained on"
            )


def _read_arrays(checkpoint: Checkpoint) -> Arrays:
    """Stacked arrays of every layer kind, checked against each other."""
    parts: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    parts_of_suffix = {suffix: part for part, suffix in _SUFFIXES.items()}
    checkpoint.require_floats()
    for key in checkpoint:
        layer, suffix = next(
            ((key.removesuffix("." + suffix), suffix) for suffix in parts_of_suffix if key.endswith("." + suffix)),
            (None, None),
        )
        place = split_layer_name(layer.removeprefix(_PREFIX)) if layer and layer.startswith(_PREFIX) else None
        if place is None:
            kind = identify.by_names(checkpoint, flux=True)
            if kind and kind[0] != identify.BASIS:
                raise UserError(f"{checkpoint.path} is {kind[0]}, not {identify.BASIS}; {kind[1]}")
            raise UserError(
                f"{checkpoint.path} holds {shown(key)}, which is not a key of the published basis format "
                "(transformer.<layer>.lora_A, …); give a LoRWeB basis"
            )
        parts.setdefault((place[0], parts_of_suffix[suffix]), {})[place[1]] = checkpoint.read(key)
    arrays: Arrays = {}
    for (path, part), blocks in parts.items():
        arrays.setdefault(path, {})[part] = stack_blocks(path, blocks, f"{checkpoint.path}: {_SUFFIXES[part]}")
    if not arrays:
        raise UserError(f"{checkpoint.path} holds no tensors; give a LoRWeB basis")
    _require_consistent(arrays, str(checkpoint.path))
    return arrays


def _require_consistent(arrays: Arrays, what: str) -> None:
    """Every layer has all parts and agrees with itself; n, r and k are the same in all layers."""
    expected = {part for parts in arrays.values() for part in parts} | {"a", "b", "keys"}
    reference = None
    for path, parts in arrays.items():
        name = layer_name(path, 0)
        if absent := [_SUFFIXES[part] for part in _SUFFIXES if part in expected and part not in parts]:
            raise UserError(f"{what}: {name} has no {absent[0]}; every layer needs one: download the file again")
        letters = {"a": "lnir", "b": "lnro", "keys": "lnk", "projection": "lkq"}
        sizes: dict[str, int] = {}
        for part, array in parts.items():
            if array.ndim != len(letters[part]):
                raise UserError(
                    f"{what}: {name} has {_SUFFIXES[part]} {list(array.shape[1:])}, expected axes "
                    f"{','.join(letters[part][1:])}; give a LoRWeB basis"
                )
            for letter, size in zip(letters[part], array.shape):
                if sizes.setdefault(letter, size) != size:
                    counted = "the number of blocks" if letter == "l" else letter
                    raise UserError(
                        f"{what}: {name} has {_SUFFIXES[part]} {list(array.shape[1:])} with {counted} = "
                        f"{size}, but {sizes[letter]} in its other tensors; download the file again"
                    )
        shared = {letter: sizes[letter] for letter in "nrk"}
        reference = reference or (name, shared)
        if shared != reference[1]:
            raise UserError(
                f"{what}: {name} has (n, r, k) = {tuple(shared.values())}, but {reference[0]} has "
                f"{tuple(reference[1].values())}; they must be the same in all layers"
            )


def _sizes(arrays: Arrays) -> dict[str, Any]:
    parts = next(iter(arrays.values()))
    projection = parts.get("projection")
    return {
        "size": parts["a"].shape[1],
        "rank": parts["a"].shape[3],
        "key_dim": parts["keys"].shape[2],
        "projection": "none" if projection is None else "linear",
        "query_dim": parts["keys"].shape[2] if projection is None else projection.shape[2],
    }
