"""Compare methods of making b' on the same analogies: tables, a report, and a judge's opinion if you like.

  python -m lorweb_jax.evaluate runs/basis runs/single_lora --pipeline assets/small_kontext --data embedded --out eval
  python -m lorweb_jax.evaluate ours=runs/basis lora.safetensors --pipeline P --data unseen=FOLDER --out eval
  python -m lorweb_jax.evaluate --out eval            the report again, from the records in eval
  python -m lorweb_jax.evaluate --out eval --judge http://localhost:8000/v1 --judge-model NAME
  python -m lorweb_jax.evaluate --out eval --judge tools/transformers_judge.py:local=FOLDER

A method is a run's folder, a LoRWeB basis, a LoRA (file, folder or Hub name), or a pair style (style:PATH:STRENGTH, a
run of configs/pair.py); wrong:BASIS, mean:BASIS, pairs:BASIS, adapted:BASIS or strength:0.5:BASIS are a basis with
other coefficients than its router's: for another task's pair, their mean, the mean over the task's pairs, adapted to
the one pair, or multiplied (docs/evaluation.md). "base", the base with the instruction alone, and "copy", b as it is,
are added. NAME=METHOD names one. Data: in any layout of docs/data.md,
such as Relation252K's, or <category>/<instruction>/ with images a, a2, b and b2, each with the name of its split
(seen=FOLDER); or "embedded", the drawings that come with the package; or "embedded:all", five kinds of analogies by how
far they lie from what the default run trains on, of which "embedded:people" is one.

OUT keeps one record a result. The same command goes on where it was stopped, another one with other methods adds
theirs; records of other triplets, sizes or seeds are refused. Written are results.json, results.md and report.html.
"""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lorweb_jax.common.command_line import Parser, add_basis_config, add_image_encoder, nonempty_path, positive
from lorweb_jax.common.errors import UserError, run_command
from lorweb_jax.common.outputs import require_writable
from lorweb_jax.edit import add_model_options, model_options
from lorweb_jax.evaluation.chat import Endpoint
from lorweb_jax.evaluation.words import WORDS, is_own, parse_data, parse_method
from lorweb_jax.files.hub_cache import is_name
from lorweb_jax.pipeline.arguments import MAX_SIZE
from lorweb_jax.settings.rules import GUIDANCE, SAMPLING_STEPS, SEED, SHOWN_AT_ONCE, SHOWN_PER_TASK, as_value

if TYPE_CHECKING:
    from lorweb_jax.data.problems import Problems

FILES = ("results.json", "results.md", "report.html", "setup.json", "scores.json")
EMBEDDED = "embedded"
# What `evaluate --out OUT` alone may be given beside it: it makes a report of the images that are there.
_OF_A_REPORT = {
    *("methods", "data", "out", "also", "endpoint", "judge", "judge_model", "judge_key", "judge_at_once"),
    *("judge_timeout", "judge_tries", "judge_without_json_mode"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.evaluate", description=__doc__)
    parser.add_argument(
        "methods", nargs="*", metavar="METHOD", help="[NAME=] run, basis, LoRA, style:PATH, wrong:BASIS, base, copy"
    )
    parser.add_argument("--pipeline", type=nonempty_path, help="folder or Hub name of the base model")
    parser.add_argument(
        "--data", nargs="+", metavar="[SPLIT=]FOLDER", help=f"data folders, {EMBEDDED} or {EMBEDDED}:KIND"
    )
    parser.add_argument(
        "--cache",
        type=nonempty_path,
        default=Path("local_data"),
        help="where embedded data are built (default: %(default)s)",
    )
    add_basis_config(parser)
    add_image_encoder(parser)
    parser.add_argument("--clip", type=nonempty_path, help="CLIP or SigLIP folder that scores (default: the router's)")
    parser.add_argument("--without-references", action="store_true", help="don't add base and copy")
    parser.add_argument("--per-task", type=int, default=2, help="analogies of each task (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=2.5, help="guidance (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same for every method (default: 0)")
    parser.add_argument(
        "--max-size",
        type=int,
        metavar="PX",
        help="longest edge of the 2x2 grid; larger ones are made smaller (default: no limit)",
    )
    parser.add_argument("--batch", type=int, default=16, help="analogies sampled at once (default: %(default)s)")
    add_model_options(parser)
    parser.add_argument(
        "--part",
        type=part,
        metavar="K/N",
        help="make the K-th of N parts alone, beside processes for the others; no report",
    )
    parser.add_argument("--scores", nargs="+", metavar="NAME", help="which scores (default: all)")
    parser.add_argument(
        "--add-score", nargs="+", default=[], metavar="FILE.py:FUNCTION", help="scores of your own (docs/evaluation.md)"
    )
    parser.add_argument("--also", type=nonempty_path, nargs="+", default=[], help="other --out folders to compare with")
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible endpoint of a judge with eyes, such as http://localhost:8000/v1, or FILE.py:FUNCTION",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's model")
    parser.add_argument(
        "--judge-key",
        metavar="VARIABLE",
        default="OPENAI_API_KEY",
        help="environment variable that holds the key, if one is needed (default: %(default)s)",
    )
    parser.add_argument("--judge-at-once", type=positive, default=4, help="questions at once (default: %(default)s)")
    parser.add_argument(
        "--judge-timeout", type=positive, default=60, help="seconds for an answer (default: %(default)s)"
    )
    parser.add_argument("--judge-tries", type=positive, default=4, help="tries for an answer (default: %(default)s)")
    parser.add_argument(
        "--judge-without-json-mode", action="store_true", help="for servers that don't know response_format"
    )
    parser.add_argument("--out", type=nonempty_path, help="folder (default: evaluation, in or beside the first method)")
    args = parser.parse_args(arguments)
    rules = {
        "per_task": SHOWN_PER_TASK,
        "steps": SAMPLING_STEPS,
        "guidance": GUIDANCE,
        "seed": SEED,
        "batch": SHOWN_AT_ONCE,
        **({} if args.max_size is None else {"max_size": MAX_SIZE}),
    }
    for name, rule in rules.items():
        as_value(getattr(args, name), f"--{name.replace('_', '-')}", rule)
    _check(args, parser)
    return args


def given_of(args: argparse.Namespace, parser: Parser, names: Iterable[str]) -> str | None:
    """The first of these options that isn't as it would be if it hadn't been given."""
    changed = (name for name in names if getattr(args, name) != parser.get_default(name))
    return next((f"--{name.replace('_', '-')}" for name in changed), None)


def part(text: str) -> tuple[int, int]:
    """K/N -> (K, N), 1 ≤ K ≤ N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 1/4, 2/4")
    return int(number), int(count)


def _check(args: argparse.Namespace, parser: Parser) -> None:
    """UserError, before anything is loaded, for options that don't go together; completes methods and --out."""
    args.endpoint = _endpoint(args)
    if bool(args.methods) != bool(args.data):
        missing = "--data" if args.methods else "no method"
        raise UserError(f"{missing} was not given; give methods and --data, or neither, to make a report again", 2)
    if not args.methods:
        if args.out is None:
            raise UserError("neither methods nor --out were given; see --help", 2)
        if unused := given_of(args, parser, sorted(vars(args).keys() - _OF_A_REPORT)):
            raise UserError(f"{unused} is of making images, and no methods were given; give them, or leave it out", 2)
        return
    if args.part and (unused := given_of(args, parser, ("also", "judge"))):
        raise UserError(f"{unused} is of the report, which --part doesn't make; give it when all parts are made", 2)
    if args.pipeline is None:
        raise UserError("--pipeline was not given; give the folder of the base, such as assets/small_kontext", 2)
    sources = [parse_method(text) for text in args.methods]
    paths = [source.path for source in sources if source.path is not None]
    for path in paths:
        if not Path(path).exists() and not is_name(Path(path)):
            raise UserError(f"there is no {path}; give the folder of a run, such as runs/basis, or a file", 2)
    if not args.without_references:
        args.methods += [word for word in WORDS if word not in [source.text for source in sources]]
    args.data = parse_data(args.data)
    if args.out is None:
        first = Path(paths[0]) if paths else Path()
        # A Hub's cache is no place for results.
        args.out = Path() if is_name(first) and not first.exists() else first if first.is_dir() else first.parent
        args.out /= "evaluation"
    if not (args.out / "setup.json").is_file():
        require_writable([args.out / name for name in FILES], [Path(path) for path in paths])


def _endpoint(args: argparse.Namespace) -> Endpoint | None:
    """The judge's, with the key of its environment variable; None without one, and for one of the user's own."""
    if args.judge is None:
        if args.judge_model:
            raise UserError("--judge-model was given and --judge was not; give the endpoint's address", 2)
        return None
    if is_own(args.judge):
        return None
    if not args.judge_model:
        raise UserError("--judge-model was not given; give the name that the endpoint has for the model", 2)
    return Endpoint(
        args.judge,
        args.judge_model,
        os.environ.get(args.judge_key, ""),
        timeout=args.judge_timeout,
        tries=args.judge_tries,
        json_mode=not args.judge_without_json_mode,
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    from lorweb_jax.evaluation import lpips
    from lorweb_jax.evaluation.render import render
    from lorweb_jax.processes.host_memory import keep_freed_memory

    keep_freed_memory()
    if args.methods:
        if missing := lpips.missing():
            raise UserError(missing)
        make(args)
    if args.part:
        print(f"part {args.part[0]} of {args.part[1]} is made; when all are, make the report: --out {args.out} alone")
        return
    judge = args.endpoint
    if args.judge and is_own(args.judge):
        from lorweb_jax.evaluation.scores import judge_from_file

        judge = judge_from_file(args.judge)
    print(render(args.out, args.also, judge, args.judge_at_once))
    print(f"wrote results.json, results.md and report.html in {args.out}")


def make(args: argparse.Namespace) -> None:
    """All records that are missing."""
    from lorweb_jax.common import fingerprint
    from lorweb_jax.data.problems import Problems
    from lorweb_jax.evaluation import scores as scoring
    from lorweb_jax.evaluation.making import add_coefficients, add_edits, add_path, add_scores, conditions, make_images
    from lorweb_jax.evaluation.methods import candidate, truth
    from lorweb_jax.evaluation.records import Records
    from lorweb_jax.evaluation.render import add_descriptions
    from lorweb_jax.evaluation.samples import read_folder
    from lorweb_jax.pipeline.pipeline import Pipeline

    own = [score for spec in args.add_score for score in scoring.from_file(spec)]
    problems = Problems()
    samples = [
        sample
        for split, root in _folders(args, problems)
        for sample in read_folder(root, args.per_task, problems, args.max_size, split)
    ]
    if len(problems):
        print(problems.summary())
    pipeline = Pipeline.load(args.pipeline, args.image_encoder, **model_options(args))
    encoder, folder = pipeline.image_encoder, pipeline.folder.encoder_folder
    if args.clip:
        from lorweb_jax.models.image_encoder.encoder import existing_encoder, load_image_encoder

        folder = existing_encoder(args.clip)
        encoder = load_image_encoder(folder)
    source = fingerprint.of_folder(folder) if folder and encoder is not None else ""
    scores = scoring.select([*scoring.standard(encoder, source), *own], args.scores)
    sampling = {"steps": args.steps, "guidance": args.guidance, "round_to_bfloat16": args.round_to_bfloat16}
    precision = {"dtype": args.dtype, "quantization": args.quantization}
    common = conditions(pipeline, **sampling, **precision, seed=args.seed, max_size=args.max_size)
    skipped = [dataclasses.asdict(each) for each in problems]
    records = Records.begin(args.out, samples, common, skipped)
    number, parts = args.part or (1, 1)
    mine = samples[number - 1 :: parts]
    by_id = {sample.id: sample for sample in mine}
    truths = [truth()] if any(sample.b2 is not None for sample in samples) else []
    # One at a time: a method holds its weights.
    candidates = (
        candidate(pipeline, text, config=args.basis_config, samples=samples, **sampling) for text in args.methods
    )
    for method in itertools.chain(candidates, truths):
        kept = make_images(records, method, mine, seed=args.seed, batch=args.batch)
        add_scores(kept, by_id, scores)
        add_descriptions(args.out, scores)  # only now: a score that fails is no column
        if number == parts:
            add_coefficients(kept, method, samples, args.batch)
            add_path(kept, method, samples, args.seed)
            if method.route is not None:
                add_edits(records, samples)


def _folders(args: argparse.Namespace, problems: "Problems") -> list[tuple[str, Path]]:
    """(split, folder) of --data."""
    folders = []
    for split, root in args.data:
        prefix = f"{split}, " if split else ""
        if root == EMBEDDED:
            from lorweb_jax.data.embedded.build import embedded_dataset

            built = embedded_dataset(args.cache)
            folders += [(f"{prefix}seen tasks", built.heldout_drawings), (f"{prefix}unseen tasks", built.heldout_tasks)]
        elif root.startswith(f"{EMBEDDED}:"):
            from lorweb_jax.data.embedded.kinds import kind_folders

            folders += [(f"{prefix}{title}", folder) for title, folder in kind_folders(root, args.cache, problems)]
        else:
            folders.append((split or Path(root).name, Path(root)))
    return folders


if __name__ == "__main__":
    run_command(main)
