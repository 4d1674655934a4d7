"""Styles for style guidance (method.md §7): from whatever holds an adapter, as members of one basis.

style = pipeline.style("runs/pair", strength=6)
write_image("dog.png", pipeline.stylize("a dog", style, seed=0))
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import AdaptedLayer, Basis, BasisConfig
from lorweb_jax.adapters.formats import identify
from lorweb_jax.adapters.formats.lora_read import read_lora
from lorweb_jax.adapters.formats.pair_file import is_published, read_member
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.hub_cache import existing
from lorweb_jax.nn import layers as nn_layers
from lorweb_jax.pipeline import devices
from lorweb_jax.pipeline.adapters import is_run
from lorweb_jax.pipeline.saving import ROLE, WORDS
from lorweb_jax.pipeline.stages import Pass
from lorweb_jax.settings.rules import STRENGTH, as_value, shown
from lorweb_jax.settings.texts import as_text

STRENGTH_DEFAULT = 6.0  # of the published FLUX script
# What sampling takes by default where there are styles: the published FLUX script's, but for its negative prompt.
SAMPLING_DEFAULTS = {"steps": 50, "guidance": 1.0, "true_guidance": 4.0}
SIDE_DEFAULT = 512  # pixels of a picture from text, unless the autoencoder was trained at less
_FILES = ("*.safetensors",)
_BASE = "base"


@dataclasses.dataclass(frozen=True, eq=False)
class Style:
    """An adapter that pictures can be guided towards; `Pipeline.style` reads one.

    member: the adapter. name: for labels. strength: λ, how far guidance goes; negative leads away from the style.
    words: what follows the prompt in the style's own pass, such as "in watercolor style"; may be empty. weight: what
    the adapter itself is multiplied by in that pass; 1 as it was trained, another thing than the strength. source: the
    file or folder that it was read from, which `Pipeline.save_style` doesn't replace.
    Raises UserError for a strength or weight that isn't a number from −1000 to 1000.
    """

    member: pair.Member
    name: str
    strength: float = STRENGTH_DEFAULT
    words: str = ""
    weight: float = 1.0
    source: Path | None = None

    def __post_init__(self):
        object.__setattr__(self, "name", as_text(self.name, "a style's name"))
        object.__setattr__(self, "words", as_text(self.words, "the style words").strip())
        for field in ("strength", "weight"):
            value = as_value(getattr(self, field), f"the {field} of the style {self.name}", STRENGTH)
            object.__setattr__(self, field, float(value))


class Adapter(NamedTuple):
    """An adapter from a file or a run: its style words, if they are known, and the dtype that it is stored in."""

    member: pair.Member
    words: str | None = None
    dtype: np.dtype = np.dtype(np.float32)


def load_style(
    path: Path,
    layers: Mapping[str, AdaptedLayer],
    strength: float = STRENGTH_DEFAULT,
    words: str | None = None,
    *,
    name: str | None = None,
    weight: float = 1.0,
    step: int | None = None,
) -> Style:
    """See Pipeline.style. layers: of the model, by path.

    A content adapter is refused: a LoRA whose header says so, or a file called content…, as published ones have no
    header to tell by.
    """
    path = existing(path, _FILES, "the file of a style or of a LoRA, or the folder of a run of configs/pair.py")
    if path.is_file() and role_of(path) == "content":
        raise UserError(
            f"{path} is by its name or header a content adapter, which isn't used in sampling; give the style that was "
            "trained with it (or rename the file, if it is a style)"
        )
    adapters = load_adapters(path, layers, step)
    if "style" not in adapters:
        raise UserError(f"{path} holds no style, only {', '.join(adapters)}; give a run or a folder that has one")
    adapter = adapters["style"]
    if words is None and adapter.words is None:
        say(
            f"{path} comes without style words, so that its own pass has the prompt as it is; give the words that it "
            "was trained with, if there were any"
        )
    words = adapter.words if words is None else words
    return Style(adapter.member, name or path.stem, strength, words or "", weight, path)


def load_adapters(path: Path, layers: Mapping[str, AdaptedLayer], step: int | None = None) -> dict[str, Adapter]:
    """The adapters "content" and "style", as far as they are there, of a run of configs/pair.py, of a folder with the
    published files, or of one file, whose adapter counts as a style unless its header says content or it is called so.

    Raises UserError for what holds no adapter, or one of another model.
    """
    path = existing(path, _FILES, "the file of an adapter, or the folder of a run of configs/pair.py")
    if is_run(path):
        from lorweb_jax.pipeline.pair_run import members_of_run, words_of_run

        words = {"style": words_of_run(path).style}
        return {name: Adapter(member, words.get(name)) for name, member in members_of_run(path, layers, step).items()}
    for folder in (path, path / "export"):
        files = {name: folder / f"{name}_lora.safetensors" for name in pair.MEMBERS}
        if there := {name: file for name, file in files.items() if file.is_file()}:
            return {name: _of_file(file, layers) for name, file in there.items()}
    return {role_of(path): _of_file(path, layers)}


def require_run(step: int | None, paths: Sequence[Path]) -> None:
    """UserError for the step of a checkpoint where none of the paths is a run."""
    if step is not None and not any(map(is_run, paths)):
        raise UserError(
            f"step {step} is that of a run's checkpoint, and {', '.join(map(str, paths))} is no run; leave it out", 2
        )


def role_of(path: Path) -> str:
    """ "content" for a file whose name begins so or whose header says so, else "style"."""
    named = path.stem.lower().startswith("content")
    return "content" if named or Checkpoint(path).metadata.get(ROLE) == "content" else "style"


def _of_file(path: Path, layers: Mapping[str, AdaptedLayer]) -> Adapter:
    checkpoint = Checkpoint(path)
    if is_published(checkpoint):
        return Adapter(read_member(path, layers), None, checkpoint.dtype(next(iter(checkpoint))))
    if identify.lora_scheme(checkpoint) is None:
        what, _ = identify.by_names(checkpoint, flux=True) or ("no LoRA", "")
        remedy = "give a style's file or a LoRA"
        if what == identify.BASIS:
            remedy = "freeze the mix of one analogy into a LoRA (python -m lorweb_jax.export lora), and give that"
        raise UserError(f"{path} is {what}, and a style is a single adapter; {remedy}")
    return Adapter(member_of(*read_lora(path, layers)), checkpoint.metadata.get(WORDS))


def member_of(config: BasisConfig, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> pair.Member:
    """A basis of one member as an adapter; blocks that it leaves as they are have none."""
    a = {path: parts["a"][:, 0].transpose(0, 2, 1) for path, parts in arrays.items()}
    b = {path: parts["b"][:, 0] for path, parts in arrays.items()}
    blocks = {path: tuple(np.flatnonzero(b[path].any(axis=(1, 2))).tolist()) for path in arrays}
    kept = [path for path in arrays if blocks[path]] or list(arrays)
    return pair.Member(*({path: part[path] for path in kept} for part in (a, b, blocks)))


def weighted(style: Style) -> pair.Member:
    """The style's adapter, multiplied by its weight."""
    return style.member if style.weight == 1 else pair.summed([style.member], [style.weight])


def as_styles(value: Style | Sequence[Style]) -> list[Style]:
    """One style or several, or none; UserError for anything else."""
    styles = [value] if isinstance(value, Style) else value
    if not isinstance(styles, Sequence) or isinstance(styles, str):
        raise UserError(f"the styles are {shown(value)}; give one or several of `Pipeline.style`")
    for style in styles:
        if not isinstance(style, Style):
            raise UserError(f"{shown(style)} is no style; read it by `Pipeline.style`")
    return list(styles)


class Styles:
    """Styles as the members of one basis with fixed coefficients, whose rows of a batch have one of them or none."""

    def __init__(self, styles: Sequence[Style], layers: Mapping[str, AdaptedLayer], mesh: Mesh | None = None):
        """layers: of the model, by path. mesh: that its weights lie on."""
        self.styles = list(styles)
        weights = np.diag([style.weight for style in self.styles])
        self.rows = unique_names([style.name for style in self.styles], taken=(_BASE,))
        members = [style.member for style in self.styles]
        config = BasisConfig(
            size=len(members),
            rank=max(member.rank for member in members),
            query="fixed",
            query_dim=None,
            table={_BASE: np.zeros(len(members)), **dict(zip(self.rows, weights))},
            frozen=("a", "b"),
        )
        self.basis = devices.spread(Basis.from_arrays(config, pair.stack(members, layers)), mesh)

    @property
    def strengths(self) -> list[float]:
        return [style.strength for style in self.styles]

    @property
    def words(self) -> list[str]:
        return [style.words for style in self.styles]

    def adapters(self, passes: Sequence[Pass], batch: int) -> dict[str, nn_layers.Adapter] | None:
        """What is beside the weights for the rows of these passes, `batch` of each; None if none has a style."""
        if not any(isinstance(shown, int) for shown in passes):
            return None
        names = [self.rows[shown] if isinstance(shown, int) else _BASE for shown in passes]
        return self.basis.adapters(self.basis.named(np.repeat(names, batch).tolist()))


def unique_names(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """The names, the second of one name as "name 2", and so on."""
    unique = list(taken)
    for name in names:
        numbers = (f"{name} {number}" for number in range(2, 2 + len(unique)))
        unique.append(name if name not in unique else next(free for free in numbers if free not in unique))
    return unique[len(taken) :]


def with_defaults(sampling: Mapping[str, Any], styles: Any) -> dict[str, Any]:
    """The options of a sampling, with the defaults of style guidance where there are styles.

    Raises UserError for options of styles where there are none.
    """
    if styles:
        return SAMPLING_DEFAULTS | dict(sampling)
    if unused := [name for name in ("strengths", "style_start") if sampling.get(name) is not None]:
        raise UserError(f"{unused[0]} was given and there is no style; leave it out, or give styles", 2)
    return dict(sampling)
