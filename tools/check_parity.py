"""Compare this project with recordings of the published PyTorch implementations, quantity by quantity.

For those who convert weights or change hardware: a wrong transposition, a missing tensor or a low-precision matrix
product shows here as a FAIL. Everything is computed in float32.

  tools/check_parity.py tests/golden
  tools/check_parity.py recordings --pipeline=some/pipeline_folder
  tools/check_parity.py tests/golden/pair

DIR may hold any of these, in the formats of tests/golden/README.md: configs.json with basis_*.safetensors and
case_*.npz; train_step.npz; scheduler.npz; grid.npz; external_query.npz; e2e_*.npz (each stage is computed from that
stage's recorded input). train_step and e2e recordings are read with basis a, or with the only basis there is.
A folder with a cases.json holds recordings of Pair Customization, in the formats of tests/golden/pair/README.md and
with the tolerances that are stated there: adapter files, qr.npz, augment.npz, schedule.npz, forward_*.npz, train_*.npz,
sample_*.npz, e2e_style.npz.

Each line gives a quantity's name, its largest absolute error, its relative error, the tolerance, and ok or FAIL. The
relative error is ||ours - theirs|| / ||theirs|| (Euclidean norm over the whole array). Tolerances: 1e-5 for outputs and
the coefficients of an internal query, which follow them; 1e-4 for gradients; 1e-6 for coefficients of an external query
and noise levels; grids, ids and crops are exact; a decoded 8-bit image may be one level off. "deviates on purpose" and
"not checked" lines are not counted. The exit status is 0 if something was compared and nothing failed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import run_command  # noqa: E402  (the path above comes first)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=nonempty_path, help="the folder of recordings")
    parser.add_argument(
        "--pipeline",
        metavar="FOLDER",
        type=nonempty_path,
        help="the models that the recordings were made with, in diffusers layout "
        "(default: DIR/tiny_pipeline if it is there; for Pair Customization also the one beside DIR)",
    )
    args = parser.parse_args()
    # After the arguments, so that --help answers at once.
    from parity.check import check_folder

    return check_folder(args.folder, args.pipeline)


if __name__ == "__main__":
    run_command(main)
