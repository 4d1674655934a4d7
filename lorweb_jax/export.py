"""Turn a trained basis into files that other programs read, and back.

  a run -> the published LoRWeB format     python -m lorweb_jax.export published runs/basis out/basis.safetensors
  a published basis -> a run's folder      python -m lorweb_jax.export checkpoint downloaded_folder runs/downloaded
  one analogy -> an ordinary LoRA          python -m lorweb_jax.export lora runs/basis out/edit.safetensors \\
      --pipeline assets/small_kontext --a a.png --a2 a_edited.png --b b.png --rank 16

The last one freezes the mix that one analogy asks for: diffusers, kohya's tools or ComfyUI (--format) then make this
edit without the router. At full rank it is exact; a lower rank is the nearest there is, its error is printed. Given a
LoRA's file in place of a basis, it writes that LoRA in another program's names. It is a style too: python -m
lorweb_jax.stylize takes the file, and its strength says how far the edit goes.

  a pair's adapter -> an ordinary LoRA     python -m lorweb_jax.export pair runs/pair out/style.safetensors \\
      --pipeline assets/small_kontext --which both --format kohya
  a style -> a member of a basis           python -m lorweb_jax.export append runs/basis runs/pair runs/both \\
      --pipeline assets/small_kontext

The adapters of Pair Customization are written one by one or summed, as LoRAs or in their published format (--format
published), which gives a published file its own bytes. An appended style has the coefficient that a mix gives it
(python -m lorweb_jax.edit --member), beside what the router gives the basis's own members.
"""

import argparse
import math
import os
from collections import Counter
from collections.abc import Mapping

from lorweb_jax.adapters.formats.mix_file import require_basis
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.command_line import Parser, add_basis_config, add_image_encoder, nonempty_path
from lorweb_jax.common.errors import UserError, run_command
from lorweb_jax.common.outputs import require_new_folder, require_writable, told_if_unwritable
from lorweb_jax.pipeline.arguments import RANK, as_dtype, as_path
from lorweb_jax.pipeline.mix_options import (
    add_example_pairs,
    add_mix_options,
    check_mix_options,
    check_pairs,
    mix_files,
    mix_of_files,
)
from lorweb_jax.settings.rules import as_value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{published,checkpoint,lora,pair,append}")

    published = commands.add_parser("published", help="a run -> the published LoRWeB format, with its config.yaml")
    published.add_argument("run", type=nonempty_path, help="folder of a training run, such as runs/basis")
    published.add_argument(
        "out", type=nonempty_path, help="the .safetensors file to write; config.yaml is written beside it"
    )
    published.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    _add_dtype(published)
    _add_overwrite(published)

    checkpoint = commands.add_parser("checkpoint", help="a published basis -> a run's folder, as training leaves one")
    checkpoint.add_argument("basis", type=nonempty_path, help="the .safetensors file, or the folder it lies in")
    checkpoint.add_argument("out", type=nonempty_path, help="the folder to make")
    add_basis_config(checkpoint)
    checkpoint.add_argument(
        "--pipeline",
        type=nonempty_path,
        help="folder of the base model; given, the basis is checked against its layers",
    )

    lora = commands.add_parser("lora", help="one analogy's mix -> an ordinary LoRA for diffusers and others")
    lora.add_argument(
        "basis", type=nonempty_path, help="a run's folder, a published basis (file or folder), or a LoRA's file"
    )
    lora.add_argument("out", type=nonempty_path, help="the .safetensors file to write")
    lora.add_argument(
        "--pipeline", type=nonempty_path, required=True, help="folder of the base model that the basis belongs to"
    )
    add_mix_options(lora)
    add_example_pairs(lora)
    lora.add_argument("--b", type=nonempty_path, help="the image to be edited likewise")
    add_image_encoder(lora)
    lora.add_argument(
        "--format",
        choices=["diffusers", "kohya", "comfyui"],
        default="diffusers",
        help="whose names the layers get (default: diffusers, which reads all three)",
    )
    _add_lora_options(lora)
    add_basis_config(lora)
    _add_dtype(lora)
    _add_overwrite(lora)

    pair = commands.add_parser("pair", help="the adapters of Pair Customization -> a LoRA, or their published format")
    pair.add_argument(
        "sources",
        type=nonempty_path,
        nargs="+",
        metavar="source",
        help="a run of configs/pair.py or a folder with its files; or one or more adapters' files, which are summed",
    )
    pair.add_argument("out", type=nonempty_path, help="the .safetensors file to write")
    pair.add_argument(
        "--pipeline", type=nonempty_path, required=True, help="folder of the base model that the adapters belong to"
    )
    pair.add_argument(
        "--which",
        choices=["style", "content", "both"],
        help="which adapter of a run or folder, or both summed (default: style)",
    )
    pair.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest)")
    pair.add_argument(
        "--format",
        choices=["diffusers", "kohya", "comfyui", "published"],
        default="diffusers",
        help="whose names the layers get (default: diffusers, which reads all four)",
    )
    _add_lora_options(pair)
    pair.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="what to store the numbers in (default: float32, of a published file in the same format its own)",
    )
    _add_overwrite(pair)

    append = commands.add_parser("append", help="styles -> members of a basis, in a run's folder")
    append.add_argument("basis", type=nonempty_path, help="a run's folder, a published basis, or a LoRA's file")
    append.add_argument(
        "styles",
        type=nonempty_path,
        nargs="+",
        metavar="style",
        help="a run of configs/pair.py, a style's file, a LoRA",
    )
    append.add_argument("out", type=nonempty_path, help="the folder to make")
    append.add_argument(
        "--pipeline", type=nonempty_path, required=True, help="folder of the base model that all belong to"
    )
    append.add_argument("--names", nargs="+", help="what mixes call the styles (default: their files' names)")
    add_basis_config(append)
    return parser.parse_args(arguments)


def _add_lora_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="cut down to this rank (default: the full rank, exact)")
    parser.add_argument(
        "--alpha",
        type=_positive_number,
        nargs="?",
        const=True,
        default=False,
        help="store an alpha with every layer, the rank unless a number is given; the update stays the "
        "same (default: none, but kohya's files always have one)",
    )


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="what to store the numbers in (default: float32; float16 halves the file)",
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace a file of the same name, but never an input")


def export_published(args: argparse.Namespace) -> None:
    require_writable([as_path(args.out, "the output", ".safetensors")], [args.run], overwrite=args.overwrite)
    from lorweb_jax.adapters.formats.basis_file import write_basis
    from lorweb_jax.pipeline.adapters import basis_of_run

    config, arrays = basis_of_run(args.run, args.step)
    with told_if_unwritable(args.out):
        write_basis(args.out, config, arrays, args.dtype)
    print(
        f"wrote {args.out} and {args.out.with_name('config.yaml')}: N = {config.size}, r = {config.rank}, "
        f"{_layers(arrays)} layers, {_count(arrays):,} numbers in {args.dtype}"
    )


def export_checkpoint(args: argparse.Namespace) -> None:
    require_new_folder(args.out)
    from lorweb_jax.adapters.formats.basis_file import read_basis
    from lorweb_jax.pipeline.adapters import existing_basis, write_run
    from lorweb_jax.pipeline.folder import model_layers

    layers = model_layers(args.pipeline) if args.pipeline else None
    config, arrays = read_basis(existing_basis(args.basis), args.basis_config, layers)
    with told_if_unwritable(args.out):
        write_run(args.out, config, arrays)
    print(
        f"wrote {args.out}: N = {config.size}, r = {config.rank}, {_layers(arrays)} layers, {_count(arrays):,} numbers"
    )


def export_lora(args: argparse.Namespace) -> None:
    out = as_path(args.out, "the output", ".safetensors")
    if args.rank is not None:
        as_value(args.rank, "--rank", RANK)
    check_mix_options(args)
    check_pairs(args.a, args.a2, args.mix)
    inputs = [args.basis, args.basis_config, *(args.a or ()), *(args.a2 or ()), args.b]
    require_writable([out], [path for path in (*inputs, *mix_files(args)) if path], overwrite=args.overwrite)
    saved = mix_of_files(args.mix, args.at) if args.mix else None
    from lorweb_jax.adapters.formats.lora_file import mixed_factors, truncate, write_lora
    from lorweb_jax.pipeline.adapters import load_basis
    from lorweb_jax.pipeline.folder import model_layers

    layers = model_layers(args.pipeline)
    config, arrays = load_basis(args.basis, layers, args.basis_config)
    mix = args.strength * _mix(args, saved, config, arrays)
    factors = mixed_factors(arrays, mix.coefficients, config.scale)
    if args.rank is not None:
        factors, error = truncate(factors, args.rank)
        _print_error(args.rank, error)
    with told_if_unwritable(out):
        write_lora(out, factors, args.dtype, args.alpha, args.format, layers)
    rank = next(iter(factors.values())).a.shape[2]
    print(
        f"wrote {out}: an ordinary LoRA of rank {rank} for {_layers(arrays)} layers, in {args.dtype}, "
        f"{args.format} names"
    )


def _print_error(rank: int | None, error) -> None:
    print(f"rank {rank}: the update is off by {error.overall:.3g} of its norm over all layers; most in")
    for name, value in sorted(error.layers.items(), key=lambda item: -item[1])[:5]:
        print(f"  {value:.3g}  {name}")


def export_pair(args: argparse.Namespace) -> None:
    out = as_path(args.out, "the output", ".safetensors")
    if args.rank is not None:
        as_value(args.rank, "--rank", RANK)
    times = Counter(map(os.path.realpath, args.sources))
    if twice := [source for source in args.sources if times[os.path.realpath(source)] > 1]:
        raise UserError(f"{twice[0]} was given twice; adapters are summed, each once (--which both for a run's two)", 2)
    require_writable([out], [*args.sources, *(source / "export" for source in args.sources)], overwrite=args.overwrite)
    from lorweb_jax.adapters import pair
    from lorweb_jax.pipeline.folder import model_layers
    from lorweb_jax.pipeline.saving import PUBLISHED, save_member
    from lorweb_jax.pipeline.styles import load_adapters, require_run

    require_run(args.step, args.sources)
    layers = model_layers(args.pipeline)
    chosen, roles = {}, set()
    for source in args.sources:
        for name, adapter in _chosen(source, load_adapters(source, layers, args.step), args.which).items():
            chosen[f"the {name} of {source}"] = adapter
            roles.add(name)
    adapters = list(chosen.values())
    member = adapters[0].member if len(adapters) == 1 else pair.summed([adapter.member for adapter in adapters])
    words = next((adapter.words for adapter in adapters if adapter.words), "")
    dtype = args.dtype or (adapters[0].dtype.name if args.format == PUBLISHED else "float32")
    error = save_member(
        out,
        member,
        layers,
        names=args.format,
        dtype=as_dtype(dtype),
        rank=args.rank,
        alpha=args.alpha,
        words="" if args.format == PUBLISHED else words,
        role="content" if roles == {"content"} else "style",
    )
    if error is not None:
        _print_error(args.rank, error)
    count = sum(map(len, member.blocks.values()))
    print(f"wrote {out}: {' and '.join(chosen)}, rank {args.rank or member.rank}, {count} layers, in {dtype}")


def _chosen(source, adapters: Mapping, which: str | None) -> Mapping:
    """What --which asks for of a run or a folder, its style by default; a file's one adapter."""
    if source.is_file() and which is None:
        return adapters
    wanted = ["content", "style"] if which == "both" else [which or "style"]
    if absent := [name for name in wanted if name not in adapters]:
        raise UserError(f"{source} holds no {absent[0]}, only {', '.join(adapters)}; choose with --which", 2)
    return {name: adapters[name] for name in wanted}


def export_append(args: argparse.Namespace) -> None:
    require_new_folder(args.out)
    names = args.names or [style.stem for style in args.styles]
    if len(names) != len(args.styles):
        raise UserError(f"{len(names)} --names were given for {len(args.styles)} styles; give one for each", 2)
    if not all(name.strip() for name in names):
        raise UserError(f"one of the --names is {min(names, key=len)!r}; give a name that edit --member can use", 2)
    if len(set(names)) < len(names):
        raise UserError(f"the styles are called {', '.join(names)}; give each a name of its own by --names", 2)
    from lorweb_jax.adapters.append import append
    from lorweb_jax.pipeline.adapters import load_basis, write_run
    from lorweb_jax.pipeline.folder import model_layers
    from lorweb_jax.pipeline.styles import load_style

    layers = model_layers(args.pipeline)
    config, arrays = load_basis(args.basis, layers, args.basis_config)
    members = {name: load_style(path, layers, words="").member for name, path in zip(names, args.styles)}
    config, arrays = append(config, arrays, members, layers)
    with told_if_unwritable(args.out):
        write_run(args.out, config, arrays)
    print(f"wrote {args.out}: N = {config.size}, r = {config.rank}, with {', '.join(names)} for edit --member")


def _mix(args: argparse.Namespace, saved: Mix | None, config, arrays) -> Mix:
    """What --mix says, or the analogy's; a basis with fixed coefficients needs neither."""
    from lorweb_jax.adapters.basis import Basis

    basis = Basis.from_arrays(config, arrays)
    chosen = "--mix" if saved is not None else "the adapter, which has no router,"
    asks = saved is None and config.coefficients.has_router
    if not asks and (unused := [name for name in ("a", "a2", "b", "image_encoder") if getattr(args, name) is not None]):
        raise UserError(
            f"--{unused[0].replace('_', '-')} was given, but {chosen} says what is exported; leave it out", 2
        )
    if saved is not None:
        require_basis(args.mix[0].path, saved, basis.fingerprint())
        return basis.own(saved)
    if not config.coefficients.has_router:
        return basis.mix(config.coefficients.default)
    if absent := [f"--{name}" for name in ("a", "a2", "b") if getattr(args, name) is None]:
        raise UserError(
            f"{', '.join(absent)} not given; the mix of this basis is chosen by three images: "
            "--a before.png --a2 after.png --b new.png, or was saved: --mix mix.safetensors",
            2,
        )
    from lorweb_jax.images.io import read_image
    from lorweb_jax.pipeline.pipeline import Pipeline

    (a, a2), *more = [(read_image(a), read_image(a2)) for a, a2 in zip(args.a, args.a2)]
    pipeline = Pipeline.load(args.pipeline, args.image_encoder).attach(basis)
    return pipeline.coefficients(a, a2, read_image(args.b), more_pairs=more)


def _layers(arrays) -> int:
    return sum(parts["a"].shape[0] for parts in arrays.values())


def _count(arrays) -> int:
    return sum(array.size for parts in arrays.values() for array in parts.values())


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    {
        "published": export_published,
        "checkpoint": export_checkpoint,
        "lora": export_lora,
        "pair": export_pair,
        "append": export_append,
    }[args.command](args)


if __name__ == "__main__":
    run_command(main)
