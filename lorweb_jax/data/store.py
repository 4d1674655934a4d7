"""Store a data set as ArrayRecord by tensorflow-datasets: few large files, read in any order.

    python -m lorweb_jax.data.store Relation252K --name relation252k --out local_data/tfds
    python -m lorweb_jax.main --config=configs/basis.py --config.data.root=tfds:relation252k:local_data/tfds

DATA is a data set in any layout of docs/data.md. Images are kept to the pixel, as PNG; pairs that can't be read are
reported and left out. Needs `pip install 'lorweb_jax[tfds]'`; TensorFlow is not needed.
"""

import argparse
from pathlib import Path

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import run_command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.data.store", description=__doc__)
    parser.add_argument("data", type=nonempty_path, metavar="DATA", help="the data set")
    parser.add_argument("--name", default="analogies", help="what it is to be called (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=nonempty_path,
        default=Path("local_data/tfds"),
        help="folder of stored data sets (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    from lorweb_jax.data.layouts import read_tasks
    from lorweb_jax.data.problems import Problems
    from lorweb_jax.data.stored import PREFIX, store

    problems = Problems()
    tasks = read_tasks(args.data, problems)
    folder, count = store(tasks, args.name, args.out, problems)
    if len(problems):
        print(problems.summary())
    print(f"wrote {count} pairs in {folder}; the data set's name is {PREFIX}{args.name}:{args.out}")


if __name__ == "__main__":
    run_command(main)
