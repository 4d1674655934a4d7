"""Whether a training or sampling run fits on given hardware, which need not be present, and what a step of it costs.

    python -m lorweb_jax.plan --config=configs/basis.py:kontext --topology=v6e:4x4 --config.train.batch=16
    python -m lorweb_jax.plan --config=configs/basis.py:kontext --topology=gpu:h100x8 --config.train.batch=8
    python -m lorweb_jax.plan --config=configs/basis.py:kontext --topology=v6e:2x4 --what=sample
    python -m lorweb_jax.plan --config=configs/pair.py:kontext --topology=gpu:rtx4090 --config.quantization=int8

--config=FILE[:VARIANT]   config file of a basis or a pair; FLUX.1-Kontext-dev, clip-vit-large-patch14 and a pair's
                          images need not be there
--config.FIELD=VALUE      another value for a field of it, as often as wanted
--topology=NAME           a TPU generation and its chips along each axis, or gpu: with a kind and a number
--what=train              one step of training (default), or sample: all steps of one batch of config.evaluation
--confirm                 if it doesn't fit, compile again with the first change that should make it fit
--json=FILE               the same figures as json
--hlo=FILE                the compiled program's text
--profile=FILE            its fifty most expensive instructions, as the compiler estimates: milliseconds, runs, kind,
                          phase, file and line, operation
--overwrite               replace files of these names

TPU programs are compiled by libtpu (pip install libtpu==0.0.52), which needs no TPU; minutes on two CPU cores, and
about 4 GB of memory. Up to eight GPUs of one host are compiled for by jax's CUDA plugin where that is installed,
without a GPU: pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2, of jax's own version. Without
the plugin, and for more GPUs, bytes of arguments are exact and the rest is estimated.

For TPUs v4, v5e, v5p and v6e, and for H100, H200 and B200, the plan also says how long a step takes as the compiler
estimates: products, attention, other Pallas kernels, elementwise work, copies, and what collectives take beyond the
work that they hide behind, each forward, recomputed and backward; and what it takes for granted.

--config.remat=auto becomes what suits the devices planned for. With --config.offload=blocks weights are streamed from
the host's memory, at an assumed bandwidth (planning/chips.py).
"""

import json
import os
import sys
from pathlib import Path

from absl import flags

from lorweb_jax import main
from lorweb_jax.common.errors import UserError, run_command
from lorweb_jax.common.outputs import require_writable, write_text
from lorweb_jax.settings import config as configs

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", None, "devices to plan for")
flags.DEFINE_enum("what", "train", ["train", "sample"], "what is planned")
flags.DEFINE_bool("confirm", False, "compile the first change that should make it fit")
flags.DEFINE_string("json", None, "file for the figures as json")
flags.DEFINE_string("hlo", None, "file for the compiled program's text")
flags.DEFINE_string("profile", None, "file for the most expensive instructions")
flags.DEFINE_bool("overwrite", False, "replace files of these names")


def command() -> None:
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(__doc__)
        return
    config, _ = main.read_command_line(sys.argv)
    if FLAGS.workdir is not None:
        raise UserError("a plan has no run folder; leave --workdir out", 2)
    if not FLAGS.topology:
        raise UserError("no topology was given; add --topology=v6e:4x4, or see --help", 2)
    configs.check(config)
    require_writable([Path(name) for name in (FLAGS.json, FLAGS.hlo, FLAGS.profile) if name], overwrite=FLAGS.overwrite)
    os.environ["JAX_PLATFORMS"] = "cpu"  # whatever this machine has, nothing runs on it
    from lorweb_jax.planning import remat, report, suggest
    from lorweb_jax.planning.figures import make_plan, timed
    from lorweb_jax.planning.topology import target

    there = target(FLAGS.topology)
    if not there.compiles and (FLAGS.hlo or FLAGS.confirm or FLAGS.profile):
        raise UserError(f"nothing is compiled for {there.name}; leave --hlo, --profile and --confirm out", 2)
    if FLAGS.profile and not timed(there):
        raise UserError(
            f"how long instructions take on {there.name} is not known; leave --profile out, or plan for v4, v5e, v5p, "
            "v6e, gpu:h100, gpu:h200 or gpu:b200",
            2,
        )
    config.remat = (
        remat.choose(config, remat.planned(there)) if FLAGS.what == "train" or config.remat != "auto" else "none"
    )
    plan = make_plan(config, there, FLAGS.what)
    print(report.table(plan), flush=True)
    estimator = suggest.Estimator(config, plan)
    changes = (suggest.faster if plan.fits else suggest.suggestions)(estimator)
    print("\n".join(["", *suggest.lines(estimator, changes)]), flush=True)
    if FLAGS.confirm and changes and not plan.fits:
        config.update_from_flattened_dict(changes[0].values)
        print(f"\ncompiled with {changes[0].flags()}:\n")
        print(report.table(make_plan(config, there, FLAGS.what)))
    if FLAGS.json:
        write_text(FLAGS.json, json.dumps(report.to_json(plan), indent=1) + "\n")
    if FLAGS.profile:
        write_text(FLAGS.profile, report.instructions(plan))
    if FLAGS.hlo and plan.compiled:
        write_text(FLAGS.hlo, plan.compiled.text)


if __name__ == "__main__":
    run_command(command)
