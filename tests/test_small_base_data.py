"""What the small base is trained on: batches drawn from a key, their captions, and that held-out drawings stay out."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lorweb_jax.data.embedded.drawing_sets import PHOTOGRAPH, SETS, DrawingSets
from lorweb_jax.data.embedded.operations import LAST_ONLY, OPERATIONS, STYLES
from lorweb_jax.small_base.captions import Captions
from lorweb_jax.small_base.corpus import SPATIAL, draw_batch, draw_canvases, draw_edits, look_up, make_corpus, spread

SIGNS, PHOTOGRAPHS, N = 20, 6, 400
SHARES = SimpleNamespace(
    spatial=0.3,
    style=0.4,
    last_only=0.5,
    edited_before=0.5,
    twice=0.5,
    vague=0.2,
    silent=0.1,
    caption_drop=0.1,
    condition_drop=0.3,
)


@pytest.fixture(scope="module")
def drawings():
    styles = len(SETS) - 1
    total = styles * SIGNS + PHOTOGRAPHS
    set_of = np.concatenate([np.repeat(np.arange(styles), SIGNS), np.full(PHOTOGRAPHS, PHOTOGRAPH)])
    sign = np.arange(total) % SIGNS
    twins = np.where(
        (set_of == PHOTOGRAPH)[:, None] | (np.arange(len(SETS)) == PHOTOGRAPH),
        -1,
        sign[:, None] + SIGNS * np.arange(len(SETS)),
    )
    columns = [["thing"] * total, [str(i) for i in sign], [""] * total, ["face-"] * total]
    return DrawingSets(np.zeros((total, 8, 8, 4), np.uint8), *columns, set_of, sign < 4, twins)


@pytest.fixture(scope="module")
def captions(drawings):
    return Captions([drawings.captions(i) for i in range(len(drawings))])


@pytest.fixture(scope="module", params=[False, True])
def corpus(request, drawings, captions):
    return make_corpus(drawings, captions, 2, held_out=request.param), request.param


def drawn(corpus, k, **shares):
    shares = SimpleNamespace(**vars(SHARES) | shares)
    return jax.device_get(jax.jit(lambda key: draw_edits(key, corpus, N, k, shares))(jax.random.key(3)))


def drawn_batch(corpus, groups):
    forms = SimpleNamespace(canvas=3, single=4, drawing=3, large=2)
    return jax.jit(lambda key: draw_batch(key, corpus, groups, forms, SHARES))(jax.random.key(0))


@pytest.mark.parametrize("k", [1, 4])
def test_an_instruction_says_what_becomes_of_the_drawings(corpus, drawings, captions, k):
    """Every wording belongs to exactly one edit; it is carried out on all drawings or on the last, others stay."""
    corpus, _ = corpus
    edits, total = drawn(corpus, k), len(drawings)
    told = {
        sentence: edit
        for edit in (*OPERATIONS.values(), *STYLES.values())
        for sentence in (edit.instruction, *edit.specific)
    }
    ending = LAST_ONLY.format("")
    counted = dict.fromkeys(("all", "last", "style", "operation"), 0)
    for i, row in enumerate(edits.caption):
        if row == 0:
            continue
        text = captions.texts[row]
        last = text.endswith(ending)
        edit = told[text.removesuffix(ending)]
        changed = [k - 1] if last else range(k)
        counted["last" if last else "all"] += 1
        for j in range(k):
            before = edits.before.drawing[i, j], edits.before.operation[i, j]
            after = edits.after.drawing[i, j], edits.after.operation[i, j]
            if j not in changed:
                assert before == after
            elif edit in STYLES.values():
                counted["style"] += 1
                style = SETS.index(
                    next(name for name in STYLES if drawings.set_of[after[0] % total] == SETS.index(name))
                )
                assert after == (drawings.twins[before[0] % total, style] + before[0] // total * total, 0)
                assert edit.instruction != text.removesuffix(ending) or drawings.set_of[before[0] % total] != style
                if text.removesuffix(ending) in edit.specific:
                    assert edit is STYLES[SETS[style]]
            else:
                counted["operation"] += 1
                assert before[0] == after[0] and before[1] == 0
                # A family's plain sentence leaves open which of its operations it is.
                assert list(OPERATIONS.values())[after[1] - 1].family == edit.family
                if text.removesuffix(ending) in edit.specific:
                    assert list(OPERATIONS)[after[1] - 1] == edit.name
    assert min(counted.values()) > 0 or k == 1 and counted["last"] == 0


def test_only_training_drawings_or_only_held_out_ones(corpus, drawings, captions):
    corpus, held_out = corpus
    batch = jax.device_get(drawn_batch(corpus, 40))
    drawing, edits, _, _ = batch.large
    canvas, _ = jax.device_get(draw_canvases(jax.random.key(1), corpus, 50, 0.3, 0.2))
    pictures = [
        part for each in (batch.canvas, batch.single, batch.drawing, edits) for part in (each.before, each.after)
    ]
    for found in (drawing, canvas.drawing, *(picture.drawing for picture in pictures)):
        assert (drawings.held_out[found % len(drawings)] == held_out).all()
    for picture in pictures:  # what needs a shape is not done to photographs
        on_photograph = drawings.set_of[picture.drawing % len(drawings)] == PHOTOGRAPH
        assert not (on_photograph & corpus.needs_shape[picture.operation]).any()
    assert (drawings.set_of[batch.canvas.before.drawing % len(drawings)] == PHOTOGRAPH).any()


def test_shares(corpus):
    """Empty captions, captions of drawings and what is dropped, within four deviations of their shares."""
    corpus, _ = corpus
    edits = drawn(corpus, 4, silent=0.0, caption_drop=0.25, style=0.0, last_only=1.0, twice=1.0)
    assert abs((edits.caption == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / N)
    assert (edits.before.drawing[:, 2] == edits.before.drawing[:, 3]).all() and not edits.before.operation[:, 2:].any()
    silent = drawn(corpus, 4, silent=1.0)
    assert not silent.caption.any() and (silent.before.drawing == silent.after.drawing).all()
    assert (silent.before.operation == silent.after.operation).all()


def test_latents_are_those_of_what_was_drawn(corpus, drawings, captions):
    """The table holds each quadrant's own numbers; a canvas has them in raster order."""
    corpus, _ = corpus
    total, operations = 2 * len(drawings), 1 + len(OPERATIONS)
    number = np.arange(total * operations, dtype=np.float32).reshape(total, operations, 1, 1, 1)
    quadrants = np.broadcast_to(number, (total, operations, 2, 2, 3))
    large = np.broadcast_to(
        -1 - np.arange(len(drawings), dtype=np.float32)[:, None, None, None], (len(drawings), 4, 4, 3)
    )
    batch = drawn_batch(corpus, 5)
    found, again = look_up(jax.device_get(batch), quadrants, large), look_up(batch, quadrants, large)
    batch = jax.device_get(batch)
    assert {name: len(form["caption"]) for name, form in found.items()} == dict(
        canvas=15, single=20, drawing=15, large=10
    )
    for i, (drawing, operation) in enumerate(zip(batch.canvas.after.drawing, batch.canvas.after.operation)):
        four = drawing * operations + operation
        np.testing.assert_array_equal(found["canvas"]["latents"][i, ::2, ::2, 0], four.reshape(2, 2))
    np.testing.assert_array_equal(
        found["single"]["condition"][:, 0, 0, 0],
        batch.single.before.drawing[:, 0] * operations + batch.single.before.operation[:, 0],
    )
    drawing, edits, dropped, caption = batch.large
    shown = found["large"]["latents"][:, 0, 0, 0]
    np.testing.assert_array_equal(shown[~dropped], -1 - drawing[~dropped])
    assert dropped.any() and (shown[dropped] >= 0).all()
    titles = batch.drawing.caption[batch.drawing.after.operation[:, 0] == 0]
    assert any(captions.texts[row].startswith("a drawing of") for row in titles)
    for form in found:
        for name, array in found[form].items():
            np.testing.assert_array_equal(array, again[form][name])


@pytest.mark.parametrize("signs, kept", [(0, SIGNS), (6, 6 + 1), (13, 13 + 3), (99, SIGNS)])
def test_some_signs_in_all_sets_and_more_take_in_fewer(drawings, captions, signs, kept):
    """Training signs and a sixth as many held-out ones (of four), whole; batches show nothing else."""
    among = spread(drawings, signs)
    photographs = drawings.set_of == PHOTOGRAPH
    assert among[photographs].all() and among[~photographs].sum() == kept * (len(SETS) - 1)
    assert not (among & ~spread(drawings, signs + 1 if signs else 0)).any()
    corpus = make_corpus(drawings, captions, 2, among=among)
    edits = drawn(corpus, 4)
    for picture in (edits.before, edits.after):
        assert set(np.unique(picture.drawing % len(drawings))) <= set(np.flatnonzero(among & ~drawings.held_out))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_edits_moves_what_is_drawn(drawings, captions, share):
    corpus = make_corpus(drawings, captions, 1)
    edits = drawn(corpus, 1, spatial=share, style=0, silent=0)
    families = [list(OPERATIONS.values())[i - 1].family for i in edits.after.operation[:, 0]]
    of_all = np.mean([operation.family in SPATIAL for operation in OPERATIONS.values()])
    found = np.mean([family in SPATIAL for family in families])
    assert found == pytest.approx(share + (1 - share) * of_all, abs=0.08 if share < 1 else 0)
