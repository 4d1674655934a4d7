"""Trains the small base's autoencoder, transformer and text encoders in minutes on one GPU, by the clock.

  python tools/gpu_base.py --prepare                        # here, with everything installed: captions' tokens, configs
  python tools/gpu_base.py --seconds 380 --out OUT          # there: jax, flax, optax, numpy and Pillow are enough
  python tools/gpu_base.py --seconds 300 --out OUT --tiny   # a rehearsal on a CPU

Model, losses and batches are those of lorweb_jax.training.small_base, which the documented jobs (configs/base_vae.py,
configs/base_transformer.py) use as well; sizes are read from their configs. Here batches are drawn on the device from
tables of all drawings after all operations, steps run by the dozen in one dispatch, and the learning rate falls to zero
when the time is over. OUT gets vae.safetensors and transformer.safetensors (by our paths), base.json (curves, rates) and
sheets; tools/build_base.py makes the pipeline folder of them.
"""

import argparse
import json
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

PREPARED = Path("local_data/gpu")
DRAWINGS = Path("local_data/drawings64.npz")
SECONDS_TO_END = 22          # for the sheets and the last writing
VAE_SHARE = 0.39             # of the time, from the start: when the autoencoder has to be done
ENCODED = 2048               # quadrants that are encoded at once


class Settings(dict):
    """A config without ml_collections: fields as attributes and as items."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @classmethod
    def of(cls, value):
        return cls({k: cls.of(v) for k, v in value.items()}) if isinstance(value, dict) else value


def prepare(drawings_path: Path) -> None:
    """Writes what a machine without tokenizers and ml_collections needs; and the tokenizers, into runs/base_transformer."""
    import runpy

    from lorweb_jax.data.drawing_sets import load_sets
    from lorweb_jax.training.small_base.captions import Captions
    from lorweb_jax.training.small_base.tokens import make_tokenizers, tokens_of

    configs = {name: runpy.run_path(f"configs/{name}.py")["get_config"]().to_dict()
               for name in ("base_vae", "base_transformer")}
    length = configs["base_transformer"]["data"]["text_tokens"]
    drawings = load_sets(drawings_path)
    captions = Captions([drawings.captions(i) for i in range(len(drawings.names))])
    folder = Path("runs/base_transformer")
    clip_words, t5_words = make_tokenizers(captions.texts, folder, length)
    clip_ids, t5_ids = tokens_of(captions.texts, folder, length)
    PREPARED.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PREPARED / "captions.npz", texts=np.array(captions.texts), clip_ids=clip_ids.astype(np.int16),
                        t5_ids=t5_ids.astype(np.int16), words=np.array([clip_words, t5_words]))
    (PREPARED / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")
    cut = (clip_ids[:, -1] == clip_words - 1).sum() - (clip_ids[:, -2] == clip_words - 1).sum()
    print(f"{len(captions.texts)} captions, {clip_words} and {t5_words} words, {cut} captions of {length} tokens or cut")


class Log:
    """What happens when, on the screen and in OUT/base.json."""

    def __init__(self, out: Path, seconds: float):
        self.out, self.seconds, self.start = out, seconds, time.monotonic()
        self.record: dict = {"seconds": seconds, "events": [], "vae": [], "transformer": []}
        self.lock = threading.Lock()
        self.written = 0.0

    def now(self) -> float:
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        with self.lock:
            print(f"[{self.now():6.1f}] {text}", flush=True)
            self.record["events"].append([round(self.now(), 1), text])
        self.write()

    def add(self, curve: str, **values) -> None:
        with self.lock:
            self.record[curve].append({"s": round(self.now(), 2)} | {k: float(f"{v:.5g}") for k, v in values.items()})
        if self.now() - self.written > 5:
            self.write()

    def set(self, **values) -> None:
        with self.lock:
            self.record |= values
        self.write()

    def write(self) -> None:
        with self.lock:
            self.written = self.now()
            partial = self.out / "base.json.partial"
            partial.write_text(json.dumps(self.record))
            partial.replace(self.out / "base.json")


class Background(threading.Thread):
    """A function in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, function, *arguments):
        super().__init__(daemon=True)
        self.function, self.arguments, self.made, self.error = function, arguments, None, None
        self.start()

    def run(self):
        try:
            self.made = self.function(*self.arguments)
        except BaseException as error:  # handed on by `result`
            self.error = error

    @property
    def done(self) -> bool:
        return not self.is_alive() and self.error is None

    def result(self):
        self.join()
        if self.error:
            raise self.error
        return self.made


class Pixels:
    """All drawings after all operations, made by worker processes: originals first, each part in random order."""

    def __init__(self, drawings, operations: list[str], variants, processes: int, log: Log):
        self.total, self.log, self.names = len(drawings.names), log, operations
        self.held_out = np.tile(drawings.held_out, len(variants))
        self.pieces: list[tuple[np.ndarray, np.ndarray]] = []     # (drawings or variants, uint8 [n, 1 + o, h, w, 3])
        self.made = [0] * len(variants)
        self.thread = Background(self._make, drawings.images, variants, processes)

    def _make(self, images, variants, processes):
        from lorweb_jax.data.bulk import operated

        for v, variant in enumerate(variants):
            order = np.random.default_rng(v).permutation(self.total)
            for start, stop, made in operated(np.ascontiguousarray(variant(images)[order]), self.names, processes):
                self.pieces.append((order[start:stop] + v * self.total, made))
                self.made[v] += stop - start
            self.log.say(f"variant {v}: all {self.total} drawings after {len(self.names)} operations")

    def variants_ready(self) -> int:
        return sum(made == self.total for made in self.made)

    def table(self, size: int, seed: int) -> np.ndarray:
        """uint8 [size, 1 + o, h, w, 3] of training drawings made so far, chosen at random."""
        pieces = list(self.pieces)
        where = [(p, row) for p, (index, _) in enumerate(pieces) for row in np.flatnonzero(~self.held_out[index])]
        chosen = np.random.default_rng(seed).permutation(len(where))
        table = np.empty((size, *pieces[0][1].shape[1:]), np.uint8)
        for to, i in enumerate(np.resize(chosen, size)):
            p, row = where[i]
            table[to] = pieces[p][1][row]
        return table

    def wait_for(self, drawings: int) -> None:
        while sum(self.made) < min(drawings, self.total):
            if self.thread.error:
                self.thread.result()
            time.sleep(0.2)


def trainer(job, config, steps: int, loss):
    """(fresh, lower): `fresh()` makes weights and optimizer state; `lower(*tables)` lowers
    (state, first progress, progress a step, *tables) -> (state, {metric: mean}), `steps` updates in one dispatch.

    loss: (model, key, *tables) -> (loss, metrics). Progress, 0 to 1, is what the learning rate follows.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from lorweb_jax.training.optimizer import averaged, make_optimizer
    from lorweb_jax.training.state import Layout
    from lorweb_jax.weights.state import flat_state

    layout = Layout.of(job, config.seed)

    def fresh():
        weights = flat_state(job.build(nnx.Rngs(config.seed)))
        return weights, make_optimizer(config, lambda count: 0.0).init(weights), jnp.zeros([], jnp.uint32)

    def chunk(state, first, a_step, *tables):
        def step(state, i):
            weights, opt_state, count = state
            progress = first + a_step * i
            rate = config.optimizer.learning_rate * jnp.minimum(progress / 0.02 + 1e-3, 1.0) * 0.5 * (
                1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
            optimizer = make_optimizer(config, lambda _: rate)
            key = jax.random.fold_in(jax.random.key(config.seed), count)
            (value, metrics), gradient = jax.value_and_grad(
                lambda weights: loss(layout.model(weights, {}), key, *tables), has_aux=True)(weights)
            updates, opt_state = optimizer.update(gradient, opt_state, weights)
            metrics = {"loss": value, **metrics, "gradient_norm": optax.tree.norm(gradient)}
            return (optax.apply_updates(weights, updates), opt_state, count + 1), metrics

        state, metrics = jax.lax.scan(step, state, jnp.arange(steps, dtype=jnp.float32))
        return state, jax.tree.map(lambda x: x.mean(), metrics)

    number = jax.ShapeDtypeStruct((), np.float32)

    def lower(*tables):
        return jax.jit(chunk, donate_argnums=0).lower(jax.eval_shape(fresh), number, number, *tables)

    return SimpleNamespace(fresh=jax.jit(fresh), lower=lower, layout=layout, averaged=averaged)


def run_until(deadline: float, log: Log, curve: str, steps: int, state, tables, program, every=None):
    """Dispatches of `program()` until the clock stands at `deadline`; the learning rate reaches zero there.

    every: called as every(state, progress) between dispatches; it may return other tables.
    """
    import jax

    begin, took, done, first = log.now(), [], 0, True
    while True:
        now = log.now()
        a_chunk = float(np.median(took[-5:])) if took else 0.0
        if now + a_chunk > deadline and done:
            break
        span = deadline - begin
        progress, a_step = (now - begin) / span, a_chunk / steps / span
        state, metrics = program()(state, np.float32(progress), np.float32(a_step), *tables)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not first:                           # the first dispatch loads the program
            took.append(log.now() - now)
        first, done = False, done + steps
        log.add(curve, step=done, progress=progress, **metrics)
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"{curve}: the loss is {metrics['loss']} after {done} steps")
        if every and (other := every(state, progress)) is not None:
            tables = other
    log.say(f"{curve}: {done} steps, {1000 * float(np.median(took or [0])) / steps:.1f} ms a step")
    return state


def save(path: Path, weights, dtype) -> None:
    from lorweb_jax.weights.safetensors_io import write

    write(path, {name: np.asarray(array).astype(dtype) for name, array in weights.items()})


def same_shapes(corpus, wanted):
    """A corpus of fewer variants in the shapes of one with more: what may be drawn stays the same."""
    def fit(array, like):
        if array.shape == like.shape:
            return array
        if array.ndim == 1:
            return np.resize(array, like.shape)
        if len(array) == len(like):             # members: only the first `counts` of a row are ever read
            return np.stack([np.resize(row, like.shape[1]) for row in array])
        return np.resize(array, like.shape)     # twins: rows beyond are never read
    return type(corpus)(*(fit(*pair) for pair in zip(corpus, wanted)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="write what the other machine needs, into local_data/gpu")
    parser.add_argument("--drawings", type=Path, default=DRAWINGS, help=f"the pack of drawings (default: {DRAWINGS})")
    parser.add_argument("--seconds", type=float, default=380.0, help="when all has to be done (default: 380)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_base"), help="where results go")
    parser.add_argument("--processes", type=int, default=13, help="that make pixels (default: 13)")
    parser.add_argument("--tiny", action="store_true", help="few drawings, small batches: a rehearsal on a CPU")
    args = parser.parse_args()
    if args.prepare:
        prepare(args.drawings)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out, args.seconds)
    try:
        train(args, log)
    except BaseException:
        log.say("failed: " + traceback.format_exc())
        raise
    log.say("done")


def train(args, log: Log) -> None:
    from lorweb_jax.data.drawing_sets import SETS, load_sets
    from lorweb_jax.data.operations import OPERATIONS
    from lorweb_jax.training.small_base.captions import Captions
    from lorweb_jax.training.small_base.corpus import VARIANTS, make_corpus

    configs = Settings.of(json.loads((PREPARED / "configs.json").read_text()))
    vae, flow = configs.base_vae, configs.base_transformer
    held = np.load(PREPARED / "captions.npz")
    drawings = load_sets(args.drawings)
    # Sizes of this machine's batches; the optimizers, losses and shares are the configs'.
    size = SimpleNamespace(groups=128, vae=64, table=2000, vae_steps=25, flow_steps=25)
    if args.tiny:
        size = SimpleNamespace(groups=1, vae=2, table=40, vae_steps=2, flow_steps=2)
        drawings = fewer(drawings, 6)
        vae.model.update(block_out_channels=(8, 8, 8, 8))
        flow.transformer.update(num_layers=1, num_single_layers=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6))
    captions = Captions([drawings.captions(i) for i in range(len(drawings.names))])
    if not args.tiny and captions.texts != list(held["texts"]):
        raise SystemExit("the drawings are not those that --prepare saw; run it again")
    rows = {text: i for i, text in enumerate(held["texts"].tolist())}
    known = np.array([rows[text] for text in captions.texts])
    words = SimpleNamespace(clip=held["clip_ids"][known].astype(np.int32), t5=held["t5_ids"][known].astype(np.int32))

    variants = VARIANTS[:flow.data.variants]
    pixels = Pixels(drawings, ["", *OPERATIONS], variants, args.processes, log)
    corpora = {v: make_corpus(drawings, captions, v) for v in range(1, len(variants) + 1)}
    log.say(f"{len(drawings.names)} drawings ("
            + ", ".join(f"{(drawings.set_of == i).sum()} {name}" for i, name in enumerate(SETS))
            + f"), {drawings.held_out.sum()} held out, {len(OPERATIONS)} operations, {len(captions.texts)} captions")

    import jax

    log.say(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    log.set(device=jax.devices()[0].device_kind, jax=jax.__version__, sizes=vars(size))
    on_gpu = jax.default_backend() == "gpu"
    stage = Stages(args, log, size, "bfloat16" if on_gpu else "float32")
    autoencoder = stage.autoencoder(vae, pixels, corpora[len(variants)])
    programs = stage.transformer_programs(flow, drawings, corpora[len(variants)], words, held["words"])
    weights, scale = stage.train_autoencoder(vae, autoencoder, pixels)
    tables, count = stage.encode_all(weights, vae, scale, pixels, drawings, len(OPERATIONS) + 1)
    corpus = same_shapes(corpora[count], corpora[len(variants)])
    stage.train_transformer(flow, programs, tables, corpus, words)
    try:
        stage.sheet(flow, vae, weights, scale, tables, drawings, captions, words, count)
    except Exception:
        log.say("no sheet: " + traceback.format_exc())


def fewer(drawings, per_set: int):
    """The first code points that every style has, and some photographs; some of both held out."""
    from lorweb_jax.data.drawing_sets import SETS

    rest = [i for i, name in enumerate(SETS) if name != "photograph"]
    whole = [i for i in np.flatnonzero((drawings.twins[:, rest] >= 0).all(1)) if drawings.set_of[i] == 0]
    kept = [i for part in (True, False) for i in [i for i in whole if drawings.held_out[i] == part][:per_set]]
    index = [*drawings.twins[kept][:, rest].reshape(-1), *np.flatnonzero(drawings.set_of == SETS.index("photograph"))[:10]]
    return drawings.chosen(np.array(index))


class Stages:
    def __init__(self, args, log: Log, size, dtype: str):
        self.args, self.log, self.size, self.dtype = args, log, size, dtype
        self.vae_end, self.end = VAE_SHARE * log.seconds, log.seconds - SECONDS_TO_END

    def compiled(self, what: str, lower) -> Background:
        def make():
            begin = time.monotonic()
            lowered = lower()
            traced = time.monotonic()
            program = lowered.compile()
            self.log.say(f"{what}: traced in {traced - begin:.1f} s, compiled in {time.monotonic() - traced:.1f} s")
            return program
        return Background(make)

    def autoencoder(self, config, pixels, corpus):
        """The autoencoder's trainer, with its program under way."""
        import jax
        import jax.numpy as jnp

        from lorweb_jax.layers import Weight
        from lorweb_jax.training.small_base.autoencoder import (autoencoder_config, autoencoder_loss, enlarged,
                                                                new_autoencoder)
        from lorweb_jax.training.small_base.corpus import canvas_of, draw_canvases

        side, count = config.data.size, len(corpus.needs_shape)
        corpus = corpus._replace(edited=np.arange(self.size.table, dtype=np.int32))

        def loss(model, key, table):
            draw_key, noise_key = jax.random.split(key)
            picture, enlarge = draw_canvases(draw_key, corpus, self.size.vae, config.data.plain, config.data.enlarged)
            images = table[picture.drawing, picture.operation]
            canvas = jnp.where(enlarge[:, None, None, None], enlarged(images[:, 0]), canvas_of(images))
            return autoencoder_loss(model, canvas, noise_key, config.loss, self.dtype)

        vae_config = autoencoder_config(config)
        job = SimpleNamespace(trainable=Weight, build=lambda rngs: new_autoencoder(vae_config, rngs))
        made = trainer(job, config, self.size.vae_steps, loss)
        table = jax.ShapeDtypeStruct((self.size.table, count, side, side, 3), np.uint8)
        made.program = self.compiled("autoencoder's step", lambda: made.lower(table))
        return made

    def transformer_programs(self, config, drawings, corpus, words, vocabularies):
        """The transformer's trainer, with two programs under way: one that is soon compiled, and one that is faster."""
        import jax

        from lorweb_jax.layers import Weight
        from lorweb_jax.training.small_base.corpus import draw_batch, look_up
        from lorweb_jax.training.small_base.editor import Editor, editor_config, flow_loss

        sizes = editor_config(config, *map(int, vocabularies))
        side, operations, total = config.data.size // 8, len(corpus.needs_shape), len(corpus.photograph)

        def loss(model, key, quadrants, large, corpus, clip_ids, t5_ids):
            draw_key, flow_key = jax.random.split(key)
            batch = draw_batch(draw_key, corpus, self.size.groups, config.forms, config.data)
            return flow_loss(model, look_up(batch, quadrants, large), clip_ids, t5_ids, flow_key, config)

        def shape(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype)

        tables = (jax.ShapeDtypeStruct((total, operations, side, side, 16), np.float16),
                  jax.ShapeDtypeStruct((len(drawings.names), 2 * side, 2 * side, 16), np.float16),
                  jax.tree.map(shape, corpus), shape(words.clip), shape(words.t5))
        made = []
        for name, unroll in (("soon", 1), ("faster", config.unroll)):
            job = SimpleNamespace(trainable=Weight, build=lambda rngs, unroll=unroll: Editor(
                sizes, unroll, self.dtype, rngs=rngs))
            with_steps = trainer(job, config, self.size.flow_steps, loss)
            with_steps.program = self.compiled(f"transformer's step ({name})",
                                               lambda with_steps=with_steps: with_steps.lower(*tables))
            made.append(with_steps)
        return made

    def train_autoencoder(self, config, made, pixels):
        """(weights on the host, (scale, shift)); writes vae.safetensors and vae.png."""
        import jax
        import jax.numpy as jnp

        from lorweb_jax.images.levels import to_float

        pixels.wait_for(max(60, self.size.table // 4))
        table = jax.device_put(pixels.table(self.size.table, 0))
        state = made.fresh()
        program = made.program.result()
        self.log.say("the autoencoder begins")
        waiting: list[Background] = []

        def every(state, progress):
            # Other drawings from time to time, gathered beside the training.
            shown = len(waiting)
            if progress > 0.22 * (shown + 1) and shown < 4 and (not waiting or not waiting[-1].is_alive()):
                waiting.append(Background(lambda: jax.device_put(pixels.table(self.size.table, shown + 1))))
            if waiting and waiting[-1].done and waiting[-1].made is not None:
                table, waiting[-1].made = waiting[-1].made, None
                return (table,)

        state = run_until(self.vae_end, self.log, "vae", self.size.vae_steps, state, (table,), lambda: program, every)
        del table
        weights = jax.device_get(state[0])
        model = made.layout.model(weights, {})
        sample = pixels.table(min(256, self.size.table), 9).reshape(-1, *pixels.pieces[0][1].shape[2:])
        sample = sample[np.random.default_rng(0).permutation(len(sample))[:ENCODED]]
        encode = jax.jit(lambda weights, x: made.layout.model(weights, {}).encode(to_float(x))[0])
        latents = np.asarray(encode(weights, np.resize(sample, (ENCODED, *sample.shape[1:]))))
        scale, shift = round(float(1 / latents.std()), 4), round(float(latents.mean()), 4)
        self.log.set(scaling_factor=scale, shift_factor=shift,
                     deviation_of_channels=latents.std((0, 1, 2)).round(3).tolist())
        save(self.args.out / "vae.safetensors", weights, np.float32)
        self.log.say(f"autoencoder written, scale {scale}, shift {shift}")
        del model, jnp
        return weights, (scale, shift)

    def encode_all(self, weights, config, scale, pixels, drawings, operations):
        """((quadrants, large), variants that are in it): latents of everything, float16 on the device."""
        import functools

        import jax
        import jax.numpy as jnp
        from flax import nnx

        from lorweb_jax.images.levels import to_float
        from lorweb_jax.latents.vae import AutoencoderKL
        from lorweb_jax.training.small_base.autoencoder import autoencoder_config, enlarged
        from lorweb_jax.weights.state import build

        pixels.wait_for(len(drawings.names))
        ready = pixels.variants_ready()
        total, side = len(drawings.names), config.data.size // 8
        vae = build(lambda: AutoencoderKL(autoencoder_config(config), rngs=nnx.Rngs(0)), weights)
        graphdef, variables = nnx.split(vae)
        factor, shift = scale

        def latents(variables, x):
            z = nnx.merge(graphdef, variables).encode(to_float(x).astype(self.dtype))[0].astype(jnp.float32)
            return ((z - shift) * factor).astype(jnp.float16)

        @functools.partial(jax.jit, donate_argnums=1)
        def put(variables, table, at, x):
            return jax.lax.dynamic_update_slice(table, latents(variables, x), (at, 0, 0, 0))

        encode_large = jax.jit(lambda variables, x: latents(variables, enlarged(x)))
        # In the order of the pieces first, then in the drawings' order: one gather at the end.
        kept = [(index, images) for index, images in list(pixels.pieces) if index[0] < ready * total]
        count = len(variables_of(kept, ENCODED, operations))
        table = jnp.zeros((count * ENCODED, side, side, 16), jnp.float16)
        for at, block in variables_of(kept, ENCODED, operations):
            table = put(variables, table, np.int32(at), blocks(kept, block, ENCODED, operations))
        order = np.concatenate([index for index, _ in kept])
        place = np.zeros(len(pixels.held_out), np.int64)
        place[order] = np.arange(len(order))
        rows = (place[:, None] * operations + np.arange(operations)).astype(np.int32)
        quadrants = jax.jit(lambda table, rows: table[rows])(table, rows)
        del table
        plain = np.empty((total, *kept[0][1].shape[2:]), np.uint8)
        for index, images in kept:
            original = index < total
            plain[index[original]] = images[original, 0]
        step = 256
        large = jnp.concatenate([encode_large(variables, np.resize(plain[i:i + step], (step, *plain.shape[1:])))
                                 for i in range(0, total, step)])[:total]
        jax.block_until_ready((quadrants, large))
        self.log.say(f"latents of {ready} variants on the device: {quadrants.nbytes / 1e9:.2f} GB, "
                     f"deviation {float(quadrants[:64].astype(jnp.float32).std()):.3f}")
        return (quadrants, large), ready

    def train_transformer(self, config, programs, tables, corpus, words):
        import jax

        soon, faster = programs
        state = soon.fresh()
        tables = (*tables, jax.device_put(corpus), jax.device_put(words.clip), jax.device_put(words.t5))
        while not faster.program.done and soon.program.is_alive() and faster.program.is_alive():
            time.sleep(0.2)
        saved = [0.0]
        writing: list[Background] = []

        def program():
            if faster.program.done:
                return faster.program.made
            return soon.program.result()

        def every(state, progress):
            # Twice on the way, so that a run that is killed leaves something.
            if progress > saved[0] + 0.4:
                saved[0] = progress
                average = jax.device_get(soon.averaged(state[1]))
                writing.append(Background(save, self.args.out / "transformer.safetensors", average, np.float16))

        state = run_until(self.end, self.log, "transformer", self.size.flow_steps, state, tables, program, every)
        for each in writing:
            each.join()
        self.average = jax.device_get(soon.averaged(state[1]))
        save(self.args.out / "transformer.safetensors", self.average, np.float16)
        self.log.say("transformer and text encoders written")
        self.layout = soon.layout

    def sheet(self, config, vae_config, vae_weights, scale, tables, drawings, captions, words, variants):
        """base.png: held-out drawings edited, and text to image, if there is time."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from lorweb_jax.images.io import write_image
        from lorweb_jax.images.levels import to_uint8
        from lorweb_jax.latents.vae import AutoencoderKL
        from lorweb_jax.training.pictures import sheet
        from lorweb_jax.training.small_base.autoencoder import autoencoder_config
        from lorweb_jax.training.small_base.corpus import draw_edits, canvas_of, make_corpus
        from lorweb_jax.training.small_base.editor import sample
        from lorweb_jax.weights.state import build

        if self.log.seconds - self.log.now() < 12 and not self.args.tiny:
            self.log.say("no time for a sheet")
            return
        corpus = make_corpus(drawings, captions, variants, held_out=True)
        n = 4 if self.args.tiny else 24
        edits = jax.device_get(draw_edits(jax.random.key(1), corpus, n, 4, config.data))
        quadrants = tables[0]
        before, after = (canvas_of(quadrants[p.drawing, p.operation]).astype(jnp.float32)
                         for p in (edits.before, edits.after))
        run = jax.jit(lambda weights, noise, condition, clip, t5: sample(
            self.layout.model(weights, {}), noise, condition, clip, t5, config.show_steps))
        result = run(self.average, jax.random.normal(jax.random.key(0), before.shape), before,
                     words.clip[edits.caption], words.t5[edits.caption])
        vae = build(lambda: AutoencoderKL(autoencoder_config(vae_config), rngs=nnx.Rngs(0)), vae_weights)
        graphdef, variables = nnx.split(vae)
        decode = jax.jit(lambda variables, z: nnx.merge(graphdef, variables).decode(z / scale[0] + scale[1]))
        images = [to_uint8(decode(variables, z)) for z in (before, result, after)]
        texts = [captions.texts[row] for row in edits.caption]
        write_image(self.args.out / "base.png", sheet(list(zip(texts, zip(*images))), ("canvas", "edited", "truth")))
        error = [float(np.square(images[i].astype(float) - images[2]).mean()) for i in (1, 0)]
        self.log.set(held_out={"edited": error[0], "nothing_done": error[1]})
        self.log.say(f"sheet written; squared error {error[0]:.0f} of {error[1]:.0f}")


def variables_of(kept, size, operations):
    """(first row, block number) of the blocks of `size` quadrants that the pieces make in their order."""
    rows = sum(len(index) for index, _ in kept) * operations
    return [(i * size, i) for i in range(-(-rows // size))]


def blocks(kept, block, size, operations):
    """Block number `block` of `size` quadrants, uint8 [size, h, w, 3]; the last is filled up."""
    starts = np.cumsum([0, *(len(index) * operations for index, _ in kept)])
    first, parts, missing = block * size, [], size
    piece = int(np.searchsorted(starts, first, "right")) - 1
    while missing and piece < len(kept):
        images = kept[piece][1]
        images = images.reshape(-1, *images.shape[2:])
        at = first - int(starts[piece])
        part = images[at:at + missing]
        parts.append(part)
        missing -= len(part)
        first += len(part)
        piece += 1
    if missing:
        parts.append(np.zeros((missing, *parts[0].shape[1:]), np.uint8))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


if __name__ == "__main__":
    main()
