"""Frozen parts of a pipeline, replicated on all of a process's devices, which share each batch."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorweb_jax.files.state import build, shapes
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.model import AnalogyModel


class SharedEncoder:
    """encoder(*arrays [n, …]), n at most `batch` -> function(model, *arrays), numpy [n, …].

    The model has only `parts`, replicated, in the dtypes that training stores (`param_dtype`) and computes them in
    (`compute_dtype`).
    """

    def __init__(
        self,
        folder: PipelineFolder,
        compute_dtype: str,
        param_dtype: str,
        parts: Sequence[str],
        batch: int,
        function: Callable[..., jax.Array | tuple],
    ):
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices[: math.gcd(batch, len(devices))]), ("batch",))
        replicated, self._split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
        self._batch = batch

        def make() -> AnalogyModel:
            return folder.make(nnx.Rngs(0), dtype=compute_dtype, parts=parts)

        wanted = {
            path: jax.ShapeDtypeStruct(shape.shape, jnp.dtype(param_dtype), sharding=replicated)
            for path, shape in shapes(make).items()
        }
        graphdef, self._state = nnx.split(build(make, folder.read(wanted), str(folder.folder)))
        self._function = jax.jit(
            lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays), out_shardings=self._split
        )

    def __call__(self, *arrays: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        n = len(arrays[0])
        padded = [np.concatenate([array, np.repeat(array[-1:], self._batch - n, 0)]) for array in arrays]
        outputs = self._function(self._state, *jax.device_put(padded, self._split))
        return jax.tree.map(lambda array: np.asarray(array)[:n], outputs)
