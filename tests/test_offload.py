"""Blocks that lie in the host's memory and are streamed, against the same on the device: equal to the bit."""

from types import SimpleNamespace

import numpy as np
import pytest
from golden import golden_dir
from mesh_job import MeshJob, three_steps

from configs import pair as pair_config
from lorweb_jax import Pipeline, UserError
from lorweb_jax.files.state import flat_state
from lorweb_jax.nn import offload
from lorweb_jax.settings import config as configs
from lorweb_jax.training import state

FOLDER, BASIS = golden_dir() / "tiny_pipeline", golden_dir() / "basis_a.safetensors"
STACKS = ("transformer.transformer_blocks", "transformer.single_transformer_blocks")
ADAPTED = ("norm1.linear", "to_add_out", "s.norm.linear", "proj_mlp")


@pytest.fixture(scope="module")
def streamed():
    return Pipeline.load(FOLDER, offload="blocks", quantization="int8")


def in_host_memory(arrays):
    return {name for name, array in arrays.items() if array.sharding.memory_kind == "pinned_host"}


def kernels(arrays, stacks):
    """Names of the kernels of these stacks' blocks."""
    return {name for name in arrays if name.startswith(stacks) and name.rpartition(".")[2] == "kernel"}


def test_a_pipeline_streams_its_blocks(streamed, quick_compiles):
    """All kernels of the blocks of transformer and T5, and nothing else, are in the host's memory; the same picture."""
    arrays = flat_state(streamed.model)
    assert in_host_memory(arrays) == kernels(arrays, (*STACKS, "text_encoder_2.block"))
    assert sum(map(offload.is_offloaded, arrays.values())) == len(in_host_memory(arrays)) > 20
    plain = Pipeline.load(FOLDER, quantization="int8")
    assert not in_host_memory(flat_state(plain.model))
    one, other = (each.generate("put a frame around it", size=(64, 48), steps=2) for each in (plain, streamed))
    assert (one == other).all() and len(np.unique(one)) > 10


def test_what_is_refused(streamed):
    with pytest.raises(UserError, match="in the host's memory, where nothing is folded"):
        attached = streamed.attach(BASIS)
        attached.session(attached.mix(0), folded=True)
    with pytest.raises(UserError, match="offload is 'all'; give none or blocks"):
        Pipeline.load(FOLDER, offload="all")
    with pytest.raises(UserError, match="leave one of them out"):
        Pipeline.load(FOLDER, offload="blocks", unstacked=True)
    device = SimpleNamespace(device_kind="a toaster", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(UserError, match="a toaster offers the memory kinds device and no pinned_host"):
        offload.require(device)
    config = pair_config.get_config("smoke")
    config.offload = "blocks"
    with pytest.raises(UserError, match="config.remat is 'none'.*config.offload is blocks"):
        configs.check(config)
    config.remat = "full"
    configs.check(config)


def test_training_streams_its_blocks(monkeypatch, quick_compiles):
    """Three steps of a basis, beside some of the layers, so that less is compiled."""
    monkeypatch.setattr("mesh_job.ADAPTED", ADAPTED)
    sizes, places = {"data": 1, "fsdp": 1, "tensor": 1}, []
    on_device = three_steps(sizes, MeshJob("int8"))
    monkeypatch.setattr(MeshJob, "offloaded", STACKS)
    fill = state.frozen_weights
    monkeypatch.setattr("mesh_job.frozen_weights", lambda *args: places.append(fill(*args)) or places[-1])
    streamed = three_steps(sizes, MeshJob("int8"))
    [frozen] = places
    assert in_host_memory(frozen) == kernels(frozen, STACKS) != set()
    assert on_device.keys() == streamed.keys()
    assert all(np.array_equal(on_device[name], streamed[name]) for name in on_device)
