"""Edit an image by analogy: a is to a2 as b is to the result. Or by words alone, or make one from them.

  python -m lorweb_jax.edit --pipeline assets/small_kontext --basis runs/basis \\
      --a a.png --a2 a2.png --b b.png --prompt "put a frame around it" --out result.png
  python -m lorweb_jax.edit --prompt "put a frame around it" --image b.png --out result.png    the base, by instruction
  python -m lorweb_jax.edit --prompt "a drawing of a red apple" --out result.png               text to image

An analogy can be kept, and mixed with others of the same basis (docs/mixes.md); --strength says how far it goes:

  python -m lorweb_jax.edit --basis runs/basis --a a.png c.png --a2 a2.png c2.png --b b.png --save-mix frame.safetensors
  python -m lorweb_jax.edit --basis runs/basis --mix frame.safetensors shade.safetensors:-0.5 --strength 0.8 \\
      --a a.png --a2 a2.png --b b.png --out result.png

Several --b, or several --image, give several results: with --out results/ they are written there under their names. An
image that is there already is replaced with --overwrite only, one of the inputs never. Images: PNG, JPEG, WebP, GIF,
BMP, TIFF, AVIF, PPM of any depth; embedded colour profiles are converted to sRGB, transparent parts laid on white.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lorweb_jax.common.command_line import Parser, add_basis_config, add_image_encoder, nonempty_path
from lorweb_jax.common.errors import UserError, run_command
from lorweb_jax.common.outputs import require_free, require_writable
from lorweb_jax.common.progress import progress_bar
from lorweb_jax.images.fit import FITS, STRETCH
from lorweb_jax.images.grid import condition_grid, fit_to_model, within
from lorweb_jax.images.io import WRITTEN, read_image, require_image_name, write_image
from lorweb_jax.pipeline.arguments import MAX_SIZE, SIDE, Images
from lorweb_jax.pipeline.mix_options import (
    add_adapt,
    add_example_pairs,
    add_members,
    add_mix_options,
    add_save_mix,
    check_kept,
    check_mix_options,
    check_pairs,
    mix_files,
    mix_of_files,
    mixes_of,
    save_mix,
)
from lorweb_jax.settings.rules import GUIDANCE, SAMPLING_STEPS, SEED, as_value

# The small base of the repository, from whatever folder the command is given; an installed package has none.
SMALL_BASE = Path(__file__).parents[1] / "assets" / "small_kontext"
FOLDED = {"auto": None, "folded": True, "low-rank": False}  # --apply, as Pipeline's methods take it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.edit", description=__doc__)
    add_pipeline(parser)
    parser.add_argument(
        "--basis",
        type=nonempty_path,
        help="a run's folder, a LoRWeB basis or a LoRA (file, folder or Hub name); "
        "without it the base model follows the prompt alone",
    )
    add_basis_config(parser)
    add_image_encoder(parser)
    add_members(parser)
    add_mix_options(parser)
    add_adapt(parser)
    add_save_mix(parser)
    add_example_pairs(parser)
    parser.add_argument("--b", type=nonempty_path, nargs="+", help="one or more images to edit likewise")
    parser.add_argument(
        "--fit",
        choices=FITS,
        default=STRETCH,
        help="what becomes of a --b of other proportions than --a: stretch gives it and the result a's (as published, "
        "the default); with restore the result is stretched back, with pad or crop b is padded or cropped in place of "
        "stretching; these three give a result of b's size",
    )
    parser.add_argument(
        "--image", type=nonempty_path, nargs="+", help="without an analogy: images to edit as the prompt says"
    )
    parser.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="without an analogy: pixels of the result (default: those of --image, or what the autoencoder was trained "
        "at)",
    )
    parser.add_argument(
        "--out",
        help=f"image file to write ({' '.join(WRITTEN)}), or a folder (for several results; write / at its end)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace images of the same names, but never an input")
    parser.add_argument("--prompt", default="", help="the edit in words (default: none)")
    parser.add_argument("--steps", type=int, default=28, help="sampling steps, 1 to 1000 (default: 28)")
    parser.add_argument(
        "--guidance", type=float, help="guidance input of the model (default: 2.5 for an analogy, else 3.5)"
    )
    parser.add_argument(
        "--true-guidance",
        type=float,
        default=1.0,
        help="classifier-free guidance against --negative-prompt, at twice the cost (default: 1, none)",
    )
    parser.add_argument("--negative-prompt", help="what the result should not be (default: an empty text)")
    parser.add_argument(
        "--seed", type=int, default=0, help="0 to 2^64 - 1; the same seed gives the same image (default: 0)"
    )
    parser.add_argument(
        "--max-size", type=int, help="longest edge of the 2x2 grid, or of --image, pixels; larger ones are resized"
    )
    parser.add_argument(
        "--apply",
        choices=list(FOLDED),
        default="auto",
        help="fold the mix into the weights or apply it beside them (default: whichever is possible and faster)",
    )
    add_model_options(parser)
    return parser.parse_args(arguments)


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline",
        type=nonempty_path,
        default=SMALL_BASE,
        required=not SMALL_BASE.is_dir(),
        help="folder of a FLUX.1 Kontext pipeline in diffusers' layout, or its Hub name, such as "
        "black-forest-labs/FLUX.1-Kontext-dev (default: the small one of the repository)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How the transformer computes."""
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="what the transformer computes in (default: float32; bfloat16 on GPU and TPU)",
    )
    parser.add_argument(
        "--attention",
        choices=["auto", "xla", "cudnn", "pallas"],
        default="auto",
        help="auto: pallas on TPUs, cudnn on NVIDIA GPUs in 16 bit, else xla",
    )
    parser.add_argument(
        "--quantization",
        choices=["none", "int8", "fp8"],
        default="none",
        help="keep the transformer's blocks in 8 bit, half of bfloat16's memory (default: none)",
    )
    parser.add_argument(
        "--unstacked",
        action="store_true",
        help="give each of the transformer's blocks arrays of its own: faster steps on a GPU, longer compiling; for "
        "many images",
    )
    parser.add_argument(
        "--offload",
        choices=["none", "blocks"],
        default="none",
        help="keep the blocks of transformer and T5 in the host's memory and stream them to a device that is too small "
        "for them, in every step (default: none)",
    )
    parser.add_argument(
        "--mesh",
        type=mesh,
        metavar="AXIS=SIZE,…",
        help="share the model between this machine's devices: sequence=4 each image's tokens (faster, whole weights "
        "on each), tensor=4 every layer, fsdp=4 weights alone; or several, such as sequence=4,tensor=2 (default: one "
        "device)",
    )
    parser.add_argument(
        "--round-to-bfloat16",
        action="store_true",
        help="round timestep and guidance as the published pipeline does, to compare pixel by pixel",
    )


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What Pipeline.load takes of `add_model_options`."""
    names = ("dtype", "attention", "quantization", "unstacked", "offload", "mesh")
    return {name: getattr(args, name) for name in names}


def mesh(text: str) -> dict[str, int]:
    """AXIS=SIZE,… -> {axis: size}"""
    sizes = {}
    for part in text.split(","):
        axis, _, number = part.replace(" ", "").partition("=")
        if not number.removeprefix("-").isdecimal() or axis in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} is no mesh; give one such as sequence=4,tensor=2")
        sizes[axis] = int(number)
    return sizes


def size(text: str) -> tuple[int, int]:
    """WxH -> (W, H)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 1024x768")
    return int(width), int(height)


def _check(args: argparse.Namespace) -> None:
    """UserError, before anything is read or loaded, for values out of range and options that don't go together."""
    as_value(args.steps, "--steps", SAMPLING_STEPS)
    if args.guidance is not None:
        as_value(args.guidance, "--guidance", GUIDANCE)
    as_value(args.true_guidance, "--true-guidance", GUIDANCE)
    as_value(args.seed, "--seed", SEED)
    if args.max_size is not None:
        as_value(args.max_size, "--max-size", MAX_SIZE)
    if args.negative_prompt is not None and args.true_guidance == 1:
        raise UserError("--negative-prompt does nothing at --true-guidance 1; give, for example, --true-guidance 3", 2)
    require_used(args)
    check_mix_options(args)
    check_pairs(args.a, args.a2, args.mix)
    check_kept(args)
    if is_analogy(args):
        if args.apply == "folded" and len(args.b) > 1:
            raise UserError(f"--apply folded serves one --b, {len(args.b)} were given; leave it out", 2)
    elif args.fit != STRETCH:
        raise UserError(f"--fit {args.fit} is of an analogy's --b, and none was given; leave it out", 2)
    elif not args.prompt and args.out is not None:
        raise UserError("neither an analogy nor a prompt was given; give --a, --a2 and --b, or --prompt", 2)
    for side in args.size or ():
        as_value(side, "--size", SIDE)


def is_analogy(args: argparse.Namespace) -> bool:
    """Whether --a, --a2 and --b are given. UserError for some of them alone, and beside --image or --size."""
    analogy = {f"--{name}": getattr(args, name) for name in ("a", "a2", "b")}
    if not any(analogy.values()):
        return False
    if absent := [name for name, value in analogy.items() if not value]:
        raise UserError(f"{' and '.join(absent)} not given; an analogy is --a before --a2 after --b new", 2)
    if unused := [name for name in ("image", "size") if getattr(args, name)]:
        raise UserError(
            f"--{unused[0]} was given beside an analogy, which has its image and size of its own; leave out either", 2
        )
    return True


def require_basis_of_options(args: argparse.Namespace) -> None:
    """UserError for --basis-config or --image-encoder without --basis."""
    for name in ("basis_config", "image_encoder"):
        if getattr(args, name) is not None and args.basis is None:
            raise UserError(f"--{name.replace('_', '-')} is of a basis, and no --basis was given; give it", 2)


def require_used(args: argparse.Namespace) -> None:
    """UserError for options that belong to others which were not given."""
    require_basis_of_options(args)
    if args.max_size is not None and not (args.b or args.image):
        raise UserError("--max-size is of images, and none was given; leave it out, or give --size", 2)


def targets(out: str, images: list[Path | None]) -> list[Path]:
    """Where each result goes: into the file `out`, or under the name of its image into the folder."""
    if not out.strip():
        raise UserError(f"--out is {out!r}; give an image file or a folder (./ for the current one)", 2)
    path, suffix = Path(out), Path(out).suffix
    if path.exists() and not path.is_dir():
        require_free(path, overwrite=True)  # a device
    # A version such as results/v1.5 is a folder's name; other suffixes are of files, wanted or misspelt.
    folder = (
        out.endswith(("/", os.sep))
        or path.is_dir()
        or not suffix
        or suffix[1:].isdecimal()
        or len(images) > 1
        and suffix.lower() not in WRITTEN
    )
    if folder:
        return [path / (f"{image.stem}.png" if image else "result.png") for image in images]
    require_image_name(path)
    if len(images) > 1:
        raise UserError(
            f"{len(images)} results are asked for, and --out is one file, {out}; give a folder, such as results/", 2
        )
    return [path]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    _check(args)
    paths = args.b or args.image or [None]
    outs = targets(args.out, paths) if args.out is not None else []
    inputs = [*(args.a or ()), *(args.a2 or ()), *paths, args.basis, args.basis_config, *mix_files(args)]
    files = [*outs, *([args.save_mix] if args.save_mix else [])]
    require_writable(files, [path for path in inputs if path], overwrite=args.overwrite)
    images = [path and read_image(path) for path in paths]
    analogies: list[Images] = []
    pairs = [(read_image(a), read_image(a2)) for a, a2 in zip(args.a or (), args.a2 or ())]
    if args.b:
        a, a2 = pairs[0]
        analogies = [(a, a2, b) for b in images]
        grid, _ = fit_to_model(condition_grid(a, a, a, args.max_size))
        quadrant = grid.shape[1] // 2, grid.shape[0] // 2
        for path, image in zip(outs, images):
            require_image_name(path, quadrant if args.fit == STRETCH else image.shape[1::-1])
    elif args.image:
        for image in images:
            fit_to_model(within(image, args.max_size), name="image")
    saved = mix_of_files(args.mix, args.at) if args.mix else None
    from lorweb_jax.pipeline.pipeline import Pipeline

    pipeline = Pipeline.load(args.pipeline, args.image_encoder, **model_options(args))
    if args.basis is not None:
        pipeline = pipeline.attach(args.basis, args.basis_config)
    mixes = mixes_of(pipeline, args, saved, analogies, pairs[1:])
    if args.save_mix:
        save_mix(pipeline, args, mixes[0])
    if not outs:
        return
    sampling: dict[str, Any] = {
        "steps": args.steps,
        "seed": args.seed,
        "true_guidance": args.true_guidance,
        "negative_prompt": args.negative_prompt,
        "round_to_bfloat16": args.round_to_bfloat16,
        "max_size": args.max_size,
    }
    if args.guidance is not None:
        sampling["guidance"] = args.guidance
    with progress(args.steps * (1 if analogies else len(images))) as sampling["callback"]:
        if analogies:
            options = {"mix": mixes or None, "folded": FOLDED[args.apply], "fit": args.fit}
            results = pipeline.edit_batch(analogies, [args.prompt] * len(images), **options, **sampling)
        else:
            with pipeline.session(mixes[0] if mixes else None, folded=FOLDED[args.apply]) as session:
                results = [session.generate(args.prompt, image, size=args.size, **sampling) for image in images]
    write_results(outs, results, args.overwrite)


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[int, Any], Any] | None]:
    """A callback of the sampling that moves a bar on a terminal; None elsewhere, where all steps are one program."""
    if not sys.stdout.isatty():
        yield None
        return
    with progress_bar("sampling", steps, 0, seconds=1, unit="step") as bar:
        yield lambda step, latents: bar.update()


def write_results(paths: list[Path], results: list[np.ndarray], overwrite: bool) -> None:
    """Write every image that can be; UserError, at the end, for those that can't."""
    failed = []
    for path, result in zip(paths, results):
        try:
            written = write_image(path, result, overwrite)
        except UserError as error:  # the others are not lost for it
            failed.append(str(error))
        else:
            print(f"wrote {written}: {result.shape[1]}x{result.shape[0]} pixels")
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} results are not written: {'; '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
