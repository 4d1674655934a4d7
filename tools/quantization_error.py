"""State what an 8-bit base costs: relative errors of layer outputs and of the velocity.

  tools/quantization_error.py
  tools/quantization_error.py --pipeline=FLUX.1-Kontext-dev

First layers of FLUX.1 Kontext's sizes with random weights and inputs, then every kind of layer of the pipeline on the
inputs that it gets while the analogy in docs/example is made (four noise levels), then the velocity. Each error is
‖y − y_full‖ / ‖y_full‖ (Euclidean norm), y_full being float32 with the full weights; the velocity's also against
bfloat16 with the full weights. "full" columns are not quantised. "inputs too" is what hardware does that multiplies
fp8 (NVIDIA Ada and Hopper, TPU v7); elsewhere fp8 is how weights are stored.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import run_command  # noqa: E402  (the path above comes first)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--pipeline",
        metavar="FOLDER",
        type=nonempty_path,
        default=ROOT / "assets" / "small_kontext",
        help="models in diffusers layout (default: the small ones here)",
    )
    args = parser.parse_args()
    # After the arguments, so that --help answers at once.
    from parity.quantization import random_layers, real_layers, table

    print(f"random layers, inputs x outputs\n{table(random_layers())}\n", flush=True)
    layers, velocities = real_layers(args.pipeline, ROOT / "docs" / "example")
    print(f"layers of {args.pipeline.name}\n{table(layers)}\n\n{table(velocities)}")


if __name__ == "__main__":
    run_command(main)
