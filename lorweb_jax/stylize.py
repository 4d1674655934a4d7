"""Put a style, as strong as you like, on what a prompt draws or a picture shows (style guidance of Pair Customization).

  python -m lorweb_jax.stylize --style runs/pair --prompt "a dog" --strength 6 --out dog.png
  python -m lorweb_jax.stylize --style runs/pair --image photo.png --prompt "a dog" --out styled.png
  python -m lorweb_jax.stylize --style runs/ink:4 "lora.safetensors:2:in watercolor style" --prompt "a dog" --out x.png
  python -m lorweb_jax.stylize --style runs/pair --prompt "a dog" --strength 0 2 4 6 8 --sheet --out sheet.png

A style is the folder of a run of configs/pair.py, a published style file, or any LoRA. Each step asks the base with the
prompt, the base with the negative prompt, and each style by itself, all as rows of one batch, and goes

  v = v0(negative) + true_guidance (v0(prompt) - v0(negative)) + sum of strength (v_style(prompt words) - v0(prompt))

Several prompts or images give several results: with --out results/ they are written there. With --a, --a2 and --b the
base edits by analogy, over --basis or without one, and the styles guide that.
"""

import argparse
import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.common.command_line import Parser, add_basis_config, add_image_encoder, nonempty_path, positive
from lorweb_jax.common.errors import UserError, run_command
from lorweb_jax.common.outputs import require_writable
from lorweb_jax.edit import (
    add_model_options,
    add_pipeline,
    is_analogy,
    model_options,
    progress,
    require_used,
    size,
    targets,
    write_results,
)
from lorweb_jax.images.grid import condition_grid, fit_to_model, within
from lorweb_jax.images.io import WRITTEN, read_image, require_image_name
from lorweb_jax.pipeline.arguments import MAX_SIZE, SIDE
from lorweb_jax.pipeline.mix_options import require_no_router
from lorweb_jax.settings.rules import GUIDANCE, SAMPLING_STEPS, SEED, STRENGTH, as_value

SHEET = (0.0, 2.0, 4.0, 6.0, 8.0)  # strengths of a sheet
_LONGEST_NAME = 60  # characters of a file that is named after its prompt


class StyleArgument(NamedTuple):
    """FILE[:STRENGTH[:WORDS]]; None for what isn't said."""

    path: Path
    strength: float | None
    words: str | None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.stylize", description=__doc__)
    add_pipeline(parser)
    parser.add_argument(
        "--style",
        type=style_argument,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE[:STRENGTH[:WORDS]]",
        help="folder of a run of configs/pair.py, a style's file, or any LoRA; several add up. WORDS follow the prompt "
        "in the style's own pass (default: those that the run was trained with)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        nargs="+",
        help="of styles that say none, -1000 to 1000; negative leads away from the style (default: 6; with --sheet, "
        "where it gives the columns for every style, 0 2 4 6 8)",
    )
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest)")
    parser.add_argument(
        "--weight",
        type=float,
        default=1.0,
        help="what the adapter itself is multiplied by in its pass; another thing than its strength (default: 1)",
    )
    parser.add_argument("--prompt", nargs="+", default=[""], help="one or more texts to draw, or what the images show")
    parser.add_argument("--image", type=nonempty_path, nargs="+", help="one or more pictures to put the style on")
    parser.add_argument("--a", type=nonempty_path, help="for an analogy: an image before the edit")
    parser.add_argument("--a2", type=nonempty_path, help="the same image after the edit")
    parser.add_argument("--b", type=nonempty_path, nargs="+", help="one or more images to edit likewise")
    parser.add_argument("--basis", type=nonempty_path, help="a LoRWeB basis that the analogy goes through, or a LoRA")
    add_basis_config(parser)
    add_image_encoder(parser)
    parser.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="pixels of the result (default: those of --image; else 512x512, or what the autoencoder was trained at)",
    )
    parser.add_argument("--max-size", type=int, help="longest edge of --image or of the 2x2 grid, pixels")
    parser.add_argument(
        "--out",
        required=True,
        help=f"image file to write ({' '.join(WRITTEN)}), or a folder (for several results; write / at its end)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace images of the same names, but never an input")
    parser.add_argument(
        "--sheet",
        action="store_true",
        help="one picture of all: a row for each style by itself and each prompt or image, a column for each strength",
    )
    parser.add_argument("--batch", type=positive, default=1, help="results that are made at once (default: 1)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps, 1 to 1000 (default: 50)")
    parser.add_argument(
        "--style-start", type=int, help="first step, from 0, that styles guide (default: a fifth of the steps)"
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance input of the model (default: 1)")
    parser.add_argument(
        "--true-guidance",
        type=float,
        default=4.0,
        help="classifier-free guidance; 1 for none, with a pass less a step, 0 for the negative prompt (default: 4)",
    )
    parser.add_argument(
        "--true-guidance-start", type=int, default=0, help="its first step, the prompt alone before it (default: 0)"
    )
    parser.add_argument("--negative-prompt", help="what the result should not be (default: an empty text)")
    parser.add_argument(
        "--seed", type=int, default=0, help="0 to 2^64 - 1; the same seed gives the same image (default: 0)"
    )
    parser.add_argument(
        "--published-times",
        action="store_true",
        help="space the noise levels as the published sampler does, which counts a 64th of the image's tokens",
    )
    add_model_options(parser)
    return parser.parse_args(arguments)


def style_argument(text: str) -> StyleArgument:
    """FILE[:STRENGTH[:WORDS]]; of several readings that with the longest path that exists."""
    cuts = [match.start() for match in re.finditer(":", text)] + [len(text)]
    cut = next((cut for cut in reversed(cuts) if _exists(text[:cut])), cuts[0])
    strength, colon, words = text[cut + 1 :].partition(":")
    return StyleArgument(nonempty_path(text[:cut]), _number(strength, text), words if colon else None)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # words that are longer than a file's name may be
        return False


def _number(strength: str, text: str) -> float | None:
    try:
        return float(strength) if strength else None
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"the strength in {text!r} is {strength!r}, a number was expected; write FILE:6, or FILE:6:WORDS"
        ) from None


def check(args: argparse.Namespace) -> None:
    """UserError, before anything is read or loaded, for values out of range and options that don't go together."""
    as_value(args.steps, "--steps", SAMPLING_STEPS)
    for name, rule in (("guidance", GUIDANCE), ("true_guidance", GUIDANCE), ("seed", SEED), ("weight", STRENGTH)):
        as_value(getattr(args, name), f"--{name.replace('_', '-')}", rule)
    for value in [*(args.strength or ()), *(style.strength for style in args.style if style.strength is not None)]:
        as_value(value, "a style's strength", STRENGTH)
    if args.max_size is not None:
        as_value(args.max_size, "--max-size", MAX_SIZE)
    for side in args.size or ():
        as_value(side, "--size", SIDE)
    for name, start in (("--style-start", args.style_start), ("--true-guidance-start", args.true_guidance_start)):
        if start is not None and not 0 <= start < args.steps:
            raise UserError(
                f"{name} is {start}, but the {args.steps} steps are counted from 0; give 0 to {args.steps - 1}", 2
            )
    for name, value in (
        ("--negative-prompt", args.negative_prompt),
        ("--true-guidance-start", args.true_guidance_start or None),
    ):
        if value is not None and args.true_guidance == 1:
            raise UserError(f"{name} does nothing at --true-guidance 1; give, for example, --true-guidance 4", 2)
    if args.strength and len(args.strength) > 1 and not args.sheet:
        raise UserError(
            f"{len(args.strength)} strengths were given; --sheet draws several, FILE:STRENGTH is one style's own", 2
        )
    stated = [style for style in args.style if style.strength is not None]
    if args.sheet and stated:
        raise UserError(
            f"--sheet draws each style at every --strength, so that {stated[0].path}:{stated[0].strength:g} has no use "
            "for its own; write FILE, or FILE::WORDS",
            2,
        )
    if args.strength and len(stated) == len(args.style):
        raise UserError("--strength is that of styles that state none, and each states its own; leave out either", 2)
    _check_images(args)


def _check_images(args: argparse.Namespace) -> None:
    require_used(args)
    if not is_analogy(args) and not any(prompt.strip() for prompt in args.prompt) and not args.image:
        raise UserError("neither a prompt nor an image was given; give --prompt, --image, or both", 2)
    counts = len(args.prompt), len(args.image or args.b or [None])
    if counts[0] != counts[1] and 1 not in counts:
        raise UserError(
            f"{counts[0]} prompts and {counts[1]} images were given; give one of either, or as many of both", 2
        )


def names(args: argparse.Namespace) -> list[Path | None]:
    """What each result is called after: its image where there are several or no prompts to choose from, or its prompt;
    None for a single picture of a prompt."""
    images = args.image or args.b or []
    if len(images) >= len(args.prompt):
        return list(images)
    if len(args.prompt) == 1:
        return [None]
    return [
        Path(re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:_LONGEST_NAME] or "result") for prompt in args.prompt
    ]


def _sizes(args: argparse.Namespace, pictures: Sequence[np.ndarray], example: Sequence[np.ndarray]) -> list:
    """(width, height) of each result; UserError for a picture that is too small."""
    if example:
        grid, _ = fit_to_model(condition_grid(example[0], example[0], example[0], args.max_size))
        return [(grid.shape[1] // 2, grid.shape[0] // 2)] * len(pictures)
    fitted = [fit_to_model(within(picture, args.max_size), name="image")[0] for picture in pictures]
    sizes = [args.size or picture.shape[1::-1] for picture in fitted] or [args.size]
    return sizes * (len(args.prompt) if len(sizes) == 1 else 1)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check(args)
    called = names(args)
    outs = targets(args.out, [None] if args.sheet else called)
    files = [*(args.image or args.b or []), *filter(None, (args.a, args.a2, args.basis, args.basis_config))]
    require_writable(outs, [*files, *(style.path for style in args.style)], overwrite=args.overwrite)
    pictures = [read_image(path) for path in args.image or args.b or []]
    example = [read_image(path) for path in (args.a, args.a2) if path]
    for out, side in zip(outs, _sizes(args, pictures, example)):
        require_image_name(out, None if args.sheet else side)
    from lorweb_jax.pipeline.folder import model_layers
    from lorweb_jax.pipeline.pipeline import Pipeline
    from lorweb_jax.pipeline.styles import STRENGTH_DEFAULT, load_style, require_run

    require_run(args.step, [style.path for style in args.style])
    layers = model_layers(args.pipeline)
    default = args.strength[0] if args.strength else STRENGTH_DEFAULT
    styles = [
        load_style(
            style.path,
            layers,
            default if style.strength is None else style.strength,
            style.words,
            weight=args.weight,
            step=args.step,
        )
        for style in args.style
    ]
    pipeline = Pipeline.load(args.pipeline, args.image_encoder, **model_options(args))
    if args.basis is not None:
        pipeline = pipeline.attach(args.basis, args.basis_config)
        if not example:
            require_no_router(pipeline.model.basis, "give --a, --a2 and --b, or leave --basis out")
    work = Work(pipeline, styles, args, [(*example, picture) for picture in pictures] if example else pictures)
    if args.sheet:
        write_results(outs, [work.sheet(called)], args.overwrite)
    else:
        write_results(outs, work.results(), args.overwrite)


class Work:
    """The results of a command line. subjects: the images, or the analogies (a, a2, b), that styles are put on."""

    def __init__(self, pipeline: Any, styles: Sequence[Any], args: argparse.Namespace, subjects: Sequence[Any]):
        self.pipeline, self.styles, self.args, self.subjects = pipeline, styles, args, subjects
        count = max(len(args.prompt), len(subjects))
        self.prompts = list(args.prompt) * (count if len(args.prompt) == 1 else 1)
        self.subjects = list(subjects) * (count if len(subjects) == 1 else 1)
        self.sampling = {
            name: getattr(args, name)
            for name in (
                "steps guidance seed true_guidance true_guidance_start negative_prompt style_start published_times "
                "round_to_bfloat16 max_size"
            ).split()
        }

    def results(self) -> list[np.ndarray]:
        """An image for each prompt or subject, with each style at its own strength."""
        return self._made([[style.strength for style in self.styles]])[0]

    def sheet(self, called: Sequence[Path | None]) -> np.ndarray:
        """Each style by itself at each strength, for each prompt or subject: one picture with labels."""
        from lorweb_jax.images.pictures import sheet

        strengths = self.args.strength or list(SHEET)
        alone = list(itertools.product(range(len(self.styles)), strengths))
        made = self._made([[value * (place == style) for place in range(len(self.styles))] for style, value in alone])
        rows = []
        for number, prompt in enumerate(self.prompts):
            picture = called[number] if self.subjects else None
            subject = [prompt, picture.stem if picture else ""]
            for place, style in enumerate(self.styles):
                cells = made[place * len(strengths) : (place + 1) * len(strengths)]
                label = " · ".join(filter(None, [*subject, style.name, style.words]))
                rows.append((label, [images[number] for images in cells]))
        return sheet(rows, [f"strength {value:g}" for value in strengths])

    def _made(self, strengths: Sequence[Sequence[float]]) -> list[list[np.ndarray]]:
        """For each choice of all styles' strengths the images of all prompts or subjects."""
        numbers, size = range(len(self.prompts)), self.args.batch
        batches = [numbers[first : first + size] for first in numbers[::size]]
        with progress(self.args.steps * len(batches) * len(strengths)) as callback, self._session() as session:
            return [
                [image for batch in batches for image in self._images(session, batch, each, callback)]
                for each in strengths
            ]

    def _session(self) -> contextlib.AbstractContextManager:
        """Of all that isn't an analogy, which the router may give a mix of its own each."""
        return contextlib.nullcontext() if self.args.b else self.pipeline.session(styles=self.styles)

    def _images(self, session: Any, batch: range, strengths: Sequence[float], callback: Any) -> list[np.ndarray]:
        sampling = self.sampling | {"strengths": list(strengths), "callback": callback}
        prompts, subjects = ([of[number] for number in batch] if of else None for of in (self.prompts, self.subjects))
        if self.args.b:
            return self.pipeline.edit_batch(subjects, prompts, styles=self.styles, **sampling)
        return session.generate_batch(prompts, subjects, size=self.args.size, **sampling)


if __name__ == "__main__":
    run_command(main)
