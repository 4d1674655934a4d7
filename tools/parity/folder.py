"""What a folder of recordings holds: recordings (.npz), bases with their configs, and the models of a pipeline."""

import functools
import lzma
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from flax import nnx

from lorweb_jax.adapters.basis import Basis, BasisConfig
from lorweb_jax.adapters.formats.basis_file import read_basis, write_basis
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import read_json
from lorweb_jax.common.user_files import regular_file
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.flow.schedule import Schedule
from parity.report import EXACT, Absent, Comparison

Recording = dict[str, np.ndarray]


def read_recording(path: Path) -> Recording:
    """All arrays of an .npz. Raises UserError for a file that is damaged or holds pickled objects."""
    regular_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds
        raise UserError(
            f"the recording {path} can't be read ({type(error).__name__}: {error}); copy it again"
        ) from None


def groups(data: Recording) -> dict[str, Recording]:
    """{"B1": {"noise": …}} of the keys "B1/noise": everything before the first slash names the group."""
    grouped: dict[str, Recording] = {}
    for key, array in data.items():
        group, slash, name = key.partition("/")
        if slash:
            grouped.setdefault(group, {})[name] = array
    return grouped


class RecordedBasis(NamedTuple):
    """A basis as its float32 file has it (None: only the half-precision file is there), and as stored in half
    precision, which is how the published code saves it."""

    full: Basis | None
    half: Basis
    config: BasisConfig

    @property
    def basis(self) -> Basis:
        """The float32 one; raises Absent."""
        if self.full is None:
            raise Absent("it was recorded with the float32 basis, and only the _fp16 file is there")
        return self.full


class RecordedModels:
    """A pipeline folder's models in float32, each loaded when first asked for. Raises Absent without a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder

    def part(self, name: str) -> Path:
        if self._folder is None:
            raise Absent("it needs a model; give --pipeline=FOLDER")
        if not (self._folder / name).is_dir():
            raise Absent(f"{self._folder} has no folder {name}")
        return self._folder / name

    @functools.cached_property
    def transformer(self):
        from lorweb_jax.files.state import build
        from lorweb_jax.models.flux1.config import FluxConfig
        from lorweb_jax.models.flux1.model import Flux
        from lorweb_jax.pipeline.pretrained import load_transformer

        config, parameters = load_transformer(self.part("transformer"), np.float32)
        return build(lambda: Flux(FluxConfig.from_json(config), rngs=nnx.Rngs(0)), parameters)

    @property
    def layers(self) -> dict | None:
        """The transformer's layers that a basis may adapt, which it must fit; None without a transformer."""
        try:
            return self.backbone.adapted
        except Absent:
            return None

    @functools.cached_property
    def backbone(self):
        """The record of the folder's transformer; raises Absent."""
        from lorweb_jax.models.flux1.config import FluxConfig
        from lorweb_jax.models.flux1.record import backbone

        path = self.part("transformer") / "config.json"
        return backbone(FluxConfig.from_json(read_json(path), path))

    @functools.cached_property
    def vae(self):
        from lorweb_jax.files.state import build
        from lorweb_jax.models.autoencoder.model import AutoencoderKL, VAEConfig
        from lorweb_jax.pipeline.pretrained import load_vae

        config, parameters = load_vae(self.part("vae"), np.float32)
        return build(lambda: AutoencoderKL(VAEConfig.from_json(config), rngs=nnx.Rngs(0)), parameters)

    @functools.cached_property
    def text_encoder(self):
        from lorweb_jax.models.clip.folder import load_clip_text

        return load_clip_text(self.part("text_encoder"))

    @functools.cached_property
    def text_encoder_2(self):
        from lorweb_jax.models.t5.model import load_t5

        return load_t5(self.part("text_encoder_2"), np.float32)

    @functools.cached_property
    def image_encoder(self):
        from lorweb_jax.models.image_encoder.encoder import load_image_encoder

        return load_image_encoder(self.part("clip_vision"))

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The folder's, or FLUX's where there is none."""
        try:
            path = self.part("scheduler") / "scheduler_config.json"
            return Schedule.from_json(read_json(path), path)
        except Absent:
            return Schedule()


class Bases:
    """The bases of a folder: basis_X.safetensors (or only basis_X_fp16), also compressed by xz, with the entry X of
    configs.json."""

    def __init__(self, folder: Path, models: RecordedModels, report: Comparison):
        self._folder, self._models = folder, models
        self._found: dict[str, RecordedBasis] = {}
        self._missing: dict[str, str] = {}
        self._unpacked = tempfile.TemporaryDirectory()
        for packed in folder.glob("basis_*.safetensors.xz"):
            try:
                (Path(self._unpacked.name) / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
            except (OSError, lzma.LZMAError) as error:
                report.fail(packed.name, f"{packed} could not be unpacked ({error}); copy it anew")
        paths = [path for place in (self._unpacked.name, folder) for path in Path(place).glob("basis_*.safetensors")]
        files = {path.stem.removeprefix("basis_"): path for path in sorted(paths)}
        configs = self._configs(report) if files else {}
        for name in sorted({name.removesuffix("_fp16") for name in files}):
            if name not in configs:
                self._missing[name] = f"configs.json has no entry {name}, which says how basis_{name} is used"
                report.skip(f"basis_{name}", self._missing[name])
                continue
            try:
                self._found[name] = self._read(name, files, configs[name], report)
            except UserError as error:
                self._missing[name] = f"basis_{name} could not be read"
                report.fail(f"basis_{name}", str(error))

    def get(self, name: str) -> RecordedBasis:
        """Basis `name`; raises Absent."""
        if name not in self._found:
            raise Absent(self._missing.get(name, f"{self._folder} has no basis_{name}.safetensors"))
        return self._found[name]

    def in_advance(self, name: str) -> bool:
        """Whether the coefficients of basis `name` are known before the model runs; without the basis, they are."""
        return name not in self._found or self._found[name].config.coefficients.in_advance

    def default(self) -> RecordedBasis:
        """The basis that train_step and e2e recordings use, which don't name it: a, or the only one."""
        if "a" not in self._found and len(self._found) == 1:
            return next(iter(self._found.values()))
        return self.get("a")

    def _configs(self, report: Comparison) -> dict:
        try:
            return read_json(self._folder / "configs.json", dict[str, dict[str, Any]])
        except UserError as error:
            if (self._folder / "configs.json").exists():
                report.fail("configs.json", str(error))
            return {}

    def _read(self, name: str, files: dict[str, Path], network: dict, report: Comparison) -> RecordedBasis:
        read = {}
        with tempfile.TemporaryDirectory() as folder:
            # As published: a config.yaml that describes one basis.
            config_file = Path(folder) / "given.yaml"
            config_file.write_text(yaml.safe_dump({"config": {"process": [{"network": network}]}}))
            for stem in (name, f"{name}_fp16"):
                if stem in files:
                    config, arrays = read_basis(files[stem], config_file, self._models.layers)
                    read[stem] = arrays
                    written = Path(folder) / stem / "basis.safetensors"
                    report.compare(
                        f"basis_{stem}: tensors that differ when written again",
                        functools.partial(_rewritten, files[stem], written, config, arrays),
                        0,
                        EXACT,
                    )
        full = _as_type(read[name], np.float32) if name in read else None
        half = _as_type(read.get(f"{name}_fp16") or _as_type(read[name], np.float16), np.float32)
        return RecordedBasis(full and Basis.from_arrays(config, full), Basis.from_arrays(config, half), config)


def _as_type(arrays: dict, dtype) -> dict:
    return {path: {part: array.astype(dtype) for part, array in parts.items()} for path, parts in arrays.items()}


def _rewritten(source: Path, target: Path, config: BasisConfig, arrays: dict) -> int:
    """How many tensors of a basis file differ in any byte once written from our form."""
    write_basis(target, config, arrays)
    theirs, ours = Checkpoint(source), Checkpoint(target)
    return sum(
        key not in ours
        or key not in theirs
        or ours.dtype(key) != theirs.dtype(key)
        or ours.read(key).tobytes() != theirs.read(key).tobytes()
        for key in {*ours, *theirs}
    )
