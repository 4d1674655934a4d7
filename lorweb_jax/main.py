"""Train what a config file describes, and leave the result in a run folder.

    python -m lorweb_jax.main --config=configs/basis.py                 the default run
    python -m lorweb_jax.main --config=configs/basis.py:tanh            a variant (the file's docstring lists them)
    python -m lorweb_jax.main --config=configs/basis.py --workdir=runs/short --config.train.steps=100

    --config=FILE[:VARIANT]     config file
    --config.FIELD=VALUE        another value for a field of it, as often as wanted
    --workdir=FOLDER            run folder; runs/<config name> by default

The run folder receives command.txt (this command line), log.txt, TensorBoard events, pictures/, checkpoints/ and, at
the end, the exported result; `python -m lorweb_jax.runs runs/` makes a page of all runs. The
same command resumes a run that was stopped, also on another mesh, and also after its folder, data or models were moved,
if their contents are the same. Two runs at once in one folder are refused. A run may consist of several processes, on
one or many hosts: the scripts in launch/ start them, and lorweb_jax/processes/distributed.py says how they find each
other. Fields are explained in the config file itself or in lorweb_jax/settings/config.py; --config.profile=5-7 traces
steps 5 to 7 for TensorBoard and Perfetto, and compiled programs are kept in .compile_cache beside the run folder. What
XLA needs to be told for this machine's devices a run adds to XLA_FLAGS and XLA_CLIENT_MEM_FRACTION, and on TPUs tells
the step's compiler, where these and LIBTPU_INIT_ARGS say nothing of it (lorweb_jax/processes/compiler_flags.py); it
says so.
"""

import ast
import difflib
import runpy
import shlex
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from lorweb_jax.common.errors import UserError, run_command
from lorweb_jax.processes import distributed
from lorweb_jax.processes.compiler_flags import set_compiler_flags
from lorweb_jax.processes.coordination import stop_status
from lorweb_jax.settings import config as configs

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "config file, with :variant after it if wanted")
flags.DEFINE_string("workdir", None, "run folder; by default runs/<config name>")


def read_command_line(argv: list[str]):
    """(config, run folder) of a command line; UserError, with status 2, for an invalid one."""
    files = [
        word.partition("=")[2] or following
        for word, following in zip(argv, [*argv[1:], ""])
        if word.partition("=")[0] in ("--config", "-config")
    ]
    if not any(files):
        raise UserError("no config was given; start with --config=configs/basis.py, or see --help", code=2)
    if len(files) > 1:
        raise UserError(f"{len(files)} configs were given, {' and '.join(files)}; give one", code=2)
    [file] = files
    known = dict(configs.fields(read_config(file)))
    for word in argv[1:]:
        name = word.partition("=")[0].removeprefix("--")
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            raise unknown_field(name, known)
    try:
        rest = FLAGS(argv)[1:]
    except flags.Error as error:
        message = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{message}; see --help, and the config file for the kind of value that stands there", code=2
        ) from None
    if rest:
        raise UserError(f"{rest[0]!r} is no option; options are written --name=value, see --help", code=2)
    return FLAGS.config, Path(FLAGS.workdir or configs.default_workdir(file))


def read_config(file: str):
    """The config of `path.py` or `path.py:variant`, before any change."""
    name, *variant = file.split(":", 1)
    path = Path(name)
    if not path.is_file():
        there = ", ".join(sorted(str(near) for near in path.parent.glob("[!_]*.py")))
        hint = f"there are: {there}" if there else "take one of those in configs/ of the repository"
        raise UserError(f"there is no config file {path}; {hint}", code=2)
    try:
        get_config = runpy.run_path(name).get("get_config")
        config = get_config(*variant) if get_config else None
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        raise UserError(
            f"the config file {path} can't be run: {type(error).__name__}{f' in line {line}' if line else ''}"
            f", {str(error).strip().partition(chr(10))[0] or 'without a word'}; correct it",
            code=2,
        ) from None
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path} has no function get_config that gives a ConfigDict; name one of the files in configs/, "
            "or write one like them",
            code=2,
        )
    return config


def unknown_field(name: str, known: dict) -> UserError:
    """The error for an option of the form config.x.y that no field has, with the nearest names."""
    names = [f"config.{field}" for field in known]
    below = [field for field in names if field.startswith(name + ".")]
    last = [field for field in names if field.rpartition(".")[2] == name.rpartition(".")[2]]
    near = (below + last + difflib.get_close_matches(name, names, n=3, cutoff=0.5))[:5] or names
    return UserError(f"there is no field {name}; near it are: {', '.join(dict.fromkeys(near))}", code=2)


def set_field(config: ConfigDict, option: str) -> None:
    """Sets the field of "FIELD=VALUE"; UserError for a field that isn't there or a value of another kind."""
    name, _, value = option.partition("=")
    known = dict(configs.fields(config))
    if name not in known:
        raise unknown_field(f"config.{name}", known)
    try:
        config.update_from_flattened_dict({name: value if isinstance(known[name], str) else ast.literal_eval(value)})
    except (ValueError, SyntaxError, TypeError):
        raise UserError(f"{value!r} is no value for config.{name}, which is {known[name]!r}", 2) from None


def command() -> int:
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    config, workdir = read_command_line(sys.argv)
    configs.check(config)
    added = set_compiler_flags(training=True)
    with distributed.joined({"workdir": workdir, **dict(configs.fields(config))}):
        from lorweb_jax.jobs import make_job
        from lorweb_jax.planning.remat import settled
        from lorweb_jax.processes.host_memory import keep_freed_memory
        from lorweb_jax.training.loop import train  # jax is imported once the command line is known to be good

        keep_freed_memory()
        if added:
            print(f"told jax: {added}", flush=True)
        words = shlex.join(sys.argv[1:])
        finished = train(config, workdir, settled(make_job), f"python -m lorweb_jax.main {words}")
    return 0 if finished else stop_status()


if __name__ == "__main__":
    run_command(command)
