"""Weights read from files straight into the devices' shards, in the dtype and sharding of the model.

One block's tensor (or the rows of it that this host's devices hold) is read at a time. Large parameters are sent to an
accelerator tensor by tensor: the device transposes, casts, quantises and fills its shard, and the host holds a few
tensors at most. On a CPU, for small parameters and for those that stay in the host's memory, the host fills the shards
itself.
"""

import functools
import math
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.checkpoint import ahead
from lorweb_jax.files.table import Cut, Part, Stored
from lorweb_jax.nn import quantization
from lorweb_jax.nn.offload import PINNED
from lorweb_jax.nn.sharding import held_slices

SMALL = 32_000_000  # bytes of a parameter for which an accelerator compiles nothing
_AHEAD = 1  # tensors read while another is moved
_BLOCK = 128  # columns transposed or quantised at a time, so that they stay in the processor's cache

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def load_sharded(stored: Stored, shapes: Shapes, streamed_above: int | None = None) -> dict[str, jax.Array]:
    """{path: array} of `shapes`, some or all of the model's paths with the dtype and sharding of each.

    A path X.kernel of 8-bit dtype with X.scale beside it (and not in the files) is quantised as it is read: int8 a
    whole output channel at a time however it is sharded, fp8, which has one scale a kernel, a whole block's tensor,
    which each host then reads. streamed_above: parameters of more bytes than this are assembled on the device; by
    default SMALL, and none on a CPU. Raises UserError for a path or shape that the files don't have.
    """
    kinds = {dtype: kind for kind, dtype in quantization.DTYPES.items()}
    scales = {
        kernel: path
        for path in shapes
        if path.endswith(".scale")
        and path not in stored.layout.shapes
        and (kernel := path.removesuffix(".scale") + ".kernel") in shapes
    }
    _check(stored, shapes, scales)
    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(2) as readers:
        for path, where in shapes.items():
            if path in scales.values():
                continue
            targets = {path: where} | ({scales[path]: shapes[scales[path]]} if path in scales else {})
            kind = kinds[jnp.dtype(where.dtype)] if path in scales else None
            parameter = _Parameter(stored, path, list(targets.values()), kind)
            streams = parameter.nbytes > (parameter.limit if streamed_above is None else streamed_above)
            fill = parameter.streamed if streams and not parameter.splits_blocks else parameter.on_host
            arrays |= dict(zip(targets, fill(readers)))
    return arrays


def _check(stored: Stored, shapes: Shapes, scales: Mapping[str, str]) -> None:
    known = stored.layout.shapes | {
        scale: quantization.scale_shape(stored.layout.shapes[kernel], shapes[kernel].dtype)
        for kernel, scale in scales.items()
        if kernel in stored.layout.shapes
    }
    for path, where in shapes.items():
        if known.get(path) != tuple(where.shape):
            raise UserError(
                f"the model asks for {path} {list(where.shape)}, and {stored.checkpoint.path} has "
                f"{list(known[path]) if path in known else 'no such weight'}; check that the files and "
                "the config's sizes belong together"
            )


class _Piece(NamedTuple):
    """The cut of a block's tensor that a device takes, and where in it its part of each array begins."""

    cut: Cut
    starts: tuple[tuple[int, ...], ...]


class _Parameter:
    """One path; `wanted` is its array, or codes and scale if it is quantised as `kind`."""

    def __init__(self, stored: Stored, path: str, wanted: list[jax.ShapeDtypeStruct], kind: str | None):
        self.stored, self.layout, self.wanted, self.kind = stored, stored.layout, wanted, kind
        self.parts = [part for part in self.layout if part[0] == path]
        self.stacked = self.parts[0][1] is not None
        self.axes, self.shape = self.layout.axes(self.parts[0]), self.layout.part_shape(self.parts[0])
        self.nbytes = math.prod(self.layout.shapes[path]) * self.layout.dtype(stored.checkpoint, self.parts[0]).itemsize
        # Of each array: {device of this host: (start, stop) of each axis of its shard}.
        self.shards = [
            {
                device: tuple(s.indices(size)[:2] for s, size in zip(index, where.shape))
                for device, index in held_slices(where.sharding, where.shape).items()
            }
            for where in wanted
        ]
        self.devices = list(self.shards[0])
        in_host_memory = self.devices[0].platform == "cpu" or wanted[0].sharding.memory_kind == PINNED
        self.limit = math.inf if in_host_memory else SMALL
        self.splits_blocks = self.stacked and any(
            cut[0] != (0, len(self.parts)) for shards in self.shards for cut in shards.values()
        )
        # Else one for the kernel.
        self.scale_a_channel = kind is not None and wanted[1].shape[-1] == self.shape[-1]
        self.pieces = self._pieces()

    def _pieces(self) -> list[_Piece]:
        """What each device takes of a block's tensor."""
        cuts = [tuple(shards[device][self.stacked :] for shards in self.shards) for device in self.devices]
        if self.kind is None:
            return [_Piece(cut, ((0,) * len(cut),)) for (cut,) in cuts]
        # Quantised: all inputs of the device's output channels, or all of the tensor where its scales are of others, or
        # there is one scale for all of it.
        inputs = tuple((0, size) for size in self.shape[:-1])
        within = self.scale_a_channel and all(
            codes[-1][0] <= scale[-1][0] and scale[-1][1] <= codes[-1][1] for codes, scale in cuts
        )
        pieces = []
        for cut in cuts:
            outputs = cut[0][-1] if within else (0, self.shape[-1])
            pieces.append(
                _Piece(
                    (*inputs, outputs),
                    tuple((*(start for start, _ in each[:-1]), each[-1][0] - outputs[0]) for each in cut),
                )
            )
        return pieces

    def _read(self, part: Part) -> dict[Cut, np.ndarray]:
        return self.layout.read_cuts(self.stored.checkpoint, part, {piece.cut for piece in self.pieces})

    def _assembled(self, shards: list[list[jax.Array]]) -> list[jax.Array]:
        return [
            jax.make_array_from_single_device_arrays(where.shape, where.sharding, arrays)
            for where, arrays in zip(self.wanted, shards)
        ]

    def on_host(self, readers: Executor) -> list[jax.Array]:
        """The host makes each device's shard; a CPU device uses that memory, others copy it."""
        buffers = [
            {cut: _aligned([stop - start for start, stop in cut], where.dtype) for cut in shards.values()}
            for shards, where in zip(self.shards, self.wanted)
        ]

        def fill(part: Part) -> None:
            _, layer = part
            arrays = {cut: self._ours(array) for cut, array in self._read(part).items()}
            filled = set()
            for device, piece in zip(self.devices, self.pieces):
                for k, (array, start) in enumerate(zip(arrays[piece.cut], piece.starts)):
                    cut = self.shards[k][device]
                    block = ... if layer is None else layer - cut[0][0]
                    if (k, cut) not in filled and (block is ... or 0 <= block < cut[0][1] - cut[0][0]):
                        target = buffers[k][cut][block]
                        _copy(target, array[tuple(slice(first, first + n) for first, n in zip(start, target.shape))])
                        filled.add((k, cut))

        for _ in ahead(readers, fill, self.parts, _AHEAD):
            pass
        return self._assembled(
            [
                [
                    jax.device_put(
                        arrays[shards[device]], SingleDeviceSharding(device, memory_kind=where.sharding.memory_kind)
                    )
                    for device in self.devices
                ]
                for arrays, shards, where in zip(buffers, self.shards, self.wanted)
            ]
        )

    def _ours(self, theirs: np.ndarray) -> list[np.ndarray]:
        """Their tensor (or a cut of it) as ours: a view, or codes and scale."""
        ours = theirs.transpose(self.axes)
        ours = ours.reshape(ours.shape[ours.ndim - len(self.shape) :])
        if self.kind is None:
            return [ours]
        whole = None if self.scale_a_channel else quantization.largest_of(ours, self.kind)
        columns = [
            quantization.quantize(ours[..., first : first + _BLOCK], self.kind, whole)
            for first in range(0, ours.shape[-1], _BLOCK)
        ]
        codes, scales = zip(*columns)
        return [np.concatenate(codes, axis=-1), np.concatenate(scales, axis=-1) if whole is None else scales[0]]

    def streamed(self, readers: Executor) -> list[jax.Array]:
        """The devices make their shards, from one tensor after another."""
        devices, depth = self.devices, len(self.parts)
        mesh = Mesh(np.array(devices), ("device",))  # of this host alone: no other process takes part
        split, replicated = NamedSharding(mesh, P("device")), NamedSharding(mesh, P())
        plan = _Plan(
            self.axes,
            len(self.shape),
            self.kind,
            tuple(
                (tuple(where.sharding.shard_shape(where.shape))[self.stacked :], jnp.dtype(where.dtype).name)
                for where in self.wanted
            ),
        )
        make, fill = _compiled(mesh, plan)
        starts = [
            jax.device_put(np.array(each, np.int32), split) for each in zip(*(piece.starts for piece in self.pieces))
        ]
        filled = (
            [jnp.zeros((len(devices) * depth, *shape), dtype, device=split) for shape, dtype in plan.outputs]
            if self.stacked
            else []
        )
        for block, tensors in enumerate(ahead(readers, self._read, self.parts, _AHEAD)):
            moved = [jax.device_put(tensors[piece.cut], device) for piece, device in zip(self.pieces, devices)]
            shape = (len(devices) * moved[0].shape[0], *moved[0].shape[1:])
            tensor = jax.make_array_from_single_device_arrays(shape, split, moved)
            filled = (
                fill(filled, tensor, starts, jax.device_put(np.int32(block), replicated))
                if self.stacked
                else make(tensor, starts)
            )
            jax.block_until_ready(filled)  # or the host would hold all that waits to be moved
        return self._assembled(
            [
                [next(shard.data for shard in array.addressable_shards if shard.device == device) for device in devices]
                for array in filled
            ]
        )


class _Plan(NamedTuple):
    """What a device does with a tensor: transpose by `axes` to `ndim` axes, then quantise as `kind` and cut, or cast;
    outputs: (shape, dtype) of a device's part of a block."""

    axes: tuple[int, ...]
    ndim: int
    kind: str | None
    outputs: tuple[tuple[tuple[int, ...], str], ...]


@functools.lru_cache(maxsize=256)
def _compiled(mesh: Mesh, plan: _Plan):
    """(tensor, starts -> arrays), and (stacks, tensor, starts, block -> stacks, filled in place), on each device."""

    def make(tensor: jax.Array, starts: list[jax.Array]) -> list[jax.Array]:
        ours = tensor.transpose(plan.axes)
        ours = ours.reshape(ours.shape[ours.ndim - plan.ndim :])
        arrays = [ours] if plan.kind is None else quantization.quantize(ours, plan.kind)
        return [
            jax.lax.dynamic_slice(array, list(start[0]), shape).astype(dtype)
            for array, start, (shape, dtype) in zip(arrays, starts, plan.outputs)
        ]

    def fill(stacks: list[jax.Array], tensor: jax.Array, starts: list[jax.Array], block: jax.Array) -> list[jax.Array]:
        return [
            jax.lax.dynamic_update_index_in_dim(stack, array, block, 0)
            for stack, array in zip(stacks, make(tensor, starts))
        ]

    local = P("device")
    return (
        jax.jit(jax.shard_map(make, mesh=mesh, in_specs=(local, local), out_specs=local)),
        jax.jit(jax.shard_map(fill, mesh=mesh, in_specs=(local, local, local, P()), out_specs=local), donate_argnums=0),
    )


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes as it is; others it copies."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, four times as fast where source is transposed."""
    if target.dtype == source.dtype:
        bits = np.dtype(f"u{target.itemsize}")  # numpy moves its own dtypes faster
        target, source = target.view(bits), source.view(bits)
    for first in range(0, target.shape[-1], _BLOCK):
        target[..., first : first + _BLOCK] = source[..., first : first + _BLOCK]
