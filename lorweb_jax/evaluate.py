"""Compare a trained basis with copying b and with the base alone, on analogies whose answer is known.

    python -m lorweb_jax.evaluate runs/basis --pipeline assets/small_kontext --data FOLDER

FOLDER is a data set in any layout of docs/data.md, such as Relation252K's. From each task the same few analogies are
taken at every call. The table is printed and written, as table.md and table.json with the figures of every task, beside
sheet.png, which shows a, a′, b, each method's b′ and the true one, a row per task. Files of these names are replaced
with --overwrite only.
"""

import argparse
from pathlib import Path

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import UserError, run_command
from lorweb_jax.common.outputs import require_writable
from lorweb_jax.files.hub_cache import is_name
from lorweb_jax.pipeline.arguments import MAX_SIZE
from lorweb_jax.settings.rules import GUIDANCE, SAMPLING_STEPS, SEED, SHOWN_AT_ONCE, SHOWN_PER_TASK, as_value

FILES = ("table.md", "table.json", "sheet.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.evaluate", description=__doc__)
    parser.add_argument(
        "basis",
        type=nonempty_path,
        metavar="RUN_OR_BASIS",
        help="folder of a training run, or a published basis (file, folder or Hub name)",
    )
    parser.add_argument(
        "--pipeline", type=nonempty_path, required=True, help="folder or Hub name of the base model that it belongs to"
    )
    parser.add_argument("--data", type=nonempty_path, required=True, help="folder of the tasks to be shown")
    parser.add_argument(
        "--basis-config", type=nonempty_path, help="the basis's config.yaml (default: the one beside the file)"
    )
    parser.add_argument(
        "--image-encoder",
        type=nonempty_path,
        help="folder of the router's image encoder (default: clip_vision in the pipeline's folder)",
    )
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
    parser.add_argument(
        "--out", type=nonempty_path, help="folder to write (default: evaluation, in or beside RUN_OR_BASIS)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the table and sheet of an earlier evaluation")
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
    named = is_name(args.basis)
    if not args.basis.exists() and not named:
        raise UserError(f"there is no {args.basis}; give the folder of a run, such as runs/basis, or a file", 2)
    if args.out is None:
        # A Hub's cache is no place for results.
        args.out = Path() if named else args.basis if args.basis.is_dir() else args.basis.parent
        args.out /= "evaluation"
    require_writable([args.out / name for name in FILES], [args.basis], overwrite=args.overwrite)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    from lorweb_jax.data.layouts import read_tasks
    from lorweb_jax.data.problems import Problems
    from lorweb_jax.evaluation import lpips
    from lorweb_jax.evaluation.evaluate import read_samples
    from lorweb_jax.evaluation.methods import evaluate_pipeline
    from lorweb_jax.pipeline.pipeline import Pipeline
    from lorweb_jax.processes.host_memory import keep_freed_memory

    keep_freed_memory()
    if missing := lpips.missing():
        raise UserError(missing)
    problems = Problems()
    samples = read_samples(read_tasks(args.data, problems), args.per_task, problems, args.max_size)
    if len(problems):
        print(problems.summary())
    pipeline = Pipeline.load(args.pipeline, args.image_encoder).attach(args.basis, args.basis_config)
    table = evaluate_pipeline(
        pipeline, samples, args.out, steps=args.steps, guidance=args.guidance, seed=args.seed, batch=args.batch
    )
    print(table.text())
    print(f"wrote table.md, table.json and sheet.png in {args.out}")


if __name__ == "__main__":
    run_command(main)
