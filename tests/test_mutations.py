"""Every reader of files that users bring, given damaged ones: one sentence or a right result, soon, in little memory.

A result is right if the damage changed nothing of it, or if it is what an independent reader (the reference package,
json, transformers) makes of the same damaged file. READERS lists them: a new one takes one entry.

  python -m pytest tests/test_mutations.py --mutations 5000 --mutation-seed 7 -k safetensors

tries so many of each reader that it names. What fails is kept, and its path is told.
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mutations
import numpy as np
import pytest
import safetensors
import yaml
from PIL import Image

from lorweb_jax.adapters.basis import BasisConfig
from lorweb_jax.adapters.formats.basis_file import read_basis, write_basis
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import read_json
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.problems import Problems
from lorweb_jax.files.checkpoint import read_all
from lorweb_jax.files.safetensors_io import NAMES, Spec, write, write_sharded
from lorweb_jax.files.store import Store
from lorweb_jax.flow.schedule import Schedule
from lorweb_jax.images.io import read_image
from lorweb_jax.models.autoencoder.model import VAEConfig
from lorweb_jax.models.backbone import Linear
from lorweb_jax.models.clip import folder as clip
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.image_encoder.encoder import open_image_encoder
from lorweb_jax.models.image_encoder.processor import ImageProcessor
from lorweb_jax.models.siglip.model import SiglipConfig
from lorweb_jax.models.t5.model import T5Config, open_t5
from lorweb_jax.models.tokenizers import folder as tokenizers
from lorweb_jax.pipeline import pretrained
from lorweb_jax.pipeline.adapters import load_basis, write_run
from lorweb_jax.settings import config as configs
from lorweb_jax.training.writers import TextWriter
from parity.folder import read_recording

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "assets" / "small_kontext"
SECONDS, MEMORY = 20, 2 * 10**9  # for one file, on a busy core
LAYERS = {
    layer.path: layer
    for layer in (
        Linear("transformer_blocks.attn.to_q", "transformer_blocks", 2, 6, 6, "image", "column", True),
        Linear("single_transformer_blocks.proj_out", "single_transformer_blocks", 2, 10, 6, "joint", "row", True),
    )
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """make(folder) writes good files below a folder and returns the one that is damaged, by `edit`. read(folder) is
    what ours makes of them, anything that == compares; right(folder, result): whether that is right for what now lies
    there."""

    make: Callable[[Path], Path]
    edit: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], Any]
    right: Callable[[Path, Any], bool] = lambda folder, result: False
    count: int = 100


def copied(*names: str) -> Callable[[Path], Path]:
    """Copies files (or folders) of the small pipeline; the first one is to be damaged."""

    def make(folder: Path) -> Path:
        for name in names:
            target = folder / Path(name).name
            shutil.copytree(SMALL / name, target) if (SMALL / name).is_dir() else shutil.copy(SMALL / name, target)
        return folder / Path(names[0]).name

    return make


def written(name: str, data: bytes | str | Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = data if isinstance(data, (bytes, str)) else json.dumps(data)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder / name

    return make


def equal(a: Any, b: Any) -> bool:
    """==, but true is no 1, 1.0 no 1 and 0.0 no -0.0 where it matters: text of the values."""
    return repr(a) == repr(b)


# safetensors


def tensors(folder: Path, name: str = "a.safetensors") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """By the reference package; raises what it raises."""
    return {
        key: (array["dtype"], tuple(array["shape"]), bytes(array["data"]))
        for key, array in safetensors.deserialize((folder / name).read_bytes())
    }


def plain(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {key: (NAMES[array.dtype], array.shape, array.tobytes()) for key, array in arrays.items()}


def some_tensors(folder: Path, name: str = "a.safetensors") -> Path:
    write(
        folder / name,
        {
            "half": np.arange(6, dtype=np.float16).reshape(2, 3),
            "single": np.arange(4, dtype=np.float32),
            "brain": np.ones((2, 1, 2), ml_dtypes.bfloat16),
            "whole": np.arange(3),
            "one": np.ones((), np.float32),
            "none": np.zeros((0, 4), np.float32),
        },
        {"format": "pt", "note": "é"},
    )
    return folder / name


def some_shards(folder: Path) -> Path:
    arrays = {f"t{i}": np.full((2, 3), i, np.float32) for i in range(4)}
    write_sharded(
        folder,
        "model",
        {name: Spec(array.shape, array.dtype) for name, array in arrays.items()},
        arrays.__getitem__,
        50,
    )
    return folder / "model.safetensors.index.json"


def right_shards(folder: Path, result: Any) -> bool:
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    found = {key: value for file in set(index.values()) for key, value in tensors(folder, file).items()}
    return (
        set(index) <= set(found)
        and found == result
        and all((folder / file).parent == folder for file in index.values())
    )


# config.json of a model


def right_config(kind: type, name: str, **defaults: Any) -> Callable[[Path, Any], bool]:
    """Each field is what the file says, or what is left out stands for."""

    def right(folder: Path, result: Any) -> bool:
        stated = json.loads((folder / name).read_bytes())
        if kind is VAEConfig:
            stated = {field: value for field, value in stated.items() if value is not None}
        expected = {
            field.name: stated.get(field.name, defaults.get(field.name, field.default))
            for field in dataclasses.fields(kind)
        }
        found = {field: list(value) if isinstance(value, tuple) else value for field, value in vars(result).items()}
        expected = {
            field: float(value)
            if type(value) is int and type(found[field]) is float
            else list(value)
            if isinstance(value, tuple)
            else value
            for field, value in expected.items()
        }
        return equal(found, expected)

    return right


def config(kind: type, part: str, name: str = "config.json", **defaults: Any) -> Reader:
    return Reader(
        copied(f"{part}/{name}"),
        mutations.of_json,
        lambda folder: kind.from_json(read_json(folder / name), folder),
        right_config(kind, name, **defaults),
        150,
    )


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
STABLE_DIFFUSION = dict(
    latent_channels=4,
    block_out_channels=(64,),
    layers_per_block=1,
    use_quant_conv=True,
    use_post_quant_conv=True,
    scaling_factor=0.18215,
    shift_factor=0.0,
    sample_size=32,
)


def right_processor(folder: Path, result: ImageProcessor) -> bool:
    """transformers' processor of the same file makes the same of an image."""
    from transformers import CLIPImageProcessor

    image = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    theirs = CLIPImageProcessor.from_pretrained(folder)(Image.fromarray(image))["pixel_values"][0]
    ours = np.asarray(result([image])[0]).transpose(2, 0, 1)
    return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * max(1, np.abs(theirs).max()))


# A published basis and an ordinary LoRA


def some_basis(folder: Path, damaged: str) -> Path:
    draw = np.random.default_rng(0).normal
    arrays = {
        path: {
            "a": draw(size=(layer.depth, 3, layer.inputs, 2)),
            "b": draw(size=(layer.depth, 3, 2, layer.outputs)),
            "keys": draw(size=(layer.depth, 3, 4)),
            "projection": draw(size=(layer.depth, 4, 9)),
        }
        for path, layer in LAYERS.items()
    }
    write_basis(
        folder / "basis.safetensors", BasisConfig(size=3, rank=2, key_dim=4, heads=2, query_dim=9), arrays, np.float16
    )
    return folder / damaged


def as_published(folder: Path) -> tuple[str, dict]:
    found, arrays = read_basis(folder, layers=LAYERS)
    ends = {"a": "lora_A", "b": "lora_B", "keys": "lora_keys", "projection": "att_lora_to_q.weight"}
    names = {
        "transformer_blocks.attn.to_q": "transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.proj_out": "single_transformer_blocks.{}.proj_out",
    }
    return repr(found), plain(
        {
            f"transformer.{names[path].format(block)}.{ends[part]}": array
            for path, parts in arrays.items()
            for part, stack in parts.items()
            for block, array in enumerate(stack)
        }
    )


def right_network(folder: Path, result: Any) -> bool:
    network = yaml.safe_load((folder / "config.yaml").read_text())["config"]["process"][0]["network"]
    words = {name: value for name, value in network["network_kwargs"].items() if value is not None}
    names = {
        "loras_num": ("size", 3),
        "lora_keys_dim": ("key_dim", 4),
        "lora_heads": ("heads", 1),
        "mixing_coeffs_type": ("reduction", "mean"),
        "query_mode": ("query_mode", "cat-aa'b"),
        "query_projection_type": ("projection", "linear"),
        "pooling_type": ("pooling", "avg"),
    }
    expected = {ours: words.get(theirs, default) for theirs, (ours, default) in names.items()}
    expected |= {
        "rank": network["linear"],
        "activation": "softmax" if words.get("lora_softmax", True) else "tanh",
        "query": "external" if words.get("external_query", True) else "internal",
    }
    return all(f"{name}={value!r}" in result[0] for name, value in expected.items()) and result[1] == tensors(
        folder, "basis.safetensors"
    )


def some_lora(folder: Path) -> Path:
    draw = np.random.default_rng(0).normal
    layers = {
        "transformer.transformer_blocks.0.attn.to_q": (6, 6),
        "transformer.single_transformer_blocks.1.proj_out": (10, 6),
    }
    arrays = {}
    for name, (i, o) in layers.items():
        arrays |= {
            f"{name}.lora_A.weight": draw(size=(2, i)),
            f"{name}.lora_B.weight": draw(size=(o, 2)),
            f"{name}.alpha": np.ones(()),
        }
    write(
        folder / "a.safetensors", {name: array.astype(np.float32) for name, array in arrays.items()}, {"format": "pt"}
    )
    return folder / "a.safetensors"


def update(folder: Path) -> dict[str, np.ndarray]:
    _, arrays = load_basis(folder / "a.safetensors", LAYERS)
    return {
        f"{path}.{block}": a[0].astype(np.float64) @ b[0]
        for path, parts in arrays.items()
        for block, (a, b) in enumerate(zip(parts["a"], parts["b"]))
        if b.any()
    }


def right_update(folder: Path, result: dict[str, np.ndarray]) -> bool:
    """alpha / R · B A of each pair, by the reference's tensors."""
    found = {
        name: np.frombuffer(data, dict(F32=np.float32, F64=np.float64, F16=np.float16, BF16=ml_dtypes.bfloat16)[kind])
        .reshape(shape)
        .astype(np.float64)
        for name, (kind, shape, data) in tensors(folder).items()
    }
    expected = {}
    for name, down in found.items():
        match = re.fullmatch(r"transformer\.(\w+)\.(\d+)\.(.+)\.lora_A\.weight", name)
        if match:
            stem = name.removesuffix(".lora_A.weight")
            scale = float(found[f"{stem}.alpha"].reshape(())) / down.shape[0] if f"{stem}.alpha" in found else 1.0
            change = scale * (found[f"{stem}.lora_B.weight"] @ down).T
            if change.any():
                expected[f"{match[1]}.{match[3]}.{match[2]}"] = change
    return expected.keys() == result.keys() and all(
        np.allclose(result[name], change, rtol=1e-4, atol=1e-5 * np.abs(change).max())
        for name, change in expected.items()
    )


# Data, caches, runs


def some_data(folder: Path) -> Path:
    entries = [
        {
            "img_name": f"{i}.png",
            "edit_instruction": f"turn it {i}",
            "left_image_description": "a",
            "right_image_description": "b",
        }
        for i in range(3)
    ]
    for name in ("0.png", "1.png", "2.png", "x"):
        written(f"data/t/Group1/{name}", b"")(folder)
    written("outside", b"")(folder)
    return written("data/t/Group1/labels.json", entries)(folder)


def listed(folder: Path) -> list[tuple[str, str]]:
    (task,) = read_tasks(folder / "data", Problems())
    return [(task.relative(pair), pair.instruction) for pair in task.pairs]


def right_list(folder: Path, result: Any) -> bool:
    group = folder / "data" / "t" / "Group1"
    expected = {}
    for entry in json.loads((group / "labels.json").read_text("utf-8-sig")):
        if (
            isinstance(entry, dict)
            and isinstance(name := entry.get("img_name"), str)
            and isinstance(words := entry.get("edit_instruction"), str)
            and name in ("0.png", "1.png", "2.png", "x", "labels.json")
        ):
            expected.setdefault(f"Group1/{name}", words)
    return [(name, words) for name, words in expected.items() if "\ud800" not in words] == result


def some_store(folder: Path, damaged: str) -> Path:
    store = Store(folder, {"format": 1, "model": "m"}, create=True)
    for shard in range(2):
        store.add(
            f"s{shard}", [f"item{shard}"], [f"k{shard}0", f"k{shard}1"], {"text": np.full((2, 3), shard, np.float32)}
        )
    return folder / damaged


def gathered(folder: Path) -> Any:
    store = Store(folder, {"format": 1, "model": "m"})
    return {
        key: np.array(store.gather("text", [key])).tolist() for key in ("k00", "k01", "k10", "k11") if key in store
    }, sorted(store.settled)


def right_store(folder: Path, result: Any) -> bool:
    expected, items = {}, set()
    for name in ("s0", "s1"):
        shapes = tensors(folder, f"{name}.safetensors")
        with safetensors.safe_open(folder / f"{name}.safetensors", "numpy") as file:
            keys, settled = (json.loads(file.metadata()[key]) for key in ("keys", "items"))
        rows = np.frombuffer(shapes["text"][2], np.float32).reshape(shapes["text"][1])
        expected |= {key: [row.tolist()] for key, row in zip(keys, rows, strict=True)}
        items |= set(settled)
    return repr(
        (dict(sorted((k, v) for k, v in expected.items() if k in ("k00", "k01", "k10", "k11"))), sorted(items))
    ) == repr(result)


LOG = "".join(f"step {step}  loss 0.{step}  learning_rate 0.001\n" for step in range(1, 9))


def resumed(folder: Path) -> bytes:
    TextWriter(folder / "log.txt", 5).close()
    return (folder / "log.txt").read_bytes()


RUN = {
    "job": "basis",
    "seed": 0,
    "train": {"steps": 8, "ema": 0.0, "batch": 2},
    "basis": {"size": 3, "rank": 2, "heads": 1, "query_mode": "cat-aa'b", "query_dim": None},
    "data": {"root": "x", "sizes": [1, 2]},
    "mesh": {"data": -1},
}


def loaded_run(folder: Path) -> str:
    return json.dumps(configs.load(folder / "config.json").to_dict(), sort_keys=True)


def right_run(folder: Path, result: str) -> bool:
    return json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True) == result


def some_run(folder: Path) -> Path:
    config, arrays = read_basis(some_basis(folder, "basis.safetensors").parent, layers=LAYERS)
    write_run(folder / "run", config, arrays)
    return folder / "run" / "config.json"


def basis_of_run(folder: Path) -> BasisConfig:
    return load_basis(folder / "run", LAYERS)[0]


def right_basis_of_run(folder: Path, result: BasisConfig) -> bool:
    stated = json.loads((folder / "run" / "config.json").read_text())["basis"]
    expected = {field.name: stated.get(field.name, field.default) for field in dataclasses.fields(BasisConfig)}
    found = {**vars(result), "scale": float(result.scale)}
    expected |= {"query_dim": 9, "scale": float(expected["scale"])}
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)  # tuples as lists


# Tokenizers


TEXTS = ["put a red frame around it", "", "zebra, é!"]


def clip_ids(folder: Path) -> list:
    tokenizers.load_clip_tokenizer.cache_clear()
    return tokenizers.tokenize_clip(TEXTS, folder).tolist()


def t5_ids(folder: Path) -> list:
    tokenizers.load_t5_tokenizer.cache_clear()
    return tokenizers.tokenize_t5(TEXTS, folder, 24).tolist()


def right_ids(load: Callable[[Path], Any], length: int) -> Callable[[Path, Any], bool]:
    def right(folder: Path, result: Any) -> bool:
        theirs = load(folder)
        tokens = min(length, theirs.model_max_length) if length == 77 else length
        return theirs(TEXTS, padding="max_length", truncation=True, max_length=tokens)["input_ids"] == result

    return right


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(folder: Path) -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(
        folder, **({} if (folder / "tokenizer.json").exists() else {"add_prefix_space": True})
    )


def tokenizer(damaged: str, clip_or_t5: str, edit: Callable, count: int, alone: bool = False) -> Reader:
    part, read, load, length = {
        "clip": ("tokenizer", clip_ids, clip_tokenizer, 77),
        "t5": ("tokenizer_2", t5_ids, t5_tokenizer, 24),
    }[clip_or_t5]

    def make(folder: Path) -> Path:
        for file in (SMALL / part).iterdir():
            if not alone or file.name == damaged:
                shutil.copy(file, folder)
        return folder / damaged

    return Reader(make, edit, read, right_ids(load, length), count)


# Images and recordings


def some_image(name: str, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        levels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(levels).save(folder / name, **options)
        return folder / name

    return make


def image(suffix: str, **options: Any) -> Reader:
    """Formats have no checksum of their pixels: any picture is right that is one."""
    return Reader(
        some_image(f"a.{suffix}", **options),
        mutations.of_bytes,
        lambda folder: read_image(folder / f"a.{suffix}"),
        lambda folder, found: found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3,
        60,
    )


def some_recording(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", **{"B1/noise": np.arange(12.0), "B1/name": np.array("é")})
    return folder / "a.npz"


def some_single_file(folder: Path) -> Path:
    """What tells a transformer's sizes in Black Forest Labs' layout."""
    shapes = {
        "img_in.weight": (256, 16),
        "txt_in.weight": (256, 24),
        "vector_in.in_layer.weight": (256, 8),
        "guidance_in.in_layer.weight": (256, 8),
        "final_layer.linear.weight": (16, 256),
        "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
        "double_blocks.1.x": (2,),
        "single_blocks.0.x": (1,),
        "single_blocks.10.y": (),
    }
    write(folder / "a.safetensors", {name: np.zeros(shape, np.float16) for name, shape in shapes.items()})
    return folder / "a.safetensors"


def some_scaled_file(folder: Path) -> Path:
    """fp8 with a scale beside."""
    some_single_file(folder)
    arrays, _ = read_all(folder / "a.safetensors")
    arrays["txt_in.weight"] = arrays["txt_in.weight"].astype(ml_dtypes.float8_e4m3fn)
    write(
        folder / "a.safetensors",
        arrays
        | {"txt_in.scale_weight": np.full((), 0.5, np.float32), "scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)},
        {"_quantization_metadata": json.dumps({"layers": {"txt_in": {"format": "float8_e4m3fn"}}})},
    )
    return folder / "a.safetensors"


def some_gguf(folder: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    some_single_file(folder)
    writer = gguf.GGUFWriter(folder / "a.gguf", "flux")
    for name, array in read_all(folder / "a.safetensors")[0].items():
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(
                name,
                gguf.quantize(array.astype(np.float32), gguf.GGMLQuantizationType.Q8_0),
                raw_dtype=gguf.GGMLQuantizationType.Q8_0,
            )
        elif array.ndim:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "a.gguf"


def from_gguf(folder: Path) -> tuple:
    source = pretrained.recognise(folder / "a.gguf")
    return (
        source.kind,
        source.layout,
        source.config,
        {name: source.checkpoint.read(name).shape for name in source.checkpoint},
    )


def recognised(folder: Path) -> tuple:
    source = pretrained.recognise(folder / "a.safetensors")
    return source.kind, source.layout, source.config


def right_single_file(folder: Path, result: tuple) -> bool:
    shapes = {name: shape for name, (_, shape, _) in tensors(folder).items()}
    blocks = {
        kind: len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}_blocks.")})
        for kind in ("double", "single")
    }
    width, channels = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    sizes = {
        "in_channels": channels,
        "num_layers": blocks["double"],
        "num_single_layers": blocks["single"],
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }
    return result[:2] == ("transformer", "black_forest") and {name: result[2][name] for name in sizes} == sizes


def opened(kind: str, part: str, open_part: Callable[[Path], Any]) -> Reader:
    """A config with its weights: whatever the config's check lets through must fit them."""
    return Reader(
        copied(f"{part}/config.json", f"{part}/{kind}.safetensors"),
        mutations.of_json,
        lambda folder: sorted(open_part(folder)[1].layout.tensors.items()),
        count=3,
    )


def some_checksums(folder: Path) -> Path:
    pretrained.convert(pretrained.recognise(SMALL / "vae"), "diffusers", folder)
    return folder / "vae" / "checksums.json"


READERS = {
    "safetensors": Reader(
        some_tensors,
        mutations.of_safetensors,
        lambda folder: plain(read_all(folder / "a.safetensors")[0]),
        lambda folder, result: tensors(folder) == result,
        1500,
    ),
    "sharded index": Reader(
        some_shards, mutations.of_json, lambda folder: plain(read_all(folder)[0]), right_shards, 150
    ),
    "transformer config": config(FluxConfig, "transformer", guidance_embeds=False),
    "vae config": config(VAEConfig, "vae", **STABLE_DIFFUSION),
    "t5 config": config(T5Config, "text_encoder_2", feed_forward_proj="relu"),
    "schedule": config(Schedule, "scheduler", "scheduler_config.json"),
    "clip text config": Reader(
        copied("text_encoder/config.json"),
        mutations.of_json,
        clip.text_config,
        right_config(clip.CLIPTextConfig, "config.json"),
        200,
    ),
    "clip vision config": Reader(
        copied("clip_vision/config.json"),
        mutations.of_json,
        clip.vision_config,
        right_config(clip.CLIPVisionConfig, "config.json"),
        200,
    ),
    "siglip config": Reader(
        written("config.json", SIGLIP),
        mutations.of_json,
        SiglipConfig.from_folder,
        right_config(SiglipConfig, "config.json"),
        150,
    ),
    "image encoder's folder": Reader(
        copied("clip_vision/config.json", "clip_vision/preprocessor_config.json"),
        mutations.of_json,
        lambda folder: repr(open_image_encoder(folder).processor),
        lambda folder, result: True,
        100,
    ),
    "preprocessor": Reader(
        copied("clip_vision/preprocessor_config.json"),
        mutations.of_json,
        ImageProcessor.from_folder,
        right_processor,
        150,
    ),
    "basis config.yaml": Reader(
        functools.partial(some_basis, damaged="config.yaml"), mutations.of_yaml, as_published, right_network, 200
    ),
    "basis": Reader(
        functools.partial(some_basis, damaged="basis.safetensors"),
        mutations.of_safetensors,
        as_published,
        lambda folder, result: tensors(folder, "basis.safetensors") == result[1],
        150,
    ),
    "lora": Reader(some_lora, mutations.of_safetensors, update, right_update, 200),
    "labels": Reader(some_data, mutations.of_json, listed, right_list, 150),
    "cache's identity": Reader(
        functools.partial(some_store, damaged="identity.json"), mutations.of_json, gathered, count=60
    ),
    "cache's shard": Reader(
        functools.partial(some_store, damaged="s1.safetensors"), mutations.of_safetensors, gathered, right_store, 150
    ),
    "run's config": Reader(written("config.json", RUN), mutations.of_json, loaded_run, right_run, 100),
    "run's basis": Reader(some_run, mutations.of_json, basis_of_run, right_basis_of_run, 12),
    "log": Reader(
        written("log.txt", LOG),
        mutations.of_json_lines,
        resumed,
        lambda folder, result: result.endswith(b"\n") or not result,
        100,
    ),
    "clip vocab.json": tokenizer("vocab.json", "clip", mutations.of_json, 15),
    "clip merges.txt": tokenizer("merges.txt", "clip", mutations.of_json_lines, 15),
    "clip tokenizer_config.json": tokenizer("tokenizer_config.json", "clip", mutations.of_json, 25),
    "clip special_tokens_map.json": tokenizer("special_tokens_map.json", "clip", mutations.of_json, 15),
    "t5 tokenizer.json": tokenizer("tokenizer.json", "t5", mutations.of_json, 40),
    "t5 tokenizer_config.json": tokenizer("tokenizer_config.json", "t5", mutations.of_json, 30),
    "t5 spiece.model": tokenizer("spiece.model", "t5", mutations.of_bytes, 30, alone=True),
    "single file": Reader(some_single_file, mutations.of_safetensors, recognised, right_single_file, 150),
    "scaled file": Reader(some_scaled_file, mutations.of_safetensors, recognised, right_single_file, 100),
    "gguf": Reader(
        some_gguf,
        mutations.of_bytes,
        from_gguf,
        lambda folder, result: result[:2] == ("transformer", "black_forest"),
        100,
    ),
    "transformer": opened(
        "diffusion_pytorch_model", "transformer", lambda folder: pretrained.open_model(folder, "transformer")
    ),
    "vae": opened("diffusion_pytorch_model", "vae", lambda folder: pretrained.open_model(folder, "vae")),
    "text encoder": opened("model", "text_encoder", clip.open_clip_text),
    "text encoder 2": opened("model", "text_encoder_2", open_t5),
    "vision": opened("model", "clip_vision", clip.open_clip_vision),
    "checksums": Reader(
        some_checksums,
        mutations.of_json,
        lambda folder: [each.path.name for each in pretrained.verify(folder)],
        count=15,
    ),
    **{suffix: image(suffix) for suffix in ("png", "webp", "bmp", "gif", "tiff")},
    "jpeg": image("jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    "recording": Reader(
        some_recording,
        mutations.of_bytes,
        lambda folder: repr(read_recording(folder / "a.npz")),
        lambda folder, result: True,
        60,
    ),
}


class TooLong(BaseException):
    """No Exception, so that no reader takes it for a damaged file."""


@contextlib.contextmanager
def limits():
    """TooLong after SECONDS; MemoryError beyond MEMORY more than this process has."""

    def stop(*_):
        raise TooLong

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(reader: Reader, folder: Path, good: Any) -> str | None:
    """What is wrong with how ours met the files; None if nothing is."""
    try:
        with limits():
            result = reader.read(folder)
    except UserError as error:
        return None if len(str(error)) < 3000 else f"a sentence of {len(str(error))} characters"
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, pytest.fail.Exception)):
            raise
        return f"{type(error).__name__}: {error}"[:300]
    try:
        if (
            equal(result, good)
            if not isinstance(good, dict)
            else result.keys() == good.keys()
            and all(
                np.array_equal(result[key], good[key])
                if isinstance(good[key], np.ndarray)
                else result[key] == good[key]
                for key in good
            )
        ):
            return None
        return None if reader.right(folder, result) else f"took it for {result!r}"[:500]
    except Exception as error:
        return f"took it for {result!r}"[:300] + f", where the reference says {type(error).__name__}: {error}"[:300]


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_one_sentence_or_read_rightly(name, tmp_path, request, capfd):
    count = request.config.getoption("mutations") or READERS[name].count
    reader, seed = READERS[name], request.config.getoption("mutation_seed")
    folder, kept = tmp_path / "files", tmp_path / "failed"
    folder.mkdir()
    path = reader.make(folder)
    content, good, wrong = path.read_bytes(), reader.read(folder), []
    rng = random.Random(zlib.crc32(f"{seed} {name}".encode()))
    for number in range(count):
        path.write_bytes(damaged := reader.edit(rng, content))
        if told := outcome(reader, folder, good):
            kept.mkdir(exist_ok=True)
            (kept / str(number)).write_bytes(damaged)
            wrong.append(f"{kept / str(number)}: {told}")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:40])


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_without_opening(name, tmp_path):
    reader = READERS[name]
    path = reader.make(tmp_path)
    for make in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        path.mkdir,
        lambda: path.symlink_to(path.name),
    ):
        path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
        make()
        start = time.process_time()
        with limits(), pytest.raises(UserError):
            reader.read(tmp_path)
        assert time.process_time() - start < 5
