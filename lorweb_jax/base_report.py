"""What a small base can do: a page of figures and pictures, made on drawings and photographs that no training showed.

    python -m lorweb_jax.base_report assets/small_kontext

For each family of instructions and each set of drawings: the share of pictures on which the base's edit is nearer to
the truth than the picture unchanged, by LPIPS and by MSE. Text to image: samples, and how often our own CLIP vision
takes them for the kind that was asked for, among 20. Reconstruction by the autoencoder. Written are report.md,
figures.json and the pictures.
"""

import argparse
import math
from pathlib import Path

from lorweb_jax.common.command_line import Parser, nonempty_path, positive
from lorweb_jax.common.errors import UserError, run_command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.base_report", description=__doc__)
    parser.add_argument("pipeline", type=nonempty_path, help="the base's folder")
    parser.add_argument(
        "--drawings",
        type=nonempty_path,
        default=Path("local_data/drawings64.npz"),
        help="made by tools/pack_drawings.py (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=nonempty_path, default=Path("docs/base"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--per-cell", type=positive, default=24, help="pictures of each family and set (default: %(default)s)"
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=5,
        help="pictures made from text of each of 20 kinds in each of 5 styles (default: %(default)s)",
    )
    parser.add_argument("--steps", type=positive, default=12, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--cfg",
        type=float,
        default=3.0,
        help="classifier-free guidance of text to image; 1 is none (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and choice (default: 0)")
    args = parser.parse_args(arguments)
    if args.seed < 0 or not math.isfinite(args.cfg):
        parser.error(f"--seed is {args.seed}, --cfg {args.cfg}; give a seed of 0 or more and a finite guidance")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; name a folder")
    if not args.pipeline.is_dir():
        raise UserError(f"there is no folder {args.pipeline}; give a pipeline, such as assets/small_kontext", 2)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    from lorweb_jax.data.embedded.drawing_sets import load_sets
    from lorweb_jax.pipeline.pipeline import Pipeline
    from lorweb_jax.processes.host_memory import keep_freed_memory
    from lorweb_jax.small_base.page import write_page

    keep_freed_memory()
    drawings = load_sets(args.drawings)
    write_page(
        Pipeline.load(args.pipeline),
        drawings,
        args.out,
        per_cell=args.per_cell,
        samples=args.samples,
        steps=args.steps,
        cfg=args.cfg,
        seed=args.seed,
        command=f"python -m lorweb_jax.base_report {args.pipeline}",
    )
    print((args.out / "report.md").read_text(encoding="utf-8"))
    print(f"wrote report.md, figures.json and pictures in {args.out}")


if __name__ == "__main__":
    run_command(main)
