"""Checkpoints on disk: complete ones only, the latest few, damaged ones told."""

import gc
import shutil

import jax
import jax.numpy as jnp
import line_job
import numpy as np
import optax
import pytest

from lorweb_jax import config as configs
from lorweb_jax.errors import UserError
from lorweb_jax.training.checkpoints import Checkpoints, open_run, restore_trainables


def shapes_of(tree):
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree)


@pytest.fixture
def state():
    trainable = {"layers.transformer_blocks.attn.to_q.a": jnp.arange(6.0).reshape(2, 3),
                 "layers.transformer_blocks.attn.to_q.b": jnp.ones((3,), jnp.bfloat16)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    updates, opt_state = optimizer.update(trainable, optimizer.init(trainable), trainable)
    return trainable, opt_state


@pytest.fixture
def run(tmp_path, state):
    """A run folder with checkpoints of steps 1 to 5, of which 3, 4 and 5 are kept."""
    configs.save(line_job.get_config(), tmp_path / "config.json")
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(step, *state, data_state=b'{"position": 7}', log_state=[{"loss": 0.1 + 0.2}])
    checkpoints.finish()
    checkpoints.close()
    return tmp_path


def test_what_was_saved_comes_back_to_the_bit(run, state):
    checkpoints = Checkpoints(run)
    assert checkpoints.latest() == 5
    trainable, opt_state, data_state, log_state = checkpoints.restore(5, *(shapes_of(part) for part in state))
    assert jax.tree.structure((trainable, opt_state)) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, (trainable, opt_state), state)
    assert data_state == b'{"position": 7}' and log_state == [{"loss": 0.1 + 0.2}]


def test_the_latest_three_are_kept(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "4", "5"]
    assert restore_trainables(run, step=3)[0].keys() == restore_trainables(run)[0].keys()
    with pytest.raises(UserError, match=r"no checkpoint of step 2; it has \[3, 4, 5\]"):
        restore_trainables(run, step=2)


def test_a_half_written_checkpoint_is_never_picked_up(run):
    shutil.copytree(run / "checkpoints/5", run / "checkpoints/6.orbax-checkpoint-tmp")
    (run / "checkpoints/6.orbax-checkpoint-tmp/trainable/manifest.ocdbt").unlink()
    restore_trainables(run, step=5)
    with pytest.raises(UserError, match="no checkpoint of step 6"):
        restore_trainables(run, step=6)
    assert Checkpoints(run).latest() == 5


def test_a_damaged_checkpoint_is_told(run, state):
    for path in (run / "checkpoints/5/trainable").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoints/5 does not fit this model or is damaged"):
        Checkpoints(run).restore(5, *(shapes_of(part) for part in state))
    with pytest.raises(UserError, match="is damaged"):
        restore_trainables(run)


@pytest.mark.filterwarnings("ignore")  # tensorstore leaves the other reads of a failed restore unawaited
def test_a_checkpoint_of_another_size_is_told(run, state):
    trainable, opt_state = state
    wider = trainable | {"layers.transformer_blocks.attn.to_q.a": jnp.zeros((2, 4))}
    with pytest.raises(UserError, match="does not fit this model"):
        Checkpoints(run).restore(5, shapes_of(wider), shapes_of(opt_state))
    gc.collect()


def test_a_folder_without_checkpoints_takes_another_config(tmp_path):
    config = line_job.get_config()
    open_run(tmp_path, config)
    config.seed = 4
    open_run(tmp_path, config)
    assert configs.load(tmp_path / "config.json").seed == 4


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="name the folder of a training run"):
        restore_trainables(tmp_path)
    configs.save(line_job.get_config(), tmp_path / "config.json")
    with pytest.raises(UserError, match="no complete checkpoint"):
        restore_trainables(tmp_path)
