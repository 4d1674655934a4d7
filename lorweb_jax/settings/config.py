"""What every training config has in common, and how configs are read, written and compared.

Configs are ml_collections files in configs/: `get_config(variant)` starts from `base_config(job)` and sets what
differs, so that each field stands once. Nothing here imports jax: `--help` and a misspelt field answer at once.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import write_file
from lorweb_jax.common.schema import checked, read_json
from lorweb_jax.settings import checks

AnyConfig = Mapping[str, Any] | ConfigDict  # a config, or its json form
_MAY_CHANGE = frozenset(
    {
        "train.steps",
        "train.log_every",
        "train.checkpoint_every",
        "train.log_images_every",
        # where and how it is computed, as other hardware may need it
        "train.accumulate",
        "mesh.data",
        "mesh.fsdp",
        "mesh.sequence",
        "mesh.tensor",
        "offload",
        "remat",
        "attention",
        "unroll",
        "unstacked",
        "data.workers",
        "trackers",
        "profile",
        "compile_cache",
        "data.encoded",  # more drawings, as there is time to encode them
    }
)
# Fields that saved configs may lack, as they are older, with the values that mean what was done then.
_ADDED: dict[str, Any] = {
    "train.accumulate": 1,
    "offload": "none",
    "unstacked": False,
    "data.buckets": [],
    "basis.scale": 1.0,
    "basis.normalised": False,
    "basis.temperature": 1.0,
    "basis.temperature_mode": "fixed",
    "basis.key_scale": 1.0,
    "routing.rate": 1.0,
    "routing.balance": 0.0,
    "routing.member_dropout": 0.0,
    "evaluation.validate": 0,
    "trackers": [],
}


def may_change(field: str) -> bool:
    """Whether a run may go on from its own checkpoint with another value of a dotted field."""
    return field in _MAY_CHANGE or field.startswith("evaluation.")


def base_config(job: str) -> ConfigDict:
    """The fields that the loop and `main` themselves read, with the paper's recipe for the optimizer (method.md §5)."""
    config = ConfigDict()
    config.job = job  # a name of lorweb_jax/jobs, or an import path package.module:function
    config.seed = 0  # of initial weights, noise and data order

    config.train = ConfigDict()
    config.train.steps = 1000  # optimizer updates in all
    config.train.batch = 6  # examples a step, over all devices
    config.train.accumulate = 1  # parts that a batch is computed in, one after another; their gradients are averaged
    config.train.log_every = 20  # steps between lines of metrics (each line is the mean since the last)
    config.train.checkpoint_every = 200
    config.train.log_images_every = 500
    config.train.ema = 0.0  # decay of the averaged weights that are shown and exported; 0 keeps none
    config.train.param_dtype = "float32"  # storage of frozen weights: float32, bfloat16 or float16

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or muon, for kernels, with adam for the rest
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"  # or cosine, down to 0 at train.steps
    config.optimizer.warmup = 0  # steps of linear rise from 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.moments = "float32"  # storage of adamw's two averages: float32, bfloat16 or int8
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 1.0  # largest global norm of the gradient

    config.mesh = ConfigDict()
    config.mesh.data = 1  # devices that share the batch, each with a copy of the weights
    config.mesh.fsdp = -1  # devices that share the batch and split the weights; -1 takes what the others leave
    config.mesh.sequence = 1  # devices that share the tokens of each example, and in attention its heads
    config.mesh.tensor = 1  # devices that split heads and features of every layer

    config.trackers = ()  # where metrics and pictures go beside log and TensorBoard: wandb, trackio
    config.profile = ""  # steps of which a profiler's trace is written into the run folder, such as 5 or 5-7
    config.compile_cache = True  # compiled programs are kept in .compile_cache beside the run folder
    return config


def add_computation(config: ConfigDict) -> None:
    """The fields that say how a job computes over a frozen transformer."""
    config.compute_dtype = "float32"
    config.quantization = "none"  # of the frozen transformer's blocks: none, int8 or fp8
    # Where the blocks of the frozen transformer and of T5 lie: none, on the device, or blocks, in the host's memory,
    # from where they are streamed block by block, forward and backward.
    config.offload = "none"
    # What the backward pass recomputes: auto, as little as the devices' memory allows; or, the least first: none, dots
    # (all but products and attention), qkv (all but attention, q, k, v and the products that end a block's branches),
    # outputs (all but attention and those products), attention (all but attention), full (all of a block).
    # `python -m lorweb_jax.plan` lists the memory of each.
    config.remat = "none"
    config.attention = "auto"  # auto takes the one that is fastest there: xla, cudnn (NVIDIA), pallas (TPU)
    config.unroll = 8  # blocks of a stack compiled side by side; of no effect where unstacked
    # Whether each block's weights are arrays of their own, from which nothing is copied: faster, but as many blocks are
    # compiled as there are. Else one block of a kind is compiled, and scanned over stacks of weights.
    config.unstacked = False


def choose_variant(variants: Mapping[str, Callable[[], ConfigDict]], name: str) -> ConfigDict:
    """The config of variant `name` of a config file, the default one being ""; UserError names those there are."""
    if name not in variants:
        named = ", ".join(key for key in variants if key) or "none"
        raise UserError(f"the config has no variant {name!r}; its variants are: {named}", code=2)
    return variants[name]()


def check(config: ConfigDict) -> None:
    """UserError, with status 2, for a value that no run could use (settings/checks.py)."""
    checks.check(dict(fields(config)))


def fields(config: AnyConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a config or of its json form; tuples as lists."""
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _listed(value)


def _listed(value: Any) -> Any:
    """Tuples as lists, also within each other, as json gives them back."""
    return [_listed(each) for each in value] if isinstance(value, tuple | list) else value


def get(config: ConfigDict, field: str) -> Any:
    """The value of a dotted field."""
    for part in field.split("."):
        config = config[part]
    return config


def differences(old: AnyConfig, new: AnyConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted field: (old value, new value)} where two configs differ. A field that one of them lacks counts there as
    what was done before there was such a field, else as None."""
    old, new = dict(fields(old)), dict(fields(new))
    values = {
        name: tuple(config.get(name, _ADDED.get(name)) for config in (old, new))
        for name in sorted(old.keys() | new.keys())
    }
    return {name: (before, after) for name, (before, after) in values.items() if before != after}


def default_workdir(config_flag: str) -> Path:
    """runs/<name> of a --config value: configs/basis.py -> runs/basis, configs/basis.py:tanh -> runs/basis_tanh."""
    path, _, variant = config_flag.partition(":")
    return Path("runs") / (Path(path).stem + ("_" + variant.replace(",", "_").replace("/", "_") if variant else ""))


def load(path: Path) -> ConfigDict:
    """The config that `save` wrote; UserError where there is none, or what lies there is none of a training run."""
    try:
        values = read_json(path, remedy="name the folder of a training run")
        checked(values, _Saved, path)
        return ConfigDict(values)
    except UserError as error:
        raise UserError(f"{error} (a training run's config was expected)") from None
    except (TypeError, ValueError, AttributeError) as error:  # keys that a ConfigDict can't have
        raise UserError(
            f"{path} is not a config written by a training run ({error}); name another run folder"
        ) from None


@dataclasses.dataclass(frozen=True)
class _SavedTrain:
    ema: float


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What is read of a saved config without being asked for by name."""

    job: str
    train: _SavedTrain


def save(config: ConfigDict, path: Path) -> None:
    """Write a config as json, all or nothing."""
    write_file(path, (json.dumps(config.to_dict(), indent=1) + "\n").encode())
