"""The router's external queries against the published code's (golden data)."""

import jax
import numpy as np
import pytest
from golden import golden_dir

from lorweb_jax.common.errors import UserError
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.encoder import load_image_encoder

TOLERANCE = 1e-5
PATCH_MODES = [name for name, mode in queries.QUERY_MODES.items() if mode.depths]


def relative(ours, theirs) -> float:
    """Largest absolute error over the largest absolute value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def encoder():
    return load_image_encoder(golden_dir() / "tiny_pipeline" / "clip_vision")


@pytest.fixture(scope="module")
def golden():
    with np.load(golden_dir() / "external_query.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", [name for name in queries.QUERY_MODES if name not in PATCH_MODES])
def test_square_grids_equal_the_published_queries(encoder, golden, name):
    published = "aa'bb'" if name == "caa'bb'" else name  # two names of one mode
    expected = golden[f"sq/pil/{published}"].reshape(1, -1)
    ours = encoder.query(name, [golden["sq/image"]])
    assert ours.shape == (1, encoder.query_dim(name))
    assert relative(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("name", PATCH_MODES)
def test_patch_tokens_equal_the_published_ones_and_are_averaged(encoder, golden, name):
    pixels = encoder.processor.normalised(queries.views(name, [golden["sq/image"]], encoder.processor))
    tokens = np.asarray(jax.jit(queries.patch_tokens, static_argnums=0)(name, encoder.model, pixels))
    assert relative(tokens.reshape(1, -1, tokens.shape[-1]), golden[f"sq/pil/{name}"]) <= TOLERANCE
    ours = encoder.query(name, [golden["sq/image"]])
    assert ours.shape == (1, encoder.query_dim(name))
    assert relative(ours, tokens.mean(3).reshape(1, -1)) <= TOLERANCE


def test_wide_grids_are_cut_at_half_their_width_and_height(encoder, golden):
    grid = golden["wide/image"]
    assert relative(encoder.query("aa'bb'", [grid]), golden["wide/pil/aa'bb'"].reshape(1, -1)) <= TOLERANCE
    a, a2, b = encoder.embed([grid[:40, :60], grid[:40, 60:], grid[40:, :60]])
    assert relative(encoder.query("cat-aa'b", [grid])[0], np.concatenate([a, a2, b])) <= TOLERANCE
    assert relative(encoder.query("ca'-ca+cb", [grid])[0], a2 - a + b) <= TOLERANCE
    assert relative(encoder.query("caa'", [grid])[0], encoder.embed([grid[:40]])[0]) <= TOLERANCE


def test_batches_of_different_sizes(encoder, golden):
    grids = [golden["sq/image"], golden["wide/image"]]
    together = encoder.query("cat-aa'b", grids)
    apart = np.concatenate([encoder.query("cat-aa'b", [grid]) for grid in grids])
    assert relative(together, apart) <= TOLERANCE


def test_shallow_encoders_give_first_middle_and_last_state():
    class Shallow:
        embedding_width, patch_width = 5, 2

        def hidden_states(self, pixels):
            return tuple(np.full((pixels.shape[0], 4, 2), layer, np.float32) for layer in range(7))

    pixels = np.zeros((1, 3, 8, 8, 3), np.float32)
    query = np.asarray(queries.query("cat-paa'b3", Shallow(), pixels))
    np.testing.assert_array_equal(query, [[0, 0, 3, 3, 6, 6] * 3])
    assert queries.query_dim("cat-paa'b3", Shallow()) == query.shape[1]


def test_unknown_mode_is_refused():
    with pytest.raises(UserError, match="cat-aa'b"):
        queries.query_mode("aab")
