"""The base's training may start from weights that an earlier one left."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.state import flat_state, shapes
from lorweb_jax.main import read_config
from lorweb_jax.small_base.editor import Editor, editor_config
from lorweb_jax.small_base.jobs.transformer import read_editor, write_editor


def sizes(single_blocks: int):
    config = read_config("configs/base_transformer.py")
    config.transformer.update(
        num_layers=1, num_single_layers=single_blocks, attention_head_dim=8, axes_dims_rope=(4, 2, 2)
    )
    return editor_config(config, 30, 40)


def editor(config):
    return Editor(config, 1, rngs=nnx.Rngs(0))


def test_what_was_written_is_read(tmp_path):
    config = sizes(2)
    model = editor(config)
    write_editor(tmp_path, config, model)
    read = read_editor(tmp_path, config, shapes(lambda: editor(config)))
    written = flat_state(model)
    assert read.keys() == written.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(
            np.asarray(read[name], np.float32), jnp.asarray(array, jnp.float16).astype(jnp.float32)
        )


def test_weights_of_other_sizes_are_refused(tmp_path):
    write_editor(tmp_path, sizes(2), editor(sizes(2)))
    with pytest.raises(UserError, match="don't fit the config .*single_transformer_blocks"):
        read_editor(tmp_path, sizes(3), shapes(lambda: editor(sizes(3))))
