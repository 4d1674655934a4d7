"""Look at a data set before training: what it holds, which files can't be used, and how long an epoch takes.

    python -m lorweb_jax.data.look DIR
    python -m lorweb_jax.data.look DIR --rate 3.5 --out look

DIR is a data set in any layout of docs/data.md: a folder, a table, a shard. Every image is decoded. A report is printed
and written as report.md: counts of tasks, pairs and analogies, sizes and aspects, captions (missing, longest, repeated)
and files that can't be used, with the reasons; problems.json has all of these. sheet.png shows pairs of some tasks.
Files of these names are replaced with --overwrite only.
"""

import argparse
from pathlib import Path

from lorweb_jax.common.command_line import Parser, nonempty_path, positive
from lorweb_jax.common.errors import run_command
from lorweb_jax.common.outputs import require_writable
from lorweb_jax.settings.rules import Real, as_value

FILES = ("report.md", "sheet.png", "problems.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.data.look", description=__doc__)
    parser.add_argument("data", type=nonempty_path, metavar="DIR", help="the data set")
    parser.add_argument(
        "--rate", type=float, help="examples that training does a second: the hours of an epoch are reported"
    )
    parser.add_argument(
        "--headers",
        action="store_true",
        help="read the headers of images only: faster, and damage behind them isn't seen",
    )
    parser.add_argument("--tasks", type=positive, default=24, help="tasks on the sheet (default: %(default)s)")
    parser.add_argument(
        "--out", type=nonempty_path, default=Path("look"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier look")
    args = parser.parse_args(arguments)
    if args.rate is not None:
        as_value(args.rate, "--rate", Real(0, 1e9, above=True))
    require_writable([args.out / name for name in FILES], [args.data], overwrite=args.overwrite)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    from lorweb_jax.common.outputs import write_text
    from lorweb_jax.data.layouts import read_tasks
    from lorweb_jax.data.problems import Problems
    from lorweb_jax.data.survey import contact_sheet, report, survey
    from lorweb_jax.images.io import write_image

    problems = Problems()
    result = survey(read_tasks(args.data, problems), problems, args.headers)
    sheet = contact_sheet(result, args.tasks, problems)
    text = report(result, problems, str(args.data), args.rate)
    print(text)
    write_text(args.out / FILES[0], text)
    if sheet is not None:
        write_image(args.out / FILES[1], sheet)
    problems.write(args.out / FILES[2])
    print(f"wrote {', '.join(FILES if sheet is not None else (FILES[0], FILES[2]))} in {args.out}")


if __name__ == "__main__":
    run_command(main)
