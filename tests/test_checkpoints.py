"""Checkpoints on disk: complete ones only, the latest few, damaged ones told."""

import gc
import shutil
import subprocess

import jax
import jax.numpy as jnp
import line_job
import numpy as np
import optax
import pytest

from lorweb_jax.common.errors import UserError
from lorweb_jax.runs import checksums
from lorweb_jax.runs.checkpoints import Checkpoints, restore_trainables
from lorweb_jax.settings import config as configs


def shapes_of(tree):
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree)


@pytest.fixture
def state():
    trainable = {
        "layers.transformer_blocks.attn.to_q.a": jnp.arange(6.0).reshape(2, 3),
        "layers.transformer_blocks.attn.to_q.b": jnp.ones((3,), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    updates, opt_state = optimizer.update(trainable, optimizer.init(trainable), trainable)
    return {"step": jnp.uint32(5), "trainable": trainable, "average": None, "optimizer": {"train": opt_state}}


@pytest.fixture
def run(tmp_path, state):
    """A run folder with checkpoints of steps 1 to 5, of which 3, 4 and 5 are kept."""
    configs.save(line_job.get_config(), tmp_path / "config.json")
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(step, state, data_state=b'{"position": 7}', log_state=[{"loss": 0.1 + 0.2}])
    checkpoints.finish()
    checkpoints.close()
    return tmp_path


def test_what_was_saved_comes_back_to_the_bit(run, state):
    checkpoints = Checkpoints(run)
    assert checkpoints.latest() == 5
    step, restored, data_state, log_state = checkpoints.restore_newest(shapes_of(state))
    assert step == 5
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert data_state == b'{"position": 7}' and log_state == [{"loss": 0.1 + 0.2}]


def test_the_latest_three_are_kept(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "4", "5"]
    assert restore_trainables(run, step=3)[0].keys() == restore_trainables(run)[0].keys()
    with pytest.raises(UserError, match=r"no checkpoint of step 2; it has \[3, 4, 5\]"):
        restore_trainables(run, step=2)


def test_a_half_written_checkpoint_is_never_picked_up(run):
    shutil.copytree(run / "checkpoints/5", run / "checkpoints/6.orbax-checkpoint-tmp")
    (run / "checkpoints/6.orbax-checkpoint-tmp/state/manifest.ocdbt").unlink()
    restore_trainables(run, step=5)
    with pytest.raises(UserError, match="no checkpoint of step 6"):
        restore_trainables(run, step=6)
    assert Checkpoints(run).latest() == 5


def files_of(run, step):
    return sorted(path for path in (run / "checkpoints" / str(step)).rglob("*") if path.is_file())


def test_a_checkpoint_lists_its_files_as_sha256sum_does(run):
    folder = run / "checkpoints/5"
    checked = subprocess.run(["sha256sum", "--check", "--strict", checksums.FILE], cwd=folder, capture_output=True)
    assert checked.returncode == 0
    listed = {line.split("  ")[1] for line in (folder / checksums.FILE).read_text().splitlines()}
    assert listed == {path.relative_to(folder).as_posix() for path in files_of(run, 5) if path.parent != folder}


def test_a_flipped_bit_anywhere_never_loads_as_other_weights(run, state, capsys):
    """In the middle and at the end of every file of the newest checkpoint, its checksums included: the one before is
    taken, in one line; or, where nothing is read from the place, the same state."""
    expected, damaged = [np.asarray(leaf) for leaf in jax.tree.leaves(state)], 0
    intact = shutil.copytree(run / "checkpoints/5", run / "intact")
    shapes = shapes_of(state)
    for number, file in enumerate(files_of(run, 5)):
        for place in {file.stat().st_size // 2, max(0, file.stat().st_size - 1)}:
            data = bytearray(file.read_bytes())
            data[place : place + 1] = [byte ^ (1 << number % 8) for byte in data[place : place + 1]]
            file.write_bytes(data)
            restored = Checkpoints(run).restore_newest(shapes)
            said = capsys.readouterr().out
            for leaf, value in zip(expected, jax.tree.leaves(restored.state), strict=True):
                np.testing.assert_array_equal(leaf, value)
            if restored.step == 4:
                damaged += 1
                assert said.count("\n") == 1 and "step 5 is damaged" in said and "goes on from step 4" in said
                assert (run / "checkpoints/5.damaged").is_dir() and Checkpoints(run).latest() == 4
            shutil.rmtree(run / "checkpoints/5", ignore_errors=True)
            shutil.rmtree(run / "checkpoints/5.damaged", ignore_errors=True)
            shutil.copytree(intact, run / "checkpoints/5")
    assert damaged >= 20


def test_without_checksums_what_can_not_be_read_is_passed_over_too(run, state, capsys):
    """As checkpoints of older revisions are, which the last complete one stands in for."""
    for step in (3, 4, 5):
        (run / "checkpoints" / str(step) / checksums.FILE).unlink()
    shutil.rmtree(run / "checkpoints/5/state/d")
    restored = Checkpoints(run).restore_newest(shapes_of(state))
    assert restored.step == 4 and "goes on from step 4" in capsys.readouterr().out
    np.testing.assert_array_equal(
        restored.state["trainable"]["layers.transformer_blocks.attn.to_q.a"],
        state["trainable"]["layers.transformer_blocks.attn.to_q.a"],
    )


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_told_and_the_one_before_given(run, capsys):
    intact = restore_trainables(run)[0]
    capsys.readouterr()
    flip(files_of(run, 5)[-1])  # the last one of the state
    held = restore_trainables(run)[0]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "checkpoints/5 is damaged" in said and "step 4 is taken" in said
    jax.tree.map(np.testing.assert_array_equal, held, intact)
    with pytest.raises(UserError, match="checkpoints/5 is damaged"):
        restore_trainables(run, step=5)


def test_when_all_are_damaged_nothing_is_renamed(run, state):
    for step in (3, 4, 5):
        flip(files_of(run, step)[-1])
    with pytest.raises(UserError, match="none of the checkpoints in .* can be restored: in that of step 5, "):
        Checkpoints(run).restore_newest(shapes_of(state))
    with pytest.raises(UserError, match="checkpoints/5 is damaged"):
        restore_trainables(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "4", "5"]


def test_a_run_goes_on_after_a_damaged_checkpoint_and_saves_its_step_again(run, state):
    flip(files_of(run, 5)[-1])
    checkpoints = Checkpoints(run)
    assert checkpoints.restore_newest(shapes_of(state)).step == 4
    checkpoints.save(5, state, data_state={}, log_state=[])
    checkpoints.close()
    assert Checkpoints(run).restore_newest(shapes_of(state)).data_state == {}


@pytest.mark.filterwarnings("ignore")  # tensorstore leaves the other reads of a failed restore unawaited
def test_a_checkpoint_of_another_size_is_told(run, state):
    wider = state["trainable"] | {"layers.transformer_blocks.attn.to_q.a": jnp.zeros((2, 4))}
    with pytest.raises(UserError, match="does not fit this model"):
        Checkpoints(run).restore_newest(shapes_of(state | {"trainable": wider}))
    gc.collect()


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="name the folder of a training run"):
        restore_trainables(tmp_path)
    configs.save(line_job.get_config(), tmp_path / "config.json")
    with pytest.raises(UserError, match="no complete checkpoint"):
        restore_trainables(tmp_path)
