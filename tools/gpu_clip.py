"""Trains the small base's CLIP vision tower in a minute or two on a GPU, by the clock; configs/base_clip.py's job.

  python tools/gpu_clip.py --prepare                      # here, with everything installed: the sentences' tokens
  python tools/gpu_clip.py --seconds 110 --out OUT        # there: jax, flax, optax, numpy and Pillow are enough
  python tools/gpu_clip.py --seconds 100 --out OUT --tiny # a rehearsal on a CPU
  python tools/gpu_clip.py --finish OUT                   # here again: runs/base_clip of what came back

Batches are drawn on the device from a table of some drawings after all operations, which is replaced by one of others
as worker processes make them.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from gpu_loop import DRAWINGS, PREPARED, Background, Log, Settings, run_until, save, trainer  # noqa: E402

from lorweb_jax.common.command_line import Parser, nonempty_path  # noqa: E402
from lorweb_jax.common.errors import run_command  # noqa: E402

SENTENCES = PREPARED / "sentences.npz"
CONFIG = PREPARED / "base_clip.json"
SECONDS_TO_END = 4


def prepare() -> None:
    """Writes the sentences' tokens and the config, for a machine without tokenizers and ml_collections."""
    import runpy

    from lorweb_jax.data.embedded.drawing_sets import load_sets
    from lorweb_jax.small_base.jobs.clip import make_sentences

    config = runpy.run_path("configs/base_clip.py")["get_config"]().to_dict()
    sentences = make_sentences(load_sets(DRAWINGS))
    PREPARED.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(SENTENCES, **sentences._asdict())
    CONFIG.write_text(json.dumps(config, indent=1) + "\n")
    print(f"{sentences.words} words, names {sentences.names.shape}, kinds {sentences.kinds.shape}")


def read_prepared():
    from lorweb_jax.small_base.jobs.clip import Sentences

    with np.load(SENTENCES) as file:
        sentences = Sentences(**{name: file[name] for name in Sentences._fields})
    return sentences._replace(words=int(sentences.words)), Settings.of(json.loads(CONFIG.read_text()))


def make_trainer(size, drawings, sentences, config, dtype):
    """(gpu_loop.trainer of the job, shapes of its tables): rows int32 [table], which drawings are in the table; the
    table uint8 [table, operations, h, w, 3]; and all drawings plain, uint8 [D, h, w, 3]."""
    import jax
    import jax.numpy as jnp

    from lorweb_jax.data.embedded.operations import OPERATIONS
    from lorweb_jax.small_base.jobs.clip import STYLE_SETS, ClipPair, choose, image_processor, pair_loss, tower_configs

    vision_config, text_config = tower_configs(config, sentences.words)
    processor, operations = image_processor(config.vision.image_size), len(OPERATIONS)

    def loss(model, key, rows, table, plain):
        choice_key, wording_key = jax.random.split(key)
        row, chosen = choose(choice_key, rows, drawings.set_of, drawings.twins, size.batch, config.data.edits)
        goal = jnp.asarray(STYLE_SETS)[jnp.maximum(chosen.edits - operations, 0)]
        twin = jnp.asarray(drawings.twins)[chosen.drawing[:, None], goal]
        after = jnp.where(
            (chosen.edits < operations)[..., None, None, None],
            table[row[:, None], jnp.minimum(chosen.edits, operations - 1)],
            plain[twin],
        )
        images = jnp.concatenate([plain[chosen.drawing][:, None], after], 1)
        return pair_loss(
            model,
            {"images": images, "drawing": chosen.drawing, "edits": chosen.edits},
            sentences,
            drawings.set_of,
            processor,
            config.loss,
            wording_key,
            dtype,
        )

    shape = drawings.images.shape[1:3] + (3,)
    return trainer(lambda rngs: ClipPair(vision_config, text_config, rngs=rngs), config, loss), (
        jax.ShapeDtypeStruct((size.table,), np.int32),
        jax.ShapeDtypeStruct((size.table, operations, *shape), np.uint8),
        jax.ShapeDtypeStruct((len(drawings), *shape), np.uint8),
    )


def train(args) -> None:
    # Searching for the fastest kernels takes longer than they save.
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    size = (
        SimpleNamespace(table=48, batch=8, steps=2, processes=1)
        if args.tiny
        else SimpleNamespace(table=1024, batch=128, steps=20, processes=args.processes)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out, args.seconds, "clip", ("clip",))

    from lorweb_jax.data.embedded.bulk import operated
    from lorweb_jax.data.embedded.drawing_sets import load_sets
    from lorweb_jax.data.embedded.operations import OPERATIONS, on_white

    drawings = load_sets(DRAWINGS)
    log.say(f"{len(drawings)} drawings")
    candidates = np.flatnonzero(~drawings.held_out)
    pieces: list[tuple[np.ndarray, np.ndarray]] = []  # (drawings, uint8 [n, operations, h, w, 3]), newest last

    def make() -> None:
        round_ = 0
        while log.now() < args.seconds:
            order = np.random.default_rng(round_).permutation(candidates)
            order = order[: 2 * size.table] if args.tiny else order
            for start, stop, images in operated(drawings.images[order], list(OPERATIONS), size.processes):
                pieces.append((order[start:stop], images))
                # Two tables' worth are kept: what is older has been shown.
                while sum(len(index) for index, _ in pieces[1:]) >= 2 * size.table:
                    del pieces[0]
                if log.now() > args.seconds:
                    return
            round_ += 1

    maker = Background(make)

    import jax
    import jax.numpy as jnp

    sentences, config = read_prepared()
    made, specs = make_trainer(size, drawings, sentences, config, jnp.float32 if args.tiny else jnp.bfloat16)

    def compiled():
        begin = time.monotonic()
        program = made.lower(*specs).compile()
        log.say(f"step traced and compiled in {time.monotonic() - begin:.1f} s")
        return program

    program = Background(compiled)
    plain = jax.device_put(np.stack([on_white(image) for image in drawings.images]))

    def table(count: int):
        """The newest `count` drawings, and what they look like after all operations."""
        kept, found = [], 0
        for piece in reversed(list(pieces)):
            kept.append(piece)
            found += len(piece[0])
            if found >= count:
                break
        rows, images = (np.concatenate([piece[i] for piece in kept]) for i in (0, 1))
        if len(rows) < count:  # the first ones are shown again until there are more
            again = np.resize(np.arange(len(rows)), count)
            rows, images = rows[again], images[again]
        return rows[:count].astype(np.int32), images[:count]

    state = made.fresh()
    step = program.result()
    while sum(len(index) for index, _ in list(pieces)) < size.table // 2:
        if maker.error:
            maker.result()
        time.sleep(0.1)
    first = table(size.table)
    shown = [first[0]]
    waiting: list[Background] = []
    begun = log.now()
    log.say("training begins")

    def every(state, progress):
        """Another table as soon as at least half of it is new."""
        if waiting and waiting[0].done:
            rows, images = waiting.pop().made
            shown.append(np.asarray(rows))
            return rows, images, plain
        new = sum(len(index) for index, _ in list(pieces) if not np.isin(index, shown[-1]).all())
        if not waiting and new >= size.table // 2:
            waiting.append(Background(lambda: tuple(map(jax.device_put, table(size.table)))))
        return None

    state = run_until(
        args.seconds - SECONDS_TO_END, log, "clip", size.steps, state, (*map(jax.device_put, first), plain), step, every
    )
    log.record["tables"], log.record["trained_seconds"] = len(shown), round(log.now() - begun, 1)
    average = jax.device_get(state.exported)
    save(
        args.out / "clip_vision.safetensors",
        {name: array for name, array in average.items() if name.startswith("vision.")},
        np.float16,
    )
    log.say(f"vision tower written; {len(shown)} tables of {size.table} drawings shown")


def finish(out: Path) -> None:
    """Writes runs/base_clip/clip_vision and quality.json of the weights in `out`."""
    from flax import nnx
    from safetensors.numpy import load_file

    from lorweb_jax.data.embedded.drawing_sets import load_sets
    from lorweb_jax.files.safetensors_io import write_json
    from lorweb_jax.files.state import build
    from lorweb_jax.models.clip.folder import ClipVision, save_clip
    from lorweb_jax.models.image_encoder.processor import FILE
    from lorweb_jax.small_base.jobs.clip import image_processor, tower_configs
    from lorweb_jax.small_base.jobs.clip_quality import write_quality

    sentences, config = read_prepared()
    vision, _ = tower_configs(config, sentences.words)
    weights = {
        name.removeprefix("vision."): array for name, array in load_file(out / "clip_vision.safetensors").items()
    }
    model = build(lambda: ClipVision(vision, rngs=nnx.Rngs(0)), weights)
    processor = image_processor(vision.image_size)
    folder = Path("runs/base_clip/clip_vision")
    save_clip(model, folder, np.float16)
    write_json(folder / FILE, processor.to_json())
    write_quality(folder.parent, model, processor, load_sets(DRAWINGS))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--prepare", action="store_true", help="write what the other machine needs")
    parser.add_argument(
        "--finish", type=nonempty_path, metavar="OUT", help="make runs/base_clip of a folder that came back"
    )
    parser.add_argument("--seconds", type=float, default=110, help="when to be done, from the start (default: 110)")
    parser.add_argument("--out", type=nonempty_path, default=Path("runs/gpu_base"), help="the folder to write into")
    parser.add_argument("--processes", type=int, default=3, help="that make operated drawings (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="small batches, for a rehearsal on a CPU")
    args = parser.parse_args()
    if args.prepare:
        prepare()
    elif args.finish:
        finish(args.finish)
    else:
        train(args)


if __name__ == "__main__":
    run_command(main)
