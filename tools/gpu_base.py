"""Trains the small base's autoencoder, transformer and text encoders in minutes on one GPU, by the clock.

  python tools/gpu_base.py --prepare                        # here, with everything installed: captions' tokens, configs
  python tools/gpu_base.py --seconds 300 --out OUT          # there: jax, flax, optax, numpy and Pillow are enough
  python tools/gpu_base.py --seconds 300 --out OUT --autoencoder prepared   # its weights are those that --prepare took
  python tools/gpu_base.py --seconds 300 --out OUT --tiny   # a rehearsal on a CPU
  python tools/gpu_base.py --finish OUT                     # here again: runs/base_vae, runs/base_transformer

Model, losses and batches are those of lorweb_jax.small_base, which the documented jobs (configs/base_vae.py,
configs/base_transformer.py) use as well; sizes are read from their configs. Here batches are drawn on the device from
tables of all drawings after all operations, steps run by the dozen in one dispatch, and the learning rate falls to zero
when the time is over. OUT gets vae.safetensors, transformer.safetensors (by our paths) and base.json (curves, rates);
tools/build_base.py makes the pipeline folder of them.

The autoencoder begins with the weights of the folder that --prepare was given (--vae), where their shapes are the
config's; and these take the place of what came of its training where that is too slow or ends below 20 dB. On an H200,
16 processes: with XLA's autotuning off a step of 64 canvases took 2.8 s, since cuDNN's default algorithms for narrow
convolutions are absurd; so the autoencoder's steps are autotuned, before anything else runs on the card. Its encoder
runs as products, and the transformer has no convolutions: compiled in 44 s without. All drawings of a variant after
all operations took 40 s, beside the compilers. CLIP's vision tower (tools/gpu_clip.py) took 31.6 ms a step of 128
drawings. **On a GPU the autoencoder's training never ran to its end** (25 steps on that H200); --autoencoder prepared
did, on an H100. gpu_latents.py has pixels and latents, gpu_loop.py the loop, gpu_prepare.py what comes before and
after.
"""

import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
from gpu_latents import Pixels, encode_all, encoders  # noqa: E402
from gpu_loop import DRAWINGS, UNSEARCHED, Background, Log, Settings, TooSlow, run_until, save, trainer  # noqa: E402
from gpu_prepare import PREPARED, finish, prepare  # noqa: E402

from lorweb_jax.common.command_line import Parser, nonempty_path, positive  # noqa: E402
from lorweb_jax.common.errors import UserError, run_command  # noqa: E402

VAE = Path("assets/small_kontext/vae")
SECONDS_TO_END = 7  # for the last writing
VAE_SHARE = 0.33  # of the time, from the start: when the autoencoder has to be done
LEAST_STEPS = 500  # of the autoencoder: with fewer it is no better than what it begins with
LEAST_PSNR = 20.0  # dB on training canvases
SEARCHED = {"xla_gpu_autotune_level": 1}  # for convolutions, which need it


def prepared_weights(part: str, partition) -> dict[str, np.ndarray] | None:
    """The weights of `part` ("vae" or "editor") that --prepare was given, float32; or None where it was given none or
    they are not of the shapes of this one's."""
    if not (PREPARED / f"{part}.npz").is_file():
        return None
    with np.load(PREPARED / f"{part}.npz") as file:
        held = {name: file[name].astype(np.float32) for name in file}
    shapes = {name: variable.shape for name, (_, variable) in partition.trainable.items()}
    return held if {name: array.shape for name, array in held.items()} == shapes else None


def same_shapes(corpus, wanted):
    """A corpus of fewer variants in the shapes of one with more: what may be drawn stays the same."""

    def fit(array, like):
        if array.shape == like.shape:
            return array
        if array.ndim == 1:
            return np.resize(array, like.shape)
        if len(array) == len(like):  # members: only the first `counts` of a row are ever read
            return np.stack([np.resize(row, like.shape[1]) for row in array])
        return np.resize(array, like.shape)  # twins: rows beyond are never read

    return type(corpus)(*(fit(*pair) for pair in zip(corpus, wanted)))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--prepare", action="store_true", help="write what the other machine needs, into local_data/gpu"
    )
    parser.add_argument(
        "--vae",
        type=nonempty_path,
        default=VAE,
        help="with --prepare: a vae folder of the shape in "
        f"configs/base_vae.py, whose weights the autoencoder begins with (default: {VAE})",
    )
    parser.add_argument(
        "--initial",
        type=nonempty_path,
        help="with --prepare: a folder of transformer, text_encoder and text_encoder_2 to go on from",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="with --prepare: a value in a config, such as base_transformer.data.style=0.2; repeatable",
    )
    parser.add_argument(
        "--groups", type=positive, default=48, help="of examples in a step of the transformer (default: 48)"
    )
    parser.add_argument(
        "--autoencoder",
        choices=("train", "prepared"),
        default="train",
        help="whether it is trained, or taken as --prepare found it (default: train)",
    )
    parser.add_argument(
        "--finish", type=nonempty_path, metavar="OUT", help="write runs/base_vae and runs/base_transformer"
    )
    parser.add_argument(
        "--drawings", type=nonempty_path, default=DRAWINGS, help=f"the pack of drawings (default: {DRAWINGS})"
    )
    parser.add_argument("--seconds", type=positive, default=300, help="when all has to be done (default: 300)")
    parser.add_argument("--out", type=nonempty_path, default=Path("runs/gpu_base"), help="where results go")
    parser.add_argument("--processes", type=positive, default=13, help="that make pixels (default: 13)")
    parser.add_argument("--tiny", action="store_true", help="few drawings, small batches: a rehearsal on a CPU")
    args = parser.parse_args()
    if not args.prepare and (args.set or args.initial):
        parser.error("--set and --initial are for --prepare; add it, and train from what it leaves")
    if args.prepare:
        prepare(args.drawings, args.vae, args.initial, args.set)
    elif args.finish:
        finish(args.finish)
    else:
        train_logged(args)


def train_logged(args) -> None:
    """Train, with the time of each line and an error's traceback in the log of the folder for results."""
    for file in (args.drawings, PREPARED / "configs.json"):
        if not file.is_file():
            raise UserError(f"there is no {file}; make the drawings, then call gpu_base.py --prepare", 2)
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out, args.seconds)
    try:
        train(args, log)
    except BaseException:
        log.say("failed: " + traceback.format_exc())
        raise
    log.say("done")


def train(args, log: Log) -> None:
    from lorweb_jax.data.embedded.drawing_sets import SETS, load_sets
    from lorweb_jax.data.embedded.operations import OPERATIONS
    from lorweb_jax.small_base.captions import Captions
    from lorweb_jax.small_base.corpus import VARIANTS, make_corpus, some

    configs = Settings.of(json.loads((PREPARED / "configs.json").read_text()))
    vae, flow = configs.base_vae, configs.base_transformer
    held = np.load(PREPARED / "captions.npz")
    drawings = load_sets(args.drawings)
    # Sizes of this machine's batches, about ten times the configs' own; all else is theirs.
    # `encoded` and `enlarged` images are encoded at once, as they are and twice as large.
    size = SimpleNamespace(
        groups=args.groups, vae=64, table=1200, vae_steps=25, flow_steps=25, encoded=2048, enlarged=256
    )
    if args.tiny:
        size = SimpleNamespace(groups=1, vae=2, table=40, vae_steps=2, flow_steps=2, encoded=64, enlarged=8)
        drawings = some(drawings, 6)
        if args.autoencoder == "train":
            vae.model.update(block_out_channels=(8, 8, 8, 8))
        flow.transformer.update(num_layers=1, num_single_layers=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6))
    captions = Captions([drawings.captions(i) for i in range(len(drawings.names))])
    if not args.tiny and captions.texts != list(held["texts"]):
        raise SystemExit("the drawings are not those that --prepare saw; run it again")
    rows = {text: i for i, text in enumerate(held["texts"].tolist())}
    known = np.array([rows[text] for text in captions.texts])
    words = SimpleNamespace(clip=held["clip_ids"][known].astype(np.int32), t5=held["t5_ids"][known].astype(np.int32))

    variants = VARIANTS[: flow.data.variants]
    pixels = Pixels(drawings, ["", *OPERATIONS], variants, args.processes, log)
    corpora = {v: make_corpus(drawings, captions, v) for v in range(1, len(variants) + 1)}
    log.say(
        f"{len(drawings.names)} drawings ("
        + ", ".join(f"{(drawings.set_of == i).sum()} {name}" for i, name in enumerate(SETS))
        + f"), {drawings.held_out.sum()} held out, {len(OPERATIONS)} operations, {len(captions.texts)} captions"
    )

    import jax

    log.say(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    log.set(device=jax.devices()[0].device_kind, jax=jax.__version__, sizes=vars(size), configs=configs)
    on_gpu = jax.default_backend() == "gpu"
    stage = Stages(args, log, size, "bfloat16" if on_gpu else "float32")
    corpus = corpora[len(variants)]
    autoencoder, editor = stage.autoencoder(vae, corpus), stage.editor(flow, drawings, corpus, words, held["words"])
    encoder = encoders(vae, autoencoder, size, stage.dtype, log)
    training = args.autoencoder == "train"
    # One after the other: programs that compile at once get in each other's way. What is autotuned comes first, on a
    # card that does nothing else.
    programs = Background(lambda: [made.compile() for made in (*[autoencoder] * training, encoder, editor)])
    weights, scale = (
        stage.train_autoencoder(autoencoder, encoder, pixels, programs)
        if training
        else stage.prepared_autoencoder(autoencoder, configs.vae)
    )
    wait_for(encoder, programs)
    tables, count = encode_all(
        log,
        size,
        encoder.program,
        weights,
        scale,
        pixels,
        drawings,
        len(OPERATIONS) + 1,
        1 if training else len(variants),
    )
    stage.train_editor(editor, tables, same_shapes(corpora[count], corpus), words, programs)


class Stages:
    def __init__(self, args, log: Log, size, dtype: str):
        self.args, self.log, self.size, self.dtype = args, log, size, dtype
        self.vae_end, self.end = VAE_SHARE * log.seconds, log.seconds - SECONDS_TO_END

    def to_compile(self, what: str, made, options, *tables):
        """`made.compile()` sets made.program; made.begun makes the state to start from, meanwhile."""

        def compile_it():
            begin = self.log.now()
            lowered = made.lower(*tables)
            traced = self.log.now()
            made.program = lowered.compile(compiler_options=options)
            self.log.say(f"{what}: traced in {traced - begin:.1f} s, compiled in {self.log.now() - traced:.1f} s")

        made.program, made.compile, made.begun = None, compile_it, Background(made.fresh)
        return made

    def autoencoder(self, config, corpus):
        """The autoencoder's trainer."""
        import jax
        import jax.numpy as jnp

        from lorweb_jax.small_base.autoencoder import autoencoder_config, autoencoder_loss, enlarged, new_autoencoder
        from lorweb_jax.small_base.corpus import canvas_of, draw_canvases

        side, count = config.data.size, len(corpus.needs_shape)
        corpus = corpus._replace(edited=np.arange(self.size.table, dtype=np.int32))

        def loss(model, key, table):
            draw_key, noise_key = jax.random.split(key)
            picture, enlarge = draw_canvases(draw_key, corpus, self.size.vae, config.data.plain, config.data.enlarged)
            images = table[picture.drawing, picture.operation]
            canvas = jnp.where(enlarge[:, None, None, None], enlarged(images[:, 0]), canvas_of(images))
            return autoencoder_loss(model, canvas, noise_key, config.loss, self.dtype)

        vae_config = autoencoder_config(config)
        table = jax.ShapeDtypeStruct((self.size.table, count, side, side, 3), np.uint8)
        steps = trainer(lambda rngs: new_autoencoder(vae_config, rngs), config, loss)
        made = self.to_compile("autoencoder's steps", steps, SEARCHED, table)
        made.held = prepared_weights("vae", made.partition)
        return made

    def prepared_autoencoder(self, made, factors):
        """(weights on the host, (scale, shift)) of the autoencoder that --prepare was given; writes vae.safetensors."""
        if made.held is None:
            raise SystemExit("the autoencoder that --prepare was given is not of the shape in configs/base_vae.py")
        scale, shift = factors.scaling_factor, factors.shift_factor
        self.log.set(scaling_factor=scale, shift_factor=shift)
        save(self.args.out / "vae.safetensors", made.held, np.float32)
        return made.held, (scale, shift)

    def editor(self, config, drawings, corpus, words, vocabularies):
        """The trainer of transformer and text encoders."""
        import jax

        from lorweb_jax.small_base.corpus import draw_batch, look_up
        from lorweb_jax.small_base.editor import Editor, editor_config, flow_loss

        sizes = editor_config(config, *map(int, vocabularies))
        side, operations, total = config.data.size // 8, len(corpus.needs_shape), len(corpus.photograph)

        def loss(model, key, quadrants, large, corpus, clip_ids, t5_ids):
            draw_key, flow_key = jax.random.split(key)
            batch = draw_batch(draw_key, corpus, self.size.groups, config.forms, config.data)
            return flow_loss(model, look_up(batch, quadrants, large), clip_ids, t5_ids, flow_key, config)

        def shape(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype)

        tables = (
            jax.ShapeDtypeStruct((total, operations, side, side, 16), np.float16),
            jax.ShapeDtypeStruct((len(drawings.names), 2 * side, 2 * side, 16), np.float16),
            jax.tree.map(shape, corpus),
            shape(words.clip),
            shape(words.t5),
        )
        # Blocks are scanned: side by side they take minutes to compile for a GPU.
        steps = trainer(lambda rngs: Editor(sizes, 1, self.dtype, rngs=rngs), config, loss)
        made = self.to_compile("transformer's steps", steps, UNSEARCHED, *tables)
        made.held = prepared_weights("editor", made.partition)
        if made.held is None and (PREPARED / "editor.npz").is_file() and not self.args.tiny:
            raise SystemExit(
                "the transformer that --prepare was given is not of the shape in configs/base_transformer.py"
            )
        return made

    def train_autoencoder(self, made, encoders, pixels, programs):
        """(weights on the host, (scale, shift)); writes vae.safetensors."""
        import jax

        pixels.wait_for(max(60, self.size.table // 4))
        table = jax.device_put(pixels.table(self.size.table, 0))
        self.log.say("pixels for the autoencoder are there")
        wait_for(encoders, programs)  # compiled after the autoencoder's own
        waiting: list[Background] = []

        def every(state, progress):
            # Other drawings from time to time, gathered beside the training.
            shown = len(waiting)
            if progress > 0.22 * (shown + 1) and shown < 4 and (not waiting or not waiting[-1].is_alive()):
                waiting.append(Background(lambda: jax.device_put(pixels.table(self.size.table, shown + 1))))
            if waiting and waiting[-1].done and waiting[-1].made is not None:
                table, waiting[-1].made = waiting[-1].made, None
                return (table,)
            return None

        deadline = max(self.vae_end, self.log.now() + 0.12 * self.log.seconds)
        begun = made.begun.result()
        try:
            state = run_until(
                deadline,
                self.log,
                "vae",
                self.size.vae_steps,
                dataclasses.replace(begun, trainable=made.held or begun.trainable),
                (table,),
                made.program,
                every,
                least=LEAST_STEPS if made.held else 0,
            )
            weights = jax.device_get(state.trainable)
            reached = float(np.mean([entry["psnr"] for entry in self.log.record["vae"][-5:]]))
            if reached < LEAST_PSNR and made.held:
                raise TooSlow(f"the autoencoder reached {reached:.1f} dB")
        except (TooSlow, FloatingPointError) as error:
            self.log.say(f"{error}; on with the weights that --prepare was given")
            weights = made.held
        del table
        sample = pixels.table(min(256, self.size.table), 9).reshape(-1, *pixels.pieces[0][1].shape[2:])
        sample = sample[np.random.default_rng(0).permutation(len(sample))[: self.size.encoded]]
        latents = encoders.program[0](
            weights, np.float32(1), np.float32(0), np.resize(sample, (self.size.encoded, *sample.shape[1:]))
        )
        latents = np.asarray(latents).astype(np.float32)
        scale, shift = round(float(1 / latents.std()), 4), round(float(latents.mean()), 4)
        self.log.set(
            scaling_factor=scale, shift_factor=shift, deviation_of_channels=latents.std((0, 1, 2)).round(3).tolist()
        )
        save(self.args.out / "vae.safetensors", weights, np.float32)
        self.log.say(f"autoencoder written, scale {scale}, shift {shift}")
        return weights, (scale, shift)

    def train_editor(self, made, tables, corpus, words, programs):
        import jax

        wait_for(made, programs)
        tables = (*tables, jax.device_put(corpus), jax.device_put(words.clip), jax.device_put(words.t5))
        begun = made.begun.result()
        if made.held:
            begun = dataclasses.replace(begun, trainable=made.held, average=made.held)
            self.log.say("transformer and text encoders go on from the weights that --prepare was given")
        saved: list[float] = [0.0]
        writing: list[Background] = []

        def every(state, progress):
            # On the way, so that a run that is killed leaves something.
            if progress > saved[-1] + 0.3:
                saved.append(progress)
                writing.append(
                    Background(
                        save, self.args.out / "transformer.safetensors", jax.device_get(state.exported), np.float16
                    )
                )

        state = run_until(self.end, self.log, "transformer", self.size.flow_steps, begun, tables, made.program, every)
        for each in writing:
            each.join()
        save(self.args.out / "transformer.safetensors", jax.device_get(state.exported), np.float16)
        self.log.say("transformer and text encoders written")


def wait_for(made, programs: Background) -> None:
    """Until made.compile() is through, which `programs` calls."""
    while made.program is None:
        if programs.error:
            programs.result()
        time.sleep(0.1)


if __name__ == "__main__":
    run_command(main)
