"""Compute the frozen encoders' embeddings of a training run's captions and images once, so that it trains without them.

    python -m lorweb_jax.precompute --config=configs/basis.py --config.precomputed=local_data/precomputed
    python -m lorweb_jax.main --config=configs/basis.py --config.precomputed=local_data/precomputed

The first command fills the folder, the second trains from it. Options are those of training; --config.pipeline,
--config.basis.encoder and --config.data.… say which models and data. The same command resumes a run that was stopped,
even by kill -9; several processes or hosts that share the folder share the work. New captions
and images are added; a folder of other models or settings is refused.

--config=FILE[:VARIANT]     config file of a basis
--config.FIELD=VALUE        another value for a field of it, as often as wanted
"""

import sys

from lorweb_jax import main
from lorweb_jax.common.errors import UserError, run_command
from lorweb_jax.settings import config as configs


def command() -> None:
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(__doc__)
        return
    config, _ = main.read_command_line(sys.argv)
    if main.FLAGS.workdir is not None:
        raise UserError(
            "there is no run folder here; leave --workdir out, and say with --config.precomputed where the results go",
            2,
        )
    configs.check(config)
    from lorweb_jax.precomputed.fill import precompute  # jax is imported once the command line is known to be good

    precompute(config)


if __name__ == "__main__":
    run_command(command)
