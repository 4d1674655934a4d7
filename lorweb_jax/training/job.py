"""What train.py asks of a training job.

A job says which model is trained, on what, by which loss, and what to show and export; train.py does the rest
(devices, optimizer, checkpoints, metrics) the same way for all of them. A job is made by
`lorweb_jax.jobs.<name>:make(config)`, with `config.job` as the name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

Batch = dict[str, Any]


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved, as grain's iterators are.

    Every numeric entry of a batch has a leading axis b = config.train.batch.
    """

    def __next__(self) -> Batch: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def get_state(self) -> Any:
        """The position: bytes, or anything that json can hold."""

    def set_state(self, state: Any) -> None:
        """Go on from `state`: the batches that follow are those that followed when it was taken."""


class Job(Protocol):
    """A training job. Optional methods may be left out; so don't inherit from this class, which has them all."""

    # Variables of this type (and its subclasses) are trained: they alone are differentiated, optimized,
    # averaged, checkpointed and exported. Every other Variable of the model is frozen.
    trainable: type[nnx.Variable]

    # Optional: an NNX filter that narrows `trainable` down, e.g. nnx.All(Weight, nnx.PathContains("encoder")).
    # trainable_filter: nnx.filterlib.Filter

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The whole model that `loss` needs, frozen parts included, freshly initialised.

        It is traced (nnx.eval_shape, jax.jit), so that nothing is allocated twice: it must read no files.
        """

    def frozen(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
        """Optional: the frozen weights by dotted path, read from files; exactly the paths and shapes of `shapes`.

        Without this method frozen weights are what `build` makes of them. train.py casts the floating ones to
        config.train.param_dtype and places them on the devices; they are arguments of the jitted step.
        """

    def sources(self) -> dict[str, str]:
        """Optional: fingerprints of what lies at the config's paths, by dotted field. A run goes on where they are the
        same, wherever it lies; the paths themselves may then differ. Without this method the paths are compared."""

    def initial(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
        """Optional: trainable weights to start from (a fine-tuning run), by dotted path; some of `shapes` or all."""

    def data(self, config) -> Batches:
        """Training batches: dicts of numpy arrays; other entries (captions) are for `prepare` alone."""

    def prepare(self, batch: Batch) -> Batch:
        """Optional, on the host before each step: the batch with arrays in the place of captions and the like.

        Without it, entries that are not numeric arrays are dropped.
        """

    def encode(self, model: nnx.Module, batch: Batch) -> Batch:
        """Optional, on the devices before each step: arrays [b, …] that frozen parts alone make of the batch, such as
        latents of images, to be added to it.

        Traced, in a program of its own: it is compiled beside the step's, and nothing of it is kept for the backward
        pass. `model`'s trainables are mere shapes here; to use one is an error.
        """

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(scalar loss, scalar metrics) of one batch; traced, differentiated; all randomness comes from `key`."""

    def log_images(self, model: nnx.Module, step: int) -> dict[str, np.ndarray]:
        """Pictures uint8 [height, width, 3] by name; `model` holds the averaged weights where an EMA is kept."""

    def finish(self, model: nnx.Module, workdir: Path) -> None:
        """Write what the run is for (an exported basis, a part of a pipeline folder, a table) at its end."""
