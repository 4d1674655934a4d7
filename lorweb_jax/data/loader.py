"""Batches of analogies, read with grain: the same stream whatever the number of worker processes or hosts.

numbers of analogies (shuffled anew each epoch) -> read and draw (data/samples.py) -> host's rows -> batch
"""

import functools
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.data.analogies import Analogies
from lorweb_jax.data.buckets import Shape, divide
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.problems import Notes, Problems
from lorweb_jax.data.samples import SampleReader, stack
from lorweb_jax.settings.rules import BATCH, BUCKETS, SEED, SHARE, SIDE, WORKERS, Either, Several, Whole, as_value

# Not absl's logger, which training silences below errors since libraries chatter there.
_log = logging.getLogger(__name__)
_THREADS = 2  # decoding threads in each process; PIL and NumPy leave the interpreter lock while they work
_BATCHES_AHEAD = 2  # batches kept ready by each process
_SECONDS_AFTER_SIGTERM = 30.0  # in which a run saves its last step, as processes are killed soon after


class AnalogyLoader(grain.DatasetIterator):
    """An endless, checkpointable iterator over batches of analogies.

    A batch is a dict: "condition" uint8 [b,H,W,3] the grid [a, a′; b, b] · "target" uint8 [b,H,W,3] the grid
    [a, a′; b, b′] · "images" uint8 [b,3,H/2,W/2,3] the quadrants a, a′, b · "caption" object [b] of str, the
    instruction, "" where dropped or reversed · "task" object [b] of str · "pairs" int32 [b,2] ids of both pairs ·
    "reversed" bool [b].

    The stream depends on the data, the seed and the batch size only, neither on the workers nor on the split over
    hosts: a host that asks for some rows of the batches reads these, and they are the same as in the whole batches.
    An epoch shows every analogy once, in an order of its own; a batch may reach over the end of an epoch. With buckets
    (data/buckets.py) each of them has such epochs, a batch is of one bucket, and buckets take turns by how many
    analogies they have.

    Images that can't be read while training are reported in `problems` (and once each in the log); the next readable
    analogy of the task stands in for the one drawn, and is counted.

    The position is a number of batches, so it can be restored under any number of workers and hosts; use `get_state`
    and `set_state`, or `grain.checkpoint.CheckpointSave` and `CheckpointRestore`. Call `close` at the end.
    """

    def __init__(
        self,
        data: str | os.PathLike | Analogies,
        batch_size: int,
        *,
        quadrant_size: int | tuple[int, int] | None = None,
        max_size: int | None = None,
        buckets: Sequence[Shape] = (),
        seed: int = 0,
        caption_drop: float = 0.05,
        reverse_probability: float = 0.0,
        task_balanced: bool = False,
        workers: int = 0,
        rows: Sequence[int] | None = None,
        problems: Problems | None = None,
    ):
        """
        Args:
          data: a folder as `read_tasks` takes it, or analogies.
          batch_size: analogies a batch, over all hosts.
          quadrant_size: quadrant's (height, width), or the side of a square; multiples of 8. Images are resized to it
            (bicubic, the aspect ratio is not kept). Without it a's size is the quadrant's (method.md section 2) and
            the grid's sides are shrunk to multiples of 16; the grids of a batch must then agree.
          max_size: longest edge of the grid when quadrants have a's size; pixels.
          buckets: several quadrants' (height, width) in the place of one; analogies are then of pairs in one bucket.
          seed: of the order and the draws.
          caption_drop: probability of an empty caption (method.md section 5).
          reverse_probability: probability that before and after are swapped in both pairs; the caption is then empty,
            since the instruction doesn't describe the way back.
          task_balanced: every task once in as many analogies as there are tasks, in an order drawn anew each time,
            instead of tasks by their number of analogies; a task's analogies are then shown epoch by epoch.
          workers: worker processes; 0 reads in threads of this process.
          rows: which of a batch's analogies this host reads, in this order; all of them by default. b is their number.
          problems: where to report; a new one otherwise.

        Raises:
          UserError: no usable data, or an argument out of range. Iterating raises it if nothing at all can be read or
            the grids of a batch differ in size.
        """
        super().__init__()
        self._position = 0
        self._iterator: grain.DatasetIterator | None = None
        self._notes = Notes(lambda sentence: _log.warning("%s", sentence))
        if isinstance(quadrant_size, int):
            quadrant_size = (quadrant_size, quadrant_size)
        _check(batch_size, quadrant_size, max_size, buckets, seed, caption_drop, reverse_probability, workers, rows)
        self.problems = Problems() if problems is None else problems
        buckets = [(height, width) for height, width in buckets]
        known = len(self.problems)
        analogies = data if isinstance(data, Analogies) else Analogies(read_tasks(data, self.problems))
        self.bucketed = divide(analogies.tasks, buckets, self.problems) if buckets else None
        if len(self.problems) > known:
            _log.warning("%s", self.problems.summary())
        if self.bucketed:
            analogies = Analogies(self.bucketed.groups, analogies.limit)
        self.analogies = analogies
        self._workers = workers
        self._stream: dict[str, Any] = {
            "data": analogies.digest(),
            "seed": seed,
            "global_batch": batch_size,
            "task_balanced": task_balanced,
        }
        if buckets:
            self._stream["buckets"] = [list(shape) for shape in buckets]
        count = len(analogies.tasks)
        shapes = self.bucketed.shapes if self.bucketed else [quadrant_size] * count if quadrant_size else None
        reader = SampleReader(analogies, shapes, max_size, caption_drop, reverse_probability)

        def batches(tasks: range, seeds: np.random.SeedSequence, shares: Sequence[float] | None) -> grain.MapDataset:
            """The endless stream of some tasks' batches."""
            order_seed, draw_seed = (int(part) for part in seeds.generate_state(2))
            samples = _order(analogies, tasks, order_seed, task_balanced, shares).random_map(reader, seed=draw_seed)
            if rows is not None:
                samples = _HostRows(samples, batch_size, rows)
            return samples.batch(batch_size if rows is None else len(rows), drop_remainder=True, batch_fn=stack)

        seeds = np.random.SeedSequence(seed)
        if not self.bucketed:
            self._batches = batches(range(count), seeds, None)
        else:
            streams, weights = [], []
            for shape, part in zip(buckets, seeds.spawn(len(buckets))):
                if tasks := self.bucketed.tasks(shape):
                    shares = self.bucketed.shares[tasks.start : tasks.stop]
                    streams.append(batches(tasks, part, shares))
                    weights.append(sum(shares) if task_balanced else sum(len(analogies.span(task)) for task in tasks))
            self._batches = grain.MapDataset.mix(streams, weights)

    def __next__(self) -> dict:
        if self._closed:
            raise ValueError("the loader is closed")
        batch = next(self._started())
        self._position += 1
        for what, path in itertools.chain(*batch.pop("notes")):
            self._notes(path, what)
        for problems in batch.pop("problems"):
            self.problems.substituted += bool(problems)
            for problem in problems:
                if self.problems.add(problem.task, problem.file, problem.reason):
                    _log.warning(
                        "skipped %s of task %s: %s", *map(printable, (problem.file, problem.task, problem.reason))
                    )
        return batch

    def start_prefetch(self) -> None:
        """Start reading ahead from the present position."""
        self._started()

    def _started(self) -> grain.DatasetIterator:
        if self._iterator is not None:
            return self._iterator
        # Starting at a slice of the random-access batches makes the position a plain number; grain's own state of
        # an iterator with workers belongs to that number of workers.
        ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
        stream = self._batches.slice(slice(self._position, None)).to_iter_dataset(ahead)
        if self._workers:
            # Shared memory of processes that were killed is freed by multiprocessing's tracker, which warns of it.
            os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
            # grain reads absl flags when it starts workers, which fails in a program that never parsed any.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, _BATCHES_AHEAD),
                functools.partial(_start_worker, os.getpid()),
            )
        self._iterator = iter(stream)
        self._iterator.start_prefetch()
        return self._iterator

    def get_state(self) -> dict:
        """The position: the number of batches handed out, and what the stream is made of. JSON-compatible."""
        return {"batches": self._position, "stream": dict(self._stream)}

    def set_state(self, state: dict) -> None:
        """Go on after the batch at which `state` was taken.

        Raises:
          UserError: the state belongs to another stream (data, seed, global batch, balance or buckets changed).
        """
        saved = state["stream"]
        now = self._stream
        names = [*now, *(name for name in saved if name not in now)]
        changed = [f"{name} {saved.get(name)} -> {now.get(name)}" for name in names if saved.get(name) != now.get(name)]
        if changed:
            raise UserError(
                f"the saved data position belongs to another stream ({'; '.join(changed)}); expected the "
                "data and settings it was saved with; restore them or start a new run"
            )
        self._stop()
        self._position = state["batches"]

    def close(self) -> None:
        """Stop reading and end the worker processes."""
        self._stop()
        self._closed = True

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _start_worker(parent: int, worker: int, workers: int) -> None:
    """What a worker process runs first. SIGTERM, where it is sent to all processes of a group, leaves the worker some
    time in which its parent ends the step that needs more batches; and the worker ends once its parent is gone."""
    del worker, workers  # grain passes them

    def outlive(number, frame):
        timer = threading.Timer(_SECONDS_AFTER_SIGTERM, os._exit, [1])
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, outlive)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _order(
    analogies: Analogies, tasks: range, seed: int, task_balanced: bool, shares: Sequence[float] | None
) -> grain.MapDataset:
    """The endless sequence of numbers of some tasks' analogies; grain computes its shuffles entry by entry, without a
    list. shares: how often each task is shown where they are balanced; None: all equally."""
    spans = [analogies.span(task) for task in tasks]
    if not task_balanced:
        return grain.MapDataset.range(spans[0].start, spans[-1].stop).shuffle(seed).repeat()
    *seeds, round_seed = (int(part) for part in np.random.SeedSequence(seed).generate_state(len(tasks) + 1))
    of_tasks = [
        grain.MapDataset.range(span.start, span.stop).shuffle(task_seed).repeat()
        for span, task_seed in zip(spans, seeds, strict=True)
    ]
    rounds = grain.MapDataset.mix(of_tasks, shares)
    return grain.experimental.WindowShuffleMapDataset(rounds, window_size=len(tasks), seed=round_seed)


class _HostRows(grain.MapDataset):
    """Of every `batch` elements that follow one another, those at `rows`."""

    def __init__(self, parent: grain.MapDataset, batch: int, rows: Sequence[int]):
        super().__init__(parent)
        self._batch, self._rows = batch, list(rows)

    def __len__(self) -> int:
        return len(self._parent) // self._batch * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        number, row = divmod(index, len(self._rows))
        return self._parent[number * self._batch + self._rows[row]]


def _check(batch_size, quadrant_size, max_size, buckets, seed, caption_drop, reverse_probability, workers, rows):
    rules = {
        "batch size": (batch_size, BATCH),
        "quadrant size": (quadrant_size, Either(Whole(0, 0, also=(None,)), Several(SIDE, 2, 2))),
        "largest size": (max_size, Whole(2, 2**20, also=(None,))),
        "buckets": (buckets, BUCKETS),
        "seed": (seed, SEED),
        "probability of caption drop": (caption_drop, SHARE),
        "probability of reversal": (reverse_probability, SHARE),
        "number of workers": (workers, WORKERS),
    }
    for name, (value, rule) in rules.items():
        as_value(value, f"the {name}", rule)
    if quadrant_size and max_size:
        raise UserError(
            f"both a quadrant size {quadrant_size} and a maximum size {max_size} were given; the first "
            "fixes the grid's size, so give one of them"
        )
    if buckets and (quadrant_size or max_size):
        raise UserError(
            "both buckets and a quadrant size or maximum size were given; buckets say all sizes, so give these"
        )
    if len(set(map(tuple, buckets))) < len(buckets):
        raise UserError(f"two of the buckets {list(buckets)} are the same; give each shape once")
    if rows is not None and not (len(rows) and all(0 <= row < batch_size for row in rows)):
        raise UserError(
            f"rows {list(rows)} of a batch of {batch_size} were asked for; expected one or more of 0 to "
            f"{batch_size - 1}"
        )
