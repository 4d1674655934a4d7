"""State what options of a config do to training: the same steps on the same batches and noise, once for each option.

  tools/compare_training.py optimizer.moments=bfloat16 optimizer.moments=int8 quantization=int8 quantization=fp8
  tools/compare_training.py --config=configs/basis.py:smoke --steps=20 optimizer.moments=int8
  tools/compare_training.py --multiply-fp8 quantization=fp8

The first row is the config as it is. Columns: mean loss of the last steps, mean loss on held-out splits after them (the
same analogies, noise and noise levels for all), bytes of the frozen weights and of the optimizer's state, and seconds
a step by the clock. Nothing is written.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lorweb_jax.common.command_line import Parser, positive  # noqa: E402  (the path above comes first)
from lorweb_jax.common.errors import run_command  # noqa: E402

HELD_OUT_BATCHES = 8
SHOWN = 50  # last steps whose loss is averaged


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "options", nargs="+", metavar="FIELD=VALUE", help="of the config, as --config.FIELD=VALUE of main"
    )
    parser.add_argument(
        "--config",
        default=f"{ROOT}/configs/basis.py",
        metavar="FILE[:VARIANT]",
        help="of a basis (default: configs/basis.py)",
    )
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="default: 300")
    parser.add_argument("--batch", type=positive, default=6, metavar="N", help="default: 6")
    parser.add_argument(
        "--multiply-fp8",
        action="store_true",
        help="make products of fp8 as hardware does that multiplies it, inputs and gradients rounded too",
    )
    return parser.parse_args()


class Outcome(NamedTuple):
    training: float
    held_out: dict[str, float]
    seconds: float
    kept: str


def trained(config, name: str) -> Outcome:
    """One run, from the first step."""
    import jax
    import numpy as np

    from lorweb_jax.data.analogies import Analogies
    from lorweb_jax.data.loader import AnalogyLoader
    from lorweb_jax.jobs import make_job
    from lorweb_jax.nn import sharding
    from lorweb_jax.nn.quantization import bytes_by_dtype
    from lorweb_jax.planning import remat
    from lorweb_jax.training.loop import next_batch
    from lorweb_jax.training.optimizer import make_optimizer
    from lorweb_jax.training.state import Partition, frozen_weights, initial_state, state_shapes
    from lorweb_jax.training.step import TrainStep

    if config.remat == "auto":
        config.remat = remat.choose(config, remat.this_machine())
    steps, batch_size = config.train.steps, config.train.batch
    mesh = sharding.make_mesh(config.mesh)
    job, optimizer = make_job(config), make_optimizer(config)
    partition = Partition.of(job, config.seed)
    shapes = state_shapes(job, partition, optimizer, config, mesh)
    frozen = frozen_weights(job, partition.frozen_shapes(mesh, config.train.param_dtype), config)
    partition, frozen = partition.unstacked(job, frozen)
    state = initial_state(job, partition, optimizer, config, shapes)
    losses, held_out, start = [], {}, None
    with jax.set_mesh(mesh):
        step = TrainStep(job, partition, optimizer, config, mesh, shapes)

        @jax.jit
        def loss(trainable, frozen, batch, number):
            return job.loss(partition.model(trainable, frozen), batch, jax.random.key(number))[0]

        data = job.data(config)
        for index in range(steps):
            batch = next_batch(job, data, batch_size, mesh)
            state, metrics = step(index, state, frozen, batch)
            losses.append(float(metrics["loss"]))
            start = start or time.perf_counter()  # the first step holds the compiler's time
            if (index + 1) % 20 == 0:
                print(f"{name}: step {index + 1} of {steps}, loss {np.mean(losses[-20:]):.4f}", file=sys.stderr)
        seconds = (time.perf_counter() - start) / max(1, steps - 1)
        data.close()
        for split in list(job.tasks)[1:]:
            batches = AnalogyLoader(
                Analogies(job.tasks[split]),
                batch_size,
                quadrant_size=config.data.quadrant_size,
                seed=config.seed,
                caption_drop=0.0,
                task_balanced=True,
                workers=0,
                reverse_probability=0.0,
                problems=job.problems,
            )
            drawn = [next_batch(job, batches, batch_size, mesh) for _ in range(HELD_OUT_BATCHES)]
            held_out[split] = np.mean(
                [
                    loss(state.trainable | state.constants, frozen, batch | step.encode(frozen, batch), number)
                    for number, batch in enumerate(drawn)
                ]
            )
    return Outcome(
        np.mean(losses[-SHOWN:]), held_out, seconds, f"{bytes_by_dtype(frozen)}; {bytes_by_dtype(state.optimizer)}"
    )


def main() -> None:
    args = parse()
    # After the arguments, so that --help answers at once.
    from tabulate import tabulate

    from lorweb_jax.main import read_config, set_field
    from lorweb_jax.nn import quantization
    from lorweb_jax.settings import config as configs

    if args.multiply_fp8:
        quantization.multiplies_fp8 = lambda: True
    planned = {}
    for option in [None, *args.options]:
        config = planned[option or "as it is"] = read_config(args.config)
        config.train.steps, config.train.batch = args.steps, args.batch
        if option:
            set_field(config, option)
        configs.check(config)
    rows = {name: trained(config, name) for name, config in planned.items()}
    splits = list(next(iter(rows.values())).held_out)
    table = tabulate(
        [
            [name, *(f"{loss:.5f}" for loss in (row.training, *row.held_out.values())), f"{row.seconds:.3f}", row.kept]
            for name, row in rows.items()
        ],
        headers=["", "training", *splits, "s a step", "frozen; optimizer"],
        tablefmt="plain",
        colalign=["left", *["right"] * (len(splits) + 2), "left"],
        disable_numparse=True,
    )
    print(f"{args.steps} steps of {args.batch}; training: mean loss of the last {min(SHOWN, args.steps)}\n{table}")


if __name__ == "__main__":
    run_command(main)
