"""List training runs, and write one HTML page of them: state, steps, losses, best held-out score, pictures, command.

    python -m lorweb_jax.runs runs/                      all runs in and below runs/; the page is runs/runs.html
    python -m lorweb_jax.runs runs/basis --out basis.html

States: running (its process is alive; of another host that is assumed), finished, stopped (by a signal, or killed; the
same command goes on), failed (the page says by what), unreadable (config or files are damaged).
"""

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import run_command


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m lorweb_jax.runs", description=__doc__)
    parser.add_argument("folder", type=nonempty_path, help="where runs lie, or a run")
    parser.add_argument("--out", type=nonempty_path, help="page (default: runs.html in the folder)")
    args = parser.parse_args(argv)
    # After the arguments, so that --help answers at once.
    from tabulate import tabulate

    from lorweb_jax.common.outputs import write_text
    from lorweb_jax.runs import listing

    runs = listing.find_runs(args.folder)
    print(tabulate(listing.rows(runs), headers=listing.HEAD, tablefmt="plain", disable_numparse=True))
    for run in runs:
        if run.state in ("failed", "unreadable"):
            print(f"{run.name}: {run.remark}")
    path = args.out or args.folder / "runs.html"
    write_text(path, listing.page(runs))
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
