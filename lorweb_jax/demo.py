"""Visual analogies in the browser: edit, mix, look inside a basis, styles.

  python -m lorweb_jax.demo                                  the small base and runs/basis, which is trained if missing
  python -m lorweb_jax.demo --pipeline FLUX.1-Kontext-dev --image-encoder clip-vit-large-patch14 \\
      --basis lorweb.safetensors --dtype bfloat16            real weights
  python -m lorweb_jax.demo --style runs/pair lora.safetensors:2:"in watercolor style"

The page is served to this machine alone, at http://127.0.0.1:7860 or the next free port; --host and --share are for
others to reach it, who then need no password. It needs Gradio: pip install "lorweb_jax[demo]". docs/studio.md says what
each view does.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from lorweb_jax.common.command_line import Parser, add_basis_config, add_image_encoder, nonempty_path, positive
from lorweb_jax.common.errors import UserError, run_command, say
from lorweb_jax.edit import FOLDED, SMALL_BASE, add_model_options, add_pipeline, model_options, require_basis_of_options
from lorweb_jax.pipeline.arguments import MAX_SIZE
from lorweb_jax.settings.rules import Whole, as_value
from lorweb_jax.stylize import style_argument

CONFIG, RUN = Path("configs/basis.py"), Path("runs/basis")  # in the repository's root
_PORT = Whole(1, 65_535)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lorweb_jax.demo", description=__doc__)
    add_pipeline(parser)
    parser.add_argument(
        "--basis",
        type=nonempty_path,
        help=f"a run's folder, a LoRWeB basis or a LoRA (file, folder or Hub name; default for the small base: {RUN}, "
        "which is trained first if it isn't there)",
    )
    add_basis_config(parser)
    add_image_encoder(parser)
    parser.add_argument(
        "--style",
        type=style_argument,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE[:STRENGTH[:WORDS]]",
        help="styles to choose from: runs of configs/pair.py, style files or any LoRA (default: none)",
    )
    parser.add_argument(
        "--data",
        type=nonempty_path,
        help="a data set (docs/data.md) whose tasks are shown beside an analogy (default: what the basis's run was "
        "trained on, where that is still there)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="or the next that is free (default: 7860)")
    parser.add_argument(
        "--share", action="store_true", help="also through a public address of Gradio's, for anybody who knows it"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument(
        "--max-size",
        type=int,
        help="longest edge of a grid, or of a picture, in pixels; larger ones are shrunk (default: what the "
        "autoencoder was trained at)",
    )
    parser.add_argument("--max-upload", type=positive, default=20, help="largest file that is taken, MB (default: 20)")
    parser.add_argument(
        "--max-pixels", type=positive, default=16, help="largest picture that is taken, megapixels (default: 16)"
    )
    parser.add_argument(
        "--apply",
        choices=list(FOLDED),
        default="low-rank",
        help="apply a mix beside the weights, or fold it into a second copy of them for each edit (default: low-rank)",
    )
    add_model_options(parser)
    return parser.parse_args(arguments)


def _check(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the page needs Gradio, which is not installed; run pip install "gradio>=6.17.3,<7"', 2)
    as_value(args.port, "--port", _PORT)
    if args.max_size is not None:
        as_value(args.max_size, "--max-size", MAX_SIZE)
    require_basis_of_options(args)


def default_basis(pipeline: Path) -> Path | None:
    """The default run's folder, for the small base; trains it first where it isn't there, or not to its end. None for
    other pipelines.

    Raises UserError where it has to be trained and this isn't the repository's root, and where the training ends early.
    """
    if not SMALL_BASE.is_dir() or not pipeline.exists() or not os.path.samefile(pipeline, SMALL_BASE):
        return None
    from lorweb_jax.runs.checkpoints import complete_steps
    from lorweb_jax.runs.folder import CONFIG as FILE
    from lorweb_jax.settings import config as configs

    done = max(complete_steps(RUN), default=0)
    if done and done >= (steps := configs.load(RUN / FILE).train.steps):
        return RUN
    if not CONFIG.is_file():
        raise UserError(
            f"there is no trained basis in {RUN} and no {CONFIG} to train one by; start this in the repository's root, "
            "or give --basis",
            2,
        )
    if done:
        say(f"the run in {RUN} has {done} of its {steps} steps; it goes on first (or give --basis {RUN})")
    else:
        say(f"there is no basis in {RUN} yet; the default run trains one first, about ten minutes on two CPU cores")
    # In a process of its own, so that all its memory is free again when the page opens.
    failed = _run([sys.executable, "-m", "lorweb_jax.main", f"--config={CONFIG}", f"--workdir={RUN}"])
    if failed or not complete_steps(RUN):
        raise UserError("the training ended early; the same command goes on from its last checkpoint")
    return RUN


def _words(args: argparse.Namespace) -> list[str]:
    """The options that say which pipeline, as the other commands take them."""
    words = [] if args.pipeline == SMALL_BASE else ["--pipeline", str(args.pipeline)]
    for name, value in model_options(args).items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, dict):
            words += [f"--{name}", ",".join(f"{axis}={size}" for axis, size in value.items())]
        elif value not in (False, None, "none", "auto", "float32"):
            words += [f"--{name}", value]
    return words


def _basis_words(args: argparse.Namespace, basis: Path | None) -> list[str]:
    values = {"basis": basis, "basis-config": args.basis_config, "image-encoder": args.image_encoder}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def open_studio(args: argparse.Namespace):
    """The model loaded, ready to be served."""
    basis = args.basis or default_basis(args.pipeline)
    from lorweb_jax.pipeline.pipeline import Pipeline
    from lorweb_jax.studio.studio import Limits, Studio

    pipeline = Pipeline.load(args.pipeline, args.image_encoder, **model_options(args))
    if basis is not None:
        pipeline = pipeline.attach(basis, args.basis_config)
    styles = {}
    for source in args.style:
        strength = {} if source.strength is None else {"strength": source.strength}
        styles[str(source.path)] = pipeline.style(source.path, words=source.words, **strength)
    size = args.max_size or pipeline.folder.vae_config.sample_size
    return Studio(
        pipeline,
        _words(args),
        _basis_words(args, basis),
        Limits(args.max_upload * 10**6, args.max_pixels * 10**6, size),
        FOLDED[args.apply],
        styles,
        args.data or data_of_run(basis),
    )


def _run(words: Sequence[str]) -> int:
    """The exit status of a command, which is stopped where this process is asked to stop."""
    with subprocess.Popen(words) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def data_of_run(basis: Path | None) -> Path | None:
    """The training data of a basis that is a run's folder; None where they aren't known or aren't there."""
    from lorweb_jax.data.embedded.build import embedded_dataset
    from lorweb_jax.pipeline.adapters import is_run
    from lorweb_jax.runs.folder import CONFIG as FILE
    from lorweb_jax.settings import config as configs

    if basis is None or not is_run(basis) or not (basis / FILE).is_file():
        return None
    config = configs.load(basis / FILE)
    if "data" not in config or "root" not in config.data:
        return None
    if config.data.root == "embedded":
        return embedded_dataset(config.data.cache, config.data.quadrant_size).train
    return root if (root := Path(config.data.root)).exists() else None


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(None if arguments is None else list(arguments))
    _check(args)
    studio = open_studio(args)
    from lorweb_jax.studio import page

    if args.host not in ("127.0.0.1", "localhost", "::1") or args.share:
        say("others can reach this page, and use the model, without a password")
    try:
        address = page.serve(
            page.build(studio), studio, host=args.host, port=args.port, share=args.share, browser=args.open
        )
        say(f"the page is at {address}; Ctrl-C ends it")
        threading.Event().wait()
    except KeyboardInterrupt:
        say("the page is closed")
    finally:
        studio.close()


if __name__ == "__main__":
    run_command(main)
