"""Computes the frozen encoders' outputs into a folder, alone or beside other processes that do the same."""

import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.progress import progress_bar
from lorweb_jax.data.problems import Problems, reason
from lorweb_jax.data.splits import read_splits
from lorweb_jax.files.store import Store, shard_name
from lorweb_jax.images.resize import resize
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.precomputed.encoder import SharedEncoder
from lorweb_jax.precomputed.read import Precomputed
from lorweb_jax.precomputed.scope import TEXT_ENCODERS, Scope

CAPTIONS, FILES = 16, 64  # in a shard: 67 MB of T5-XXL's embeddings in bfloat16; 128 images
LINE_SECONDS = 10.0  # between lines of progress in a file

# Items of a shard -> (keys of the records that settle them, the records' arrays).
Compute = Callable[[Sequence[str]], tuple[Sequence[str], dict[str, np.ndarray]]]


def precompute(config) -> None:
    """Fill `config.precomputed` for the config of a basis; what is there already stays.

    Raises UserError for another kind of config, unusable data or models, a folder made by others, or a full disk.
    """
    if config.job != "basis":
        raise UserError(
            f"the config is of the job {config.job!r}; only a basis's encoders are precomputed: give "
            "configs/basis.py or one like it",
            2,
        )
    problems = Problems()
    folder = PipelineFolder(config.pipeline, config.basis.encoder or None)
    scope = Scope.of(config, folder, read_splits(config, problems))
    print(f"precomputing into {scope.root} with the encoders of {folder.folder}", flush=True)
    _captions(scope)
    if scope.queries_kept:
        print(f"no queries: {scope.queries_kept}", flush=True)
    else:
        _images(scope, problems)
    if len(problems):
        print(problems.summary(), flush=True)
    Precomputed(scope)
    print(f"complete; train with --config.precomputed={scope.root}", flush=True)


def _captions(scope: Scope) -> None:
    scope.folder.tell_left_out(scope.captions(), "caption")
    store, texts = scope.text_store(create=True), {fingerprint.of_text(text): text for text in scope.captions()}
    models = scope.folder, scope.compute_dtype, scope.param_dtype

    def load() -> Compute:
        encoder = SharedEncoder(*models, TEXT_ENCODERS, CAPTIONS, lambda model, *ids: model.prompt(*ids))

        def compute(keys):
            text, pooled = encoder(*scope.folder.token_ids([texts[key] for key in keys]))
            return keys, {"text": text, "pooled": pooled}

        return compute

    each = scope.folder.text_tokens * scope.folder.t5_config.d_model * jnp.dtype(scope.compute_dtype).itemsize
    fill(store, list(texts), CAPTIONS, each, "captions", load)


def _images(scope: Scope, problems: Problems) -> None:
    mode, encoder_folder = scope.basis.query_mode, scope.folder.encoder
    store = scope.image_store(create=True)
    # With the time of change in its name, a file that was replaced by one as large is settled anew.
    pairs = {f"{name} {pair.changed()}": (task, pair) for name, (task, pair) in scope.pairs().items()}

    def read(item: str) -> tuple[list[np.ndarray], str | None]:
        """Before and after as they stand in a grid; or none, and why."""
        try:
            images = pairs[item][1].read(problems.tell)
            return [resize(image, scope.quadrant[::-1]) for image in images], None
        except Exception as error:  # whatever is wrong with one image, the others are read
            return [], reason(error)

    def load() -> Compute:
        processor = encoder_folder.processor
        encoder = SharedEncoder(
            scope.folder,
            scope.compute_dtype,
            scope.param_dtype,
            ("image_encoder",),
            2 * FILES,
            lambda model, views: queries.embed(mode, model.image_encoder, processor.normalised(views)),
        )

        def compute(items):
            images: dict[str, np.ndarray] = {}
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
                results = list(readers.map(read, items))
            for item, (two, wrong) in zip(items, results, strict=True):
                images |= {fingerprint.of_image(image): image for image in two}
                if wrong:
                    task, pair = pairs[item]
                    problems.add(task.name, task.relative(pair), wrong)
            if not images:
                return [], {}
            views = np.stack([processor.resized(image) for image in images.values()])
            return list(images), {"embedding": encoder(views)}

        return compute

    width = queries.embedding_dim(mode, nnx.eval_shape(lambda: encoder_folder.make(nnx.Rngs(0))))
    fill(store, list(pairs), FILES, 2 * 4 * width, "image files", load)


def fill(
    store: Store, items: Sequence[str], per_shard: int, bytes_each: int, what: str, load: Callable[[], Compute]
) -> None:
    """Settle `items` in shards of `per_shard`, beside whoever does the same; returns when all are, by whomever.

    bytes_each: what an item takes on disk, roughly. load() is called when there is work for this process.
    Raises UserError where there is no room.
    """
    chunks = [items[start : start + per_shard] for start in range(0, len(items), per_shard)]
    chunks = [left for chunk in chunks if (left := [item for item in chunk if item not in store.settled])]
    waiting = {shard_name(chunk): chunk for chunk in chunks}
    missing = sum(map(len, chunks))
    if waiting:
        print(f"{what}: {missing:,} of {len(items):,} are missing, {missing * bytes_each / 1e6:,.1f} MB", flush=True)
    store.require_space(missing * bytes_each)
    compute = bar = None
    while waiting:
        others = {}
        # An order of each process's own: where locks don't reach, they seldom make the same shard.
        for name in random.SystemRandom().sample(list(waiting), len(waiting)):
            with store.claimed(name) as mine:
                if not mine:
                    others[name] = waiting[name]
                    continue
                if not store.holds(name):
                    compute = compute or load()
                    store.add(name, waiting[name], *compute(waiting[name]))
            missing -= len(waiting[name])
            if bar is None:  # the first shard's time is mostly reading weights and compiling
                bar = progress_bar(what, len(items), len(items) - missing, seconds=LINE_SECONDS, unit="")
            bar.update(len(items) - missing - bar.n)
        if others.keys() == waiting.keys():
            time.sleep(0.5)  # other processes make all that is missing
        waiting = others
    if bar is not None:
        bar.close()
    store.refresh()
    print(f"{what}: all {len(items):,} are there", flush=True)
