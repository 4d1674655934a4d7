"""A mix as a file: an analogy that can be kept, passed on, and mixed with others of the same basis.

One .safetensors file. Tensors: of every adapted stack, by its path, its coefficients [l, n] in float32. Metadata:

    lorweb_mix   "1", the version of this format
    basis        the fingerprint of the basis that the coefficients belong to
    prompt       the instruction that the analogy goes with; may be absent
    pictures     JSON [[a, a′], …], the names of the example pairs; may be absent
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.common.outputs import told_if_unwritable
from lorweb_jax.common.schema import checked, parse_json
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import write

_VERSION = "1"
_LARGEST = 2**28  # bytes; FLUX.1's 57 blocks have 1.5 MB for 1000 members


class SavedMix(NamedTuple):
    """What a mix's file holds. pictures: names of the example pairs (a, a′)."""

    mix: Mix
    prompt: str = ""
    pictures: tuple[tuple[str, str], ...] = ()


def write_mix(path: str | Path, mix: Mix, prompt: str = "", pictures: Sequence[tuple[str, str]] = ()) -> None:
    """Write the file, whole or not at all, in the place of one of the same name. UserError where it can't be."""
    metadata = {"lorweb_mix": _VERSION, "basis": mix.basis}
    if prompt:
        metadata["prompt"] = prompt
    if pictures:
        metadata["pictures"] = json.dumps([list(pair) for pair in pictures])
    with told_if_unwritable(path):
        write(path, mix.coefficients, metadata)


def read_mix(path: str | Path) -> SavedMix:
    """UserError for a file of another kind, a damaged one, and coefficients that are not finite."""
    checkpoint = Checkpoint(path)
    version, basis = (checkpoint.metadata.get(key, "") for key in ("lorweb_mix", "basis"))
    if not version or not basis:
        raise UserError(
            f"{path} is no saved mix; give a file that edit --save-mix or Pipeline.save_mix wrote (a LoRA or a basis "
            "is given as --basis)"
        )
    if version != _VERSION:
        raise UserError(
            f"{path} is a mix of format {printable(version, 20)}, and {_VERSION} is read here; save it again with this "
            "version, or install a newer one"
        )
    if checkpoint.nbytes > _LARGEST:
        raise UserError(
            f"{path} holds {checkpoint.nbytes:,} bytes of coefficients, at most {_LARGEST:,} were expected; save it "
            "again"
        )
    pictures = parse_json(checkpoint.metadata.get("pictures", "[]"), f"{path}: pictures")
    pairs = checked(pictures, list[tuple[str, str]], f"{path}: pictures")
    try:
        mix = Mix({name: checkpoint.read(name) for name in checkpoint}, basis)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return SavedMix(mix, checkpoint.metadata.get("prompt", ""), tuple(pairs))


def require_basis(path: str | Path, mix: Mix, fingerprint: str) -> None:
    """UserError, which names the mix's file, unless it belongs to the basis of this fingerprint."""
    if mix.basis != fingerprint:
        raise UserError(
            f"{path} is a mix of another basis ({printable(mix.basis, 40)}, this one is {fingerprint}); give the basis "
            "that it was made with, in the same precision"
        )
