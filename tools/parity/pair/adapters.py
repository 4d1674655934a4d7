"""qr.npz, *.safetensors and forward_*.npz: how adapters begin, their files, and what they do to the velocity."""

import functools
import re
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import Basis, BasisConfig
from lorweb_jax.adapters.formats.layer_names import split_layer_name
from lorweb_jax.adapters.formats.pair_file import read_member, write_member
from parity.folder import RecordedModels, Recording, groups
from parity.report import EXACT, OUTPUT, Absent, Comparison, Tolerance
from parity.transformer import Inputs, velocity

ROWS = Tolerance(5e-6, relative=False)
# The weights of (content, style) by what is recorded.
_WEIGHTS = {"none": (0, 0), "content": (1, 0), "style": (0, 1), "both": (1, 1)}
_INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids")


class Adapters:
    """The adapter files of a folder, each read when first asked for."""

    def __init__(self, folder: Path, models: RecordedModels):
        self.folder, self.models = folder, models
        self._members: dict[str, pair.Member] = {}

    @property
    def layers(self) -> dict:
        if self.models.layers is None:
            raise Absent("it needs a transformer; give --pipeline=FOLDER")
        return self.models.layers

    def __getitem__(self, name: str) -> pair.Member:
        path = self.folder / f"{name}.safetensors"
        if name not in self._members:
            if not path.is_file():
                raise Absent(f"there is no {path.name}")
            self._members[name] = read_member(path, self.layers)
        return self._members[name]

    def basis(self, names: list[str]) -> Basis:
        """These adapters as members of one basis, whose coefficients are fixed."""
        members = [self[name] for name in names]
        config = BasisConfig(
            size=len(members), rank=max(member.rank for member in members), query="fixed", query_dim=None
        )
        return Basis.from_arrays(config, pair.stack(members, self.layers))


def weighted(basis: Basis, weights, batch: int) -> dict:
    """What a basis adds where every example has the same weights of its members."""
    row = jnp.asarray(weights, jnp.float32)
    return basis.adapters(
        {path: jnp.broadcast_to(row, (layer.b.shape[0], batch, row.shape[0])) for path, layer in basis.layers.items()}
    )


def check_rows(report: Comparison, name: str, data: Recording) -> None:
    for case, arrays in groups(data).items():
        if "G" not in arrays and "G_first_row" in arrays:
            arrays = arrays | _drawn(case, arrays)
        ranks = [len(arrays[f"A_{member}"]) for member in pair.MEMBERS if f"A_{member}" in arrays]
        for index, member in enumerate(pair.MEMBERS):
            line = f"{name} {case}/A_{member}"
            if f"A_{member}" in arrays and "G" in arrays:
                report.compare(
                    line,
                    lambda arrays=arrays, ranks=ranks, index=index: pair.orthonormal_rows(arrays["G"], ranks)[index],
                    arrays[f"A_{member}"],
                    ROWS,
                )
            elif f"A_{member}" in arrays:
                report.skip(line, "the Gaussian that it was made of is not recorded, and no torch here draws it")


def _drawn(case: str, arrays: Recording) -> Recording:
    """{"G"} as torch draws it from the seed that a case is called after, such as w640_seed42_r4_4, where this torch
    draws the recorded numbers; nothing without torch."""
    match = re.match(r"w(\d+)_seed(\d+)_", case)
    try:
        import torch
    except ImportError:
        return {}
    if match is None:
        return {}
    width, seed = map(int, match.groups())
    gaussian = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).numpy()
    same = np.allclose(gaussian[0], arrays["G_first_row"], rtol=1e-6, atol=1e-7)
    return {"G": gaussian} if same else {}


def check_file(report: Comparison, path: Path, adapters: Adapters) -> None:
    """A published file, read and written again, has the same bytes."""

    def written() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / path.name
            write_member(target, adapters[path.stem])
            return np.frombuffer(target.read_bytes(), np.uint8)

    report.compare(f"{path.name} written again", written, np.frombuffer(path.read_bytes(), np.uint8), EXACT)


def check_forward(report: Comparison, name: str, data: Recording, adapters: Adapters, case: str) -> None:
    def output(weights, condition: bool):
        inputs = dict(zip(_INPUTS, (data.get(key) for key in _INPUTS)))
        if condition:
            inputs["hidden_states"] = np.concatenate([data["hidden_states"], data["cond_hidden_states"]], axis=1)
            inputs["img_ids"] = np.concatenate([data["img_ids"], data["cond_img_ids"]])
        basis = adapters.basis([f"{member}_{case}" for member in pair.MEMBERS])
        batch, tokens = data["hidden_states"].shape[:2]
        return velocity(adapters.models.transformer, Inputs(*inputs.values()), weighted(basis, weights, batch))[
            :, :tokens
        ]

    for key, theirs in data.items():
        kind, _, rest = key.partition("/")
        condition, which = (True, rest) if kind == "cond" else (False, key)
        base, scaled, scale = which.partition("_scale")
        if base in _WEIGHTS:
            weights = np.multiply(_WEIGHTS[base], float(scale) if scaled else 1.0)
            ours = functools.partial(output, weights, condition)
        elif kind == "delta":
            ours = functools.partial(_update, adapters, case, rest, len(theirs))
        else:
            continue
        report.compare(f"{name} {key}", ours, theirs, OUTPUT)


def _update(adapters: Adapters, case: str, name: str, rows: int) -> np.ndarray:
    """The first rows of B A [o, i] of one diffusers layer; `name` is "<layer>/<member>"."""
    layer, _, which = name.rpartition("/")
    path, block = split_layer_name(layer)
    member = adapters[f"{which}_{case}"]
    return (member.b[path][block].T @ member.a[path][block])[:rows]
