"""What the training loop asks of a job.

A job says which model is trained, on what, by which loss, and what to log and export; training/loop.py does the rest
(devices, optimizer, checkpoints, metrics) the same way for all of them. A job is made by
`lorweb_jax.jobs.<name>:make(config)`, with `config.job` as the name.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

Batch = dict[str, Any]
Loss = Callable[[nnx.Module, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class Batches(Iterator[Batch]):
    """An endless iterator of batches whose position can be saved. grain's iterators are one, too.

    Every numeric entry of a batch has a leading axis b = config.train.batch.
    """

    def get_state(self) -> Any:
        """The position: bytes, or anything that json can hold."""
        raise NotImplementedError

    def set_state(self, state: Any) -> None:
        """Go on from `state`: the batches that follow are those that followed when it was taken."""
        raise NotImplementedError

    def close(self) -> None:
        """End what reads them: threads, processes, open files."""


class NumberedBatches(Batches):
    """Batches that depend on their number only, which is the position that is saved."""

    position = 0  # number of the next batch

    def at(self, number: int) -> Batch:
        """Batch `number`, from 0."""
        raise NotImplementedError

    def __next__(self) -> Batch:
        self.position += 1
        return self.at(self.position - 1)

    def get_state(self) -> dict[str, int]:
        return {"batches": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["batches"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One pass of a training step: a loss, and the trainables that are updated by its gradient.

    The phases of a step run one after another on the same batch and random key, each with the trainables as the phase
    before left them (see `Job.joint`), and with an optimizer state (gradient clipping included) of its own. In steps
    before `start` a phase isn't computed, and its optimizer state stays as it was initialised, step count included.
    """

    name: str  # of the optimizer state in the checkpoint, and of the metrics where there are several phases
    loss: Loss
    trains: nnx.filterlib.Filter = ...  # which of the trainables; all by default
    start: int = 0  # the first step that it runs in, counted from 0


class Job:
    """A training job: inherit from it and define what has no default."""

    # Variables of this type (and its subclasses) are trained: they alone are differentiated, optimized,
    # averaged, checkpointed and exported. Every other Variable of the model is frozen.
    trainable: type[nnx.Variable]

    # Whether the phases of a step all take their gradients at the point where the step began: the gradient of the sum
    # of their losses, clipped by its norm as a whole, where no two phases train the same.
    joint = False

    @property
    def trainable_filter(self) -> nnx.filterlib.Filter:
        """An NNX filter that may narrow `trainable` down, e.g. nnx.All(Weight, nnx.PathContains("encoder"))."""
        return self.trainable

    @property
    def attention_heads(self) -> Sequence[int]:
        """Numbers of attention heads that the mesh's tensor and sequence axes must divide; known before any weights are
        read."""
        return ()

    @property
    def sequences(self) -> Sequence[int]:
        """Lengths, in tokens, that the mesh's sequence axis must divide, as far as they are known beforehand."""
        return ()

    @property
    def offloaded(self) -> Sequence[str]:
        """Dotted paths of stacks of frozen blocks whose kernels lie in the host's memory (nn/offload.py)."""
        return ()

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The whole model that the loss needs, frozen parts included, freshly initialised.

        It is traced (nnx.eval_shape, jax.jit), so that nothing is allocated twice: it must read no files.
        """
        raise NotImplementedError

    def unstack(self, model: nnx.Module) -> None:
        """Give blocks of the frozen part of `model` arrays of their own (layers.Unstacked), where the config asks for
        it; they may be shapes. `frozen` reads stacks, and this takes them apart."""

    def frozen(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray] | None:
        """The frozen weights by dotted path, read from files: exactly the paths and shapes of `shapes`. None (the
        default): what `build` makes of them.

        Floating ones are cast to config.train.param_dtype and moved to the devices; they are arguments of the jitted
        step.
        """
        return None

    def initial(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
        """Weights of the basis or model to start from, trained ones and frozen parameters of a basis, by dotted path:
        some of `shapes`, or all, or none."""
        return {}

    def rate(self, path: str) -> float:
        """What the updates of the trainable at a dotted path are multiplied by: its own learning rate."""
        return 1.0

    def sources(self) -> dict[str, str]:
        """Fingerprints of the files at the config's paths, by dotted field. A run goes on where they are the same,
        wherever these files are now; the paths themselves may then differ. Of other fields the paths are compared."""
        return {}

    def data(self, config) -> Batches:
        """Training batches: dicts of numpy arrays; other entries (captions) are for `prepare` alone."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Batch:
        """On the host before each step: the batch with arrays in the place of captions and the like.

        Entries that are not numeric arrays are dropped afterwards.
        """
        return batch

    def encode(self, model: nnx.Module, batch: Batch) -> Batch:
        """On the devices before each step: arrays [b, …] that frozen parts alone make of the batch, or of one of its
        micro-batches, such as latents of images, to be added to it.

        Traced, in a program of its own: it is compiled beside the step's, and nothing of it is kept for the backward
        pass. `model`'s trainables are mere shapes here; to use one is an error.
        """
        return {}

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(scalar loss, scalar metrics), means over one batch, or over one micro-batch of it where
        config.train.accumulate says so; traced, differentiated; all randomness comes from `key`."""
        raise NotImplementedError

    def phases(self) -> Sequence[Phase]:
        """The passes of a step, in order; by default one, which trains everything by `loss`."""
        return [Phase("train", self.loss)]

    def log_images(self, model: nnx.Module, step: int) -> Mapping[str, np.ndarray | float]:
        """Images uint8 [height, width, 3] by name, and numbers for TensorBoard; `model` holds the averaged weights
        where an EMA is kept."""
        return {}

    def validate(self, model: nnx.Module, step: int) -> float | None:
        """A score of held-out data at each checkpoint, the lower the better; None (the default): there is none. `model`
        as for `log_images`. For runs of one process."""
        return None

    def keep(self, model: nnx.Module, folder: Path) -> None:
        """Write into an empty folder what is to be kept of the checkpoint with the best score so far."""

    def finish(self, model: nnx.Module, workdir: Path) -> None:
        """Write what the run is for (an exported basis, a part of a pipeline folder, a table) at its end."""
