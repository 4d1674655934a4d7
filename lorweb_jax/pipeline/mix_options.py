"""Options of commands that say which mix of a basis is used: an analogy's pairs, saved mixes, their weights, strength.

With `--mix` the mix is strength · Σ weight_i · mix_i, with `--at T` strength · ((1 − T) · weight_1 · mix_1 + T ·
weight_2 · mix_2); without them it is strength · the mean, over the example pairs, of the router's coefficients.
"""

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorweb_jax.adapters.formats.mix_file import read_mix, require_basis
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.command_line import nonempty_path
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.pipeline.arguments import Images, Pair, as_path
from lorweb_jax.settings.rules import SAMPLING_STEPS, STRENGTH, as_value

if TYPE_CHECKING:  # a command imports jax once its command line is known to be good
    from lorweb_jax.adapters.basis import Basis
    from lorweb_jax.pipeline.pipeline import Pipeline


class MixArgument(NamedTuple):
    """FILE[:WEIGHT]."""

    path: Path
    weight: float


def mix_argument(text: str) -> MixArgument:
    """FILE[:WEIGHT]; a file whose name is the whole text goes before."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return MixArgument(nonempty_path(text), 1.0)
    try:
        return MixArgument(nonempty_path(path), float(weight))
    except ValueError:
        if re.search(r"\.safetensors:[^/]*$", text):
            raise argparse.ArgumentTypeError(
                f"the weight in {text!r} is {weight!r}, a number was expected; write FILE:0.5"
            ) from None
    return MixArgument(nonempty_path(text), 1.0)


def add_example_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--a",
        type=nonempty_path,
        nargs="+",
        help="an image before the edit, whose size is the result's; of several example pairs the first is shown to the "
        "model, and the coefficients are the mean over all",
    )
    parser.add_argument("--a2", type=nonempty_path, nargs="+", help="the same image, or images, after the edit")


def add_members(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--member",
        type=member,
        nargs="+",
        action="extend",
        metavar="NAME:COEFFICIENT",
        help="styles that the basis took up (python -m lorweb_jax.export append), added to what the router chooses; "
        "--strength doesn't change them",
    )


def add_adapt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapt",
        type=int,
        metavar="STEPS",
        help="fit the coefficients, all weights frozen, to the pair a, a2 by so many gradient steps, 1 to 1000; each "
        "takes about as long as four of sampling",
    )


def add_save_mix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-mix",
        type=nonempty_path,
        metavar="FILE",
        help="write the mix that the result is made with, for --mix (a .safetensors file); without --out nothing else "
        "is made",
    )


def member(text: str) -> tuple[str, float]:
    """NAME:COEFFICIENT -> (name, coefficient)."""
    name, _, coefficient = text.rpartition(":")
    try:
        if name:
            return name, float(coefficient)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no member with its coefficient; give one such as ink:0.8")


def add_mix_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="what the coefficients, hence the update of the weights, are multiplied by, -1000 to 1000: 0 is the base "
        "by itself, above 1 exaggerates, below 0 leads away (default: 1)",
    )
    parser.add_argument(
        "--mix",
        type=mix_argument,
        nargs="+",
        action="extend",
        metavar="FILE[:WEIGHT]",
        help="saved mixes in the router's place, summed at their weights (default weight: 1; negative ones subtract)",
    )
    parser.add_argument(
        "--at",
        type=float,
        metavar="T",
        help="between two --mix: 0 is the first, 1 the second, outside goes on beyond them",
    )


def check_mix_options(args: argparse.Namespace) -> None:
    """UserError, before anything is loaded, for values out of range and options that don't go together."""
    as_value(args.strength, "--strength", STRENGTH)
    for path, weight in args.mix or ():
        as_value(weight, f"the weight of --mix {path}", STRENGTH)
    if args.at is not None:
        as_value(args.at, "--at", STRENGTH)
        if len(args.mix or ()) != 2:
            raise UserError(f"--at is a place between two --mix, and {len(args.mix or ())} were given; give two", 2)


def check_pairs(before: Sequence[Path] | None, after: Sequence[Path] | None, mix: Sequence[MixArgument] | None) -> None:
    """UserError for unequal numbers of --a and --a2, and for several pairs where --mix leaves no use for them."""
    before, after = before or (), after or ()
    if before and after and len(before) != len(after):
        raise UserError(
            f"{len(before)} images were given by --a and {len(after)} by --a2; give an a2 for each a, in order", 2
        )
    if mix and len(before) > 1:
        raise UserError(
            f"{len(before)} example pairs were given beside --mix, which is in the place of what they would choose; "
            "give the pair that the model is shown alone",
            2,
        )


def check_kept(args: argparse.Namespace) -> None:
    """UserError for --member, --save-mix and the options of mixes where they have nothing to work on."""
    members = [name for name, _ in args.member or ()]
    if twice := [name for name in members if members.count(name) > 1]:
        raise UserError(f"--member {twice[0]} was given {members.count(twice[0])} times; give one coefficient", 2)
    for name, coefficient in args.member or ():
        as_value(coefficient, f"the coefficient of --member {name}", STRENGTH)
    if args.member and args.basis is None:
        raise UserError("--member is one that a basis took up, and no --basis was given; give it", 2)
    for name, present in (
        ("mix", args.mix),
        ("strength", args.strength != 1),
        ("adapt", args.adapt is not None),
        ("save-mix", args.save_mix),
    ):
        if present and args.basis is None:
            raise UserError(f"--{name} is of a basis, and no --basis was given; give it", 2)
    if args.adapt is not None:
        as_value(args.adapt, "--adapt", SAMPLING_STEPS)
        if not args.b:
            raise UserError("--adapt fits the coefficients to a pair, and none was given; give --a, --a2 and --b", 2)
    if args.save_mix is None:
        if args.out is None:
            raise UserError("neither --out nor --save-mix was given; give a file for the result", 2)
        return
    as_path(args.save_mix, "--save-mix", ".safetensors")
    if len(args.b or ()) > 1 and not args.mix:
        raise UserError(
            f"--save-mix writes one mix, and the router chooses one for each of {len(args.b)} --b; give one --b", 2
        )


def mix_files(args: argparse.Namespace) -> list[Path]:
    return [path for path, _ in args.mix or ()]


def mix_of_files(files: Sequence[MixArgument], at: float | None = None) -> Mix:
    """The sum of saved mixes at their weights, or the place `at` between two. UserError for mixes of two bases."""
    mixes = [weight * read_mix(path).mix for path, weight in files]
    for (path, _), mix in zip(files, mixes):
        if mix.basis != mixes[0].basis:
            raise UserError(
                f"{files[0].path} and {path} are mixes of two bases, {mixes[0].basis} and {mix.basis}; give mixes that "
                "were made with one basis"
            )
    return sum(mixes) if at is None else Mix.lerp(*mixes, at)


def mixes_of(
    pipeline: "Pipeline",
    args: argparse.Namespace,
    saved: Mix | None,
    analogies: Sequence[Images],
    more_pairs: Sequence[Pair],
) -> list[Mix]:
    """One mix for all results, or one for each analogy; none where no option asks for another than the pipeline's own.

    It is the mix of --mix (`saved`), of each analogy, or of a LoRA, moved by --adapt, times --strength, and each
    --member at its coefficient. Raises UserError for a mix of another basis, a member that there isn't, and where
    there is no mix.
    """
    basis = pipeline.model.basis
    if not (saved or args.member or args.strength != 1 or args.adapt or args.save_mix or more_pairs):
        if not analogies:
            require_no_router(basis, "give --a, --a2 and --b, or a saved mix by --mix")
        return []
    assert basis is not None  # check_kept asked for one
    _require_members(basis, args.basis, args.member or ())
    named = [coefficient * pipeline.mix(name) for name, coefficient in args.member or ()]
    if saved is not None:
        require_basis(args.mix[0].path, saved, basis.fingerprint())
        mixes = [basis.own(saved)]
    elif analogies:
        mixes = pipeline.coefficients_batch(analogies, more_pairs=more_pairs)
    elif named and args.strength == 1:
        return [sum(named)]
    else:
        require_no_router(basis, "give --a, --a2 and --b, or a saved mix by --mix")
        mixes = [pipeline.mix(basis.config.coefficients.default)]
    if args.adapt:
        mixes = _adapted(pipeline, args, analogies, mixes)
    return [sum(named, args.strength * mix) for mix in mixes]


def require_no_router(basis: "Basis | None", remedy: str) -> None:
    """UserError where a basis chooses its coefficients by an analogy, and there is none."""
    if basis is not None and basis.config.coefficients.has_router:
        raise UserError(f"the router of this basis chooses a mix by an analogy, and none was given; {remedy}", 2)


def _adapted(
    pipeline: "Pipeline", args: argparse.Namespace, analogies: Sequence[Images], mixes: Sequence[Mix]
) -> list[Mix]:
    """Each mix after --adapt steps on the first pair; says how long that took."""
    began = time.perf_counter()
    options = {"steps": args.adapt, "seed": args.seed, "max_size": args.max_size}
    moved = [pipeline.adapt(*images, args.prompt, mix=mix, **options) for images, mix in zip(analogies, mixes)]
    seconds = time.perf_counter() - began
    say(f"coefficients adapted to the pair: {args.adapt} steps in {seconds:.1f} s, compiling included")
    return moved


def _require_members(basis: "Basis", path: Path, members: Sequence[tuple[str, float]]) -> None:
    """UserError for a member that the basis didn't take up; its mixes by name aren't added to themselves."""
    there = dict(basis.config.appended)
    if absent := [name for name, _ in members if name not in there]:
        raise UserError(
            f"{path} has taken up no member {absent[0]!r}, only {', '.join(there) or 'none at all'}; append one by "
            "python -m lorweb_jax.export append",
            2,
        )


def save_mix(pipeline: "Pipeline", args: argparse.Namespace, mix: Mix) -> None:
    """Write --save-mix, with the prompt and the names of the pairs that chose the mix."""
    pictures = [] if args.mix else [(a.name, a2.name) for a, a2 in zip(args.a or (), args.a2 or ())]
    pipeline.save_mix(args.save_mix, mix, prompt=args.prompt, pictures=pictures)
    c = mix.coefficients.values()
    print(f"wrote {args.save_mix}: {next(iter(c)).shape[1]} coefficients for each of {sum(map(len, c))} layers")
