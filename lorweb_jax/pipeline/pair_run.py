"""Pair Customization in a run's folder: the members that it trains, and what it knows of the style."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import AdaptedLayer
from lorweb_jax.adapters.formats import lora_names
from lorweb_jax.adapters.members import Members
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.finite import require_finite
from lorweb_jax.models.flux1.record import DOUBLE, SINGLE

EXPORTED = {name: f"export/{name}_lora.safetensors" for name in pair.MEMBERS}  # in a run's folder, at its end
_PARAMETER = re.compile(r"(?:.*\.)?members\.(?P<member>content|style)\.(?P<path>.+)\.(?P<part>a|free_a|b)")


class Words(NamedTuple):
    """The captions of a run: `content` of its content image, and `style`, the words that its style's caption adds."""

    content: str
    style: str

    @property
    def stylised(self) -> str:
        """The caption of the stylised image."""
        return f"{self.content} {self.style}"


def make_members(settings: Mapping[str, Any], layers: Mapping[str, AdaptedLayer]) -> Members:
    """The members, all zero, that `config.pair` asks for on a model's layers; without those that are on no block.

    Raises UserError for lists of blocks that the model doesn't have, and for ranks that are larger, or need more
    orthonormal rows, than a layer's input is wide.
    """
    groups = [paths for paths in map(tuple, lora_names.PROCESSORS.values()) if paths[0] in layers]
    depths = {paths[0].partition(".")[0]: layers[paths[0]].depth for paths in groups}
    blocks = {
        member: {
            stack: pair.parse_blocks(settings[f"{kind}_{member}"], depths[stack], f"config.pair.{kind}_{member}")
            for kind, stack in (("double", DOUBLE), ("single", SINGLE))
            if stack in depths
        }
        for member in pair.MEMBERS
    }
    ranks = {member: settings[f"{member}_rank"] for member in pair.MEMBERS if any(blocks[member].values())}
    if not ranks:
        raise UserError("config.pair names no block for either adapter; give at least one list of blocks", 2)
    members = Members(layers, groups, ranks, blocks, orthogonal=settings["orthogonal"])
    narrowest = min(layers[path].inputs for paths in groups for path in paths)
    for member, rank in ranks.items():
        if rank > narrowest:
            raise UserError(
                f"config.pair.{member}_rank is {rank}, but some layers that it adapts have {narrowest} inputs; "
                f"give a rank of at most {narrowest}",
                2,
            )
    for width in members.shared_widths:
        pair.require_ranks(tuple(ranks.values()), width)
    return members


def parse(name: str) -> tuple[str, str, str] | None:
    """(member, path of its first layer, "a", "free_a" or "b") of a parameter's dotted name; None if it is none."""
    match = _PARAMETER.fullmatch(name)
    return (match["member"], match["path"], match["part"]) if match else None


def members_of_run(
    workdir: str | Path, layers: Mapping[str, AdaptedLayer], step: int | None = None
) -> dict[str, pair.Member]:
    """The adapters that a run trained, "content" and "style", at its newest intact checkpoint or at `step`.

    layers: of the model, by path (`Backbone.adapted`). An adapter that the run has on no block is left out. Raises
    UserError for the folder of another job's run, without such a checkpoint, of another model, and for numbers that
    aren't finite.
    """
    from lorweb_jax.runs.checkpoints import restore_trainables  # orbax, which published files don't need

    workdir = Path(workdir)
    _settings(workdir)
    flat, config = restore_trainables(workdir, step)
    members = nnx.eval_shape(lambda: make_members(config.pair, layers))
    arrays = {parsed: array for name, array in flat.items() if (parsed := parse(name))}
    for parsed, variable in members.parameters().items():
        array = arrays.get(parsed)
        if array is None or array.shape != variable.shape:
            stored = "nothing" if array is None else list(array.shape)
            raise UserError(
                f"the checkpoint of {workdir} has {stored} as {'.'.join(parsed)}, expected {list(variable.shape)}; "
                "give the base model that the run was trained with"
            )
        require_finite(
            array,
            f"the checkpoint of {workdir}: {'.'.join(parsed)}",
            "take an earlier checkpoint, or train again with a lower learning rate",
        )
        variable.set_value(array)
    return {name: members.member(name) for name in members.names}


def words_of_run(workdir: str | Path) -> Words:
    """The captions of a run's images, from its config. UserError for the folder of another job's run."""
    data = _settings(Path(workdir)).data
    return Words(data.caption, data.style_words)


def _settings(workdir: Path):
    """The config of a run of this job."""
    from lorweb_jax.runs.checkpoints import CONFIG
    from lorweb_jax.settings import config as configs

    config = configs.load(workdir / CONFIG)
    if config.job != "pair":
        raise UserError(
            f"{workdir} is a run of the job {config.job!r}, which trains no pair of adapters; give the folder of a run "
            "of configs/pair.py"
        )
    return config
