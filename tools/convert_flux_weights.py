"""Convert the weights of FLUX.1 Kontext between diffusers' folders and Black Forest Labs' single files.

The diffusers layout is what this project's commands load (`--pipeline=FOLDER`), training included. Tensors pass through
in pieces of 16 MiB; every one must be in the conversion table with the right shape, or nothing is written. Until all is
written it lies in OUT/NAME.partial, whose finished files the same command keeps after a kill or a full disk.

  one pipeline folder            tools/convert_flux_weights.py FLUX.1-Kontext-dev --to black-forest --out single
  the two single files           tools/convert_flux_weights.py flux1-kontext-dev.safetensors ae.safetensors \\
                                     --to diffusers --out kontext
  an all-in-one checkpoint, GGUF tools/convert_flux_weights.py all_in_one.safetensors --to diffusers --out kontext
                                 tools/convert_flux_weights.py flux1-kontext-dev-Q4_K_S.gguf --to diffusers \\
                                     --out kontext --dtype bfloat16
  the same layout, another dtype tools/convert_flux_weights.py kontext/transformer --to diffusers --out half \\
                                     --dtype float16
  read the output again, compare tools/convert_flux_weights.py --verify single
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorweb_jax.common.command_line import Parser, nonempty_path  # noqa: E402
from lorweb_jax.common.errors import UserError, run_command  # noqa: E402  (the path above comes first)
from lorweb_jax.common.outputs import require_writable  # noqa: E402


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "source",
        nargs="*",
        type=nonempty_path,
        help="a pipeline folder (its transformer and vae are converted), one of these two folders, "
        "or a .safetensors or .gguf file, told apart by the names of the tensors; or a Hub name",
    )
    parser.add_argument(
        "--to",
        choices=["diffusers", "black-forest"],
        help="diffusers: OUT/transformer and OUT/vae; "
        "black-forest: OUT/flux1-kontext.safetensors and OUT/ae.safetensors",
    )
    parser.add_argument("--out", type=nonempty_path, help="folder to write into; made if it isn't there")
    parser.add_argument(
        "--dtype",
        choices=["keep", "float32", "bfloat16", "float16"],
        default="keep",
        help="what to store the weights in (default: as in the source; float32 for fp8 with scales and "
        "for packed numbers, which loses nothing)",
    )
    parser.add_argument(
        "--model-config",
        type=nonempty_path,
        action="append",
        default=[],
        help="diffusers' config.json, for a single file of other sizes than FLUX.1's; one for each "
        "model where there are two",
    )
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=10.0,
        help="largest file in the diffusers layout, in GB of 10^9 bytes (default: 10)",
    )
    parser.add_argument(
        "--verify",
        type=nonempty_path,
        metavar="WRITTEN",
        help="convert nothing; read a file or folder that this command wrote again, and compare every "
        "tensor's name, shape, dtype and SHA-256 with what was recorded beside it",
    )
    args = parser.parse_args()
    if args.verify is None and not (args.source and args.to and args.out):
        parser.error("give the source, --to and --out, or --verify")
    if args.verify is not None and (args.source or args.to or args.out):
        parser.error("--verify converts nothing; give it alone")
    return args


def main() -> None:
    args = parse()
    # After the arguments, so that --help answers at once.
    import ml_dtypes
    import numpy as np

    from lorweb_jax.pipeline import pretrained

    if args.verify is not None:
        for checkpoint in pretrained.verify(args.verify, Progress()):
            print(f"{checkpoint.path}: {len(checkpoint)} tensors, {checkpoint.nbytes:,} bytes, as they were written")
        return
    dtype = {"keep": None, "bfloat16": ml_dtypes.bfloat16}.get(args.dtype, args.dtype)
    if not 1e-3 <= args.shard_gb <= 1e6:
        raise UserError(f"--shard-gb is {args.shard_gb}; give a number from 0.001 to 1,000,000", 2)
    # All sources are recognised, and all places found free, before the first is written.
    sources = _recognised(args)
    require_writable([pretrained.target_of(source, args.to.replace("-", "_"), args.out) for source in sources])
    for source in sources:
        checkpoint = source.checkpoint
        print(
            f"{checkpoint.path}: a FLUX {source.kind} in the {source.layout.replace('_', '-')} layout: "
            f"{len(checkpoint)} tensors, {checkpoint.nbytes:,} bytes, "
            + ", ".join(f"{count} of {name}" for name, count in checkpoint.dtypes().items()),
            flush=True,
        )
        progress = Progress()
        target, specs = pretrained.convert(
            source, args.to.replace("-", "_"), args.out, dtype, int(args.shard_gb * 1e9), progress
        )
        written = sum(spec.nbytes for spec in specs.values())
        stored = sorted({np.dtype(spec.dtype).name for spec in specs.values()})
        earlier, seconds = progress.summary()
        by_earlier = f", {earlier:,} of them by an earlier run" if earlier else ""
        print(
            f"  -> {target}: {len(specs)} tensors, {written:,} bytes{by_earlier}, {', '.join(stored)}, no difference "
            f"from the table, checksums recorded; {seconds:.1f} s ({(written - earlier) / seconds / 1e6:.0f} MB/s)",
            flush=True,
        )
    if args.to == "diffusers":
        print(
            "A whole pipeline folder also has model_index.json, scheduler, text_encoder, text_encoder_2, tokenizer "
            "and tokenizer_2: take them from a diffusers folder of the same model."
        )


class Progress:
    """Bytes, their rate and the time left: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self):
        self.bar = None

    def __call__(self, done: int, total: int) -> None:
        """`done` bytes of `total` are finished; first those that an earlier run, interrupted, has finished."""
        from lorweb_jax.common.progress import progress_bar

        if self.bar is None or self.bar.disable:  # the first call of a model
            self.bar = progress_bar("  bytes", total, done, seconds=30.0, unit="B", unit_scale=True)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()

    def summary(self) -> tuple[int, float]:
        """(bytes that an earlier run had finished, seconds since)."""
        return self.bar.initial, self.bar.format_dict["elapsed"]


def _recognised(args: argparse.Namespace) -> list:
    from lorweb_jax.common.schema import read_json
    from lorweb_jax.files.hub_cache import resolve
    from lorweb_jax.pipeline.sources import recognise_all

    sources = [resolve(path, ("transformer/*", "vae/*"), "its folder or files") for path in args.source]
    found = [recognise_all(part, args.model_config) for path in sources for part in _parts(path)]
    sources = [source for each in found for source in each.sources]
    if unused := [file for file in args.model_config if all(source.config != read_json(file) for source in sources)]:
        raise UserError(
            f"--model-config={unused[0]} belongs to none of the models given; its _class_name tells which", 2
        )
    if len(kinds := [source.kind for source in sources]) > len(set(kinds)):
        raise UserError(
            "two of the sources are the same model, and one would overwrite the other; convert them one at "
            "a time, into different folders",
            2,
        )
    for each in found:
        if each.left_out:
            print(f"{each.sources[0].checkpoint.path}: left out {', '.join(each.left_out)}", flush=True)
        if (
            any(entry.decoder for source in each.sources for entry in source.checkpoint.entries.values())
            and args.dtype == "keep"
        ):
            print(
                "fp8 with scales and packed numbers become float32, without loss; --dtype bfloat16 halves the files",
                flush=True,
            )
    return sources


def _parts(path: Path) -> list[Path]:
    """A pipeline folder's two models; anything else as it is."""
    parts = [path / name for name in ("transformer", "vae") if (path / name).is_dir()]
    return parts or [path]


if __name__ == "__main__":
    run_command(main)
