"""Which drawings, edits and captions a batch shows: drawn by jax from a key, on whatever device it runs.

A batch is `groups` times a fixed mixture of four forms (FORMS): canvases of four drawings and single drawings that an
instruction edits, and text to image at a drawing's and at the canvas's size, which has no condition. The instruction
is carried out on all drawings of a canvas or, when it says so, on the last one alone. No canvas shows a drawing before
and after an edit: what a pair of images means is for the basis to learn.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.data.embedded.drawing_sets import SETS, DrawingSets
from lorweb_jax.data.embedded.operations import OPERATIONS, STYLES
from lorweb_jax.small_base.captions import Captions

# Colours are permuted and sides swapped, which the words for colours and sides don't mind: an instruction names the
# result's colour, never the drawing's.
VARIANTS = (lambda rgba: rgba, lambda rgba: rgba[..., :, ::-1, :][..., [1, 2, 0, 3]])
# Families that draw something where it was not before
SPATIAL = ("flip", "rotate", "shift", "size", "squash", "repeat", "mirror", "shadow")
PHOTOGRAPHS = 0.08  # their share of what is drawn; they are few


def some(drawings: DrawingSets, signs: int) -> DrawingSets:
    """A small subset: of the training and of the held-out part each, `signs` signs that exist in all styles, with their
    drawings in all of these, and `signs` photographs."""
    photographs = drawings.set_of == SETS.index("photograph")
    styles = [i for i, name in enumerate(SETS) if name != "photograph"]
    everywhere = (drawings.twins[:, styles] >= 0).all(1) & (drawings.set_of == styles[0])
    chosen = [
        np.flatnonzero(where & (drawings.held_out == part))[:signs]
        for where in (everywhere, photographs)
        for part in (False, True)
    ]
    return drawings.chosen(
        np.concatenate([drawings.twins[np.concatenate(chosen[:2])][:, styles].reshape(-1), *chosen[2:]])
    )


def spread(drawings: DrawingSets, signs: int) -> np.ndarray:
    """bool [D]: the drawings of `signs` training signs and a sixth as many held-out ones, of all groups, and all
    photographs; of all signs for 0. More signs take in those of fewer."""
    chosen = drawings.set_of == SETS.index("photograph")
    codes = np.array(drawings.codes)
    for held_out, count in ((False, signs), (True, -(-signs // 6))):
        there = np.unique(codes[(drawings.held_out == held_out) & (drawings.set_of != SETS.index("photograph"))])
        chosen |= np.isin(codes, np.random.default_rng(0).permutation(there)[: count or None])
    return chosen


class Corpus(NamedTuple):
    """Arrays that say what may be drawn. D drawings, V·D with their variants, which follow them; S styles.

    The drawings named are all training ones, or all held-out ones.
    """

    edited: Any  # int32 [·] drawings and variants to edit
    shaped: Any  # int32 [·] those of them that have a shape, i.e. aren't photographs
    shown: Any  # int32 [·] drawings for text to image
    members: Any  # int32 [S, ·] drawings and variants that have a twin in a style, `counts` of them
    counts: Any  # int32 [S]
    twins: Any  # int32 [V·D, S]
    photograph: Any  # bool [V·D]
    needs_shape: Any  # bool [1 + operations]; 0 is the plain drawing
    spatial: Any  # int32 [·] operations that move what is drawn, counted from 1
    caption_start: Any  # int32 [D] rows of the captions
    caption_count: Any  # int32 [D]


def make_corpus(
    drawings: DrawingSets, captions: Captions, variants: int, held_out: bool = False, among: np.ndarray | None = None
) -> Corpus:
    """The corpus of the held-out drawings or of the training ones; only of those in `among` (bool [D]), which holds
    a sign in all sets or in none."""
    total = len(drawings.names)
    chosen = np.flatnonzero((drawings.held_out == held_out) & (True if among is None else among))
    is_photograph = drawings.set_of == SETS.index("photograph")
    photographs, shaped = (chosen[is_photograph[chosen] == kind] for kind in (True, False))
    # As many copies of the photographs as give them their share.
    copies = round(PHOTOGRAPHS / (1 - PHOTOGRAPHS) * len(shaped) / max(1, len(photographs)))
    shown = np.concatenate([shaped, *[photographs] * max(1, copies)])

    def with_variants(indices):
        return np.concatenate([indices + total * v for v in range(variants)])

    styles = [SETS.index(name) for name in STYLES]
    twins = np.concatenate([np.where(drawings.twins >= 0, drawings.twins + total * v, -1) for v in range(variants)])
    twins = twins[:, styles]
    sets = np.tile(drawings.set_of, variants)
    every = with_variants(chosen)
    members = [every[(twins[every, s] >= 0) & (sets[every] != style)] for s, style in enumerate(styles)]
    counts = np.array([len(part) for part in members])
    if not counts.all():
        raise ValueError(f"no drawing has a twin in {list(STYLES)[int(counts.argmin())]}")
    padded = np.stack([np.resize(part, counts.max()) for part in members])
    return Corpus(
        edited=with_variants(shown).astype(np.int32),
        shaped=with_variants(shaped).astype(np.int32),
        shown=shown.astype(np.int32),
        members=padded.astype(np.int32),
        counts=counts.astype(np.int32),
        twins=twins.astype(np.int32),
        photograph=np.tile(is_photograph, variants),
        needs_shape=np.array([False, *(operation.needs_shape for operation in OPERATIONS.values())]),
        spatial=np.array(
            [i for i, operation in enumerate(OPERATIONS.values(), 1) if operation.family in SPATIAL], np.int32
        ),
        caption_start=captions.start,
        caption_count=captions.count,
    )


class Picture(NamedTuple):
    """Which quadrants the images of n examples consist of: int32 [n, k] each, k = 4 for a canvas, 1 for one drawing."""

    drawing: Any
    operation: Any


class Edits(NamedTuple):
    before: Picture
    after: Picture
    caption: Any  # int32 [n], a row of the captions


class Draws:
    """Independent random numbers for n examples, all from one call, since each call takes long to compile."""

    def __init__(self, key: jax.Array, n: int, most: int):
        self.n, self.uniform, self.used = n, jax.random.uniform(key, (n, most)), 0

    def _next(self, k: int | None) -> jax.Array:
        start, self.used = self.used, self.used + (k or 1)
        assert self.used <= self.uniform.shape[1]
        part = self.uniform[:, start : self.used]
        return part if k else part[:, 0]

    def happens(self, share, k: int | None = None) -> jax.Array:
        """bool [n] or [n, k], each true with the given probability."""
        return self._next(k) < share

    def below(self, count, k: int | None = None) -> jax.Array:
        """int32 [n] or [n, k] in 0 … count − 1."""
        return jnp.minimum((self._next(k) * count).astype(jnp.int32), count - 1)

    def one_of(self, values, k: int | None = None) -> jax.Array:
        return jnp.asarray(values)[self.below(len(values), k)]


def draw_edits(key: jax.Array, corpus: Corpus, n: int, k: int, shares) -> Edits:
    """n canvases of k = 4 drawings, or k = 1, before and after an edit. `shares`: see configs/base_transformer.py."""
    draws = Draws(key, n, 11 + 5 * k)
    operations = len(corpus.needs_shape) - 1
    needs_shape, photograph = jnp.asarray(corpus.needs_shape), jnp.asarray(corpus.photograph)
    wanted = jnp.where(draws.happens(shares.spatial), draws.one_of(corpus.spatial), 1 + draws.below(operations))
    restyled, style = draws.happens(shares.style), draws.below(len(corpus.counts))
    member = jnp.asarray(corpus.members)[style[:, None], draws.below(jnp.asarray(corpus.counts)[style][:, None], k)]
    drawing = jnp.where(
        restyled[:, None],
        member,
        jnp.where(needs_shape[wanted][:, None], draws.one_of(corpus.shaped, k), draws.one_of(corpus.edited, k)),
    )
    last_only = draws.happens(shares.last_only) & (k > 1)
    last = jnp.arange(k) == k - 1

    # A canvas of which only the last drawing changes may show the others edited in any way, and the last twice.
    before = 1 + draws.below(operations, k)
    before = jnp.where(needs_shape[before] & photograph[drawing], 0, before)
    before = jnp.where(last_only[:, None] & ~last & draws.happens(shares.edited_before, k), before, 0)
    if k > 1:
        twice = last_only & draws.happens(shares.twice)
        drawing = drawing.at[:, k - 2].set(jnp.where(twice, drawing[:, k - 1], drawing[:, k - 2]))
        before = before.at[:, k - 2].set(jnp.where(twice, 0, before[:, k - 2]))

    silent = draws.happens(shares.silent)  # an empty instruction changes nothing
    changes = (last | ~last_only[:, None]) & ~silent[:, None]
    twin = jnp.asarray(corpus.twins)[drawing, style[:, None]]
    after = Picture(
        jnp.where(changes & restyled[:, None], twin, drawing),
        jnp.where(changes & ~restyled[:, None], wanted[:, None], before),
    )
    wording = jnp.where(draws.happens(shares.vague), 0, 1 + draws.below(2))
    caption = jnp.where(
        restyled, Captions.of_style(style, last_only, wording), Captions.of_operation(wanted, last_only, wording)
    )
    # Dropped captions, for guidance without a classifier.
    caption = jnp.where(silent | draws.happens(shares.caption_drop), 0, caption)
    return Edits(Picture(drawing, before), after, caption.astype(jnp.int32))


def draw_titles(key: jax.Array, corpus: Corpus, n: int, shares) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(drawing [n], caption [n], bool [n]: show an edit's result in its place) for text to image."""
    draws = Draws(key, n, 4)
    drawing = draws.one_of(corpus.shown)
    wording = draws.below(jnp.asarray(corpus.caption_count)[drawing])
    caption = jnp.where(draws.happens(shares.caption_drop), 0, jnp.asarray(corpus.caption_start)[drawing] + wording)
    return drawing, caption, draws.happens(shares.condition_drop)


def draw_canvases(key: jax.Array, corpus: Corpus, n: int, plain: float, enlarged: float) -> tuple[Picture, jax.Array]:
    """For the autoencoder: quadrants of n canvases, a share `plain` of them without operation; and bool [n], a share
    `enlarged`: those show the first drawing alone, at the canvas's size."""
    draws = Draws(key, n, 13)
    drawing, operation = draws.one_of(corpus.edited, 4), 1 + draws.below(len(corpus.needs_shape) - 1, 4)
    enlarge = draws.happens(enlarged)
    return Picture(drawing, jnp.where(draws.happens(plain, 4) | enlarge[:, None], 0, operation)), enlarge


class Batch(NamedTuple):
    """What a batch shows, by form, before any latents are looked up."""

    canvas: Edits  # canvases of four drawings
    single: Edits  # one drawing each
    drawing: Edits  # text to image at a drawing's size: `before` is not shown
    large: tuple  # at the canvas's size: (drawing, Edits, bool: show these four in place of the drawing, caption)


def draw_batch(key: jax.Array, corpus: Corpus, groups: int, forms, shares) -> Batch:
    """`groups` times forms.canvas, .single, .drawing and .large examples."""
    keys = jax.random.split(key, 6)

    n = groups * forms.drawing
    drawing, caption, dropped = draw_titles(keys[2], corpus, n, shares)
    edits = draw_edits(keys[3], corpus, n, 1, shares)
    shown = Picture(
        *(jnp.where(dropped[:, None], edited, plain) for edited, plain in zip(edits.after, (drawing[:, None], 0)))
    )
    titled = Edits(shown, shown, jnp.where(dropped, edits.caption, caption))

    n = groups * forms.large
    drawing, caption, dropped = draw_titles(keys[4], corpus, n, shares)
    edits = draw_edits(keys[5], corpus, n, 4, shares)
    large = (drawing, edits, dropped, jnp.where(dropped, edits.caption, caption))
    return Batch(
        draw_edits(keys[0], corpus, groups * forms.canvas, 4, shares),
        draw_edits(keys[1], corpus, groups * forms.single, 1, shares),
        titled,
        large,
    )


def canvas_of(quadrants):
    """[n, 4, h, w, c] -> [n, 2h, 2w, c], raster order; [n, 1, h, w, c] -> [n, h, w, c]. numpy or jax."""
    n, k, h, w, c = quadrants.shape
    if k == 1:
        return quadrants[:, 0]
    return quadrants.reshape(n, 2, 2, h, w, c).swapaxes(2, 3).reshape(n, 2 * h, 2 * w, c)


def look_up(batch: Batch, quadrants, large) -> dict[str, dict[str, Any]]:
    """{form: {"latents": [n, side, side, c], "condition" (edits alone), "caption" [n]}}.

    quadrants [V·D, 1 + operations, h, w, c] and large [D, 2h, 2w, c] are tables of latents, float16; index arrays and
    tables are both numpy's or both jax's.
    """

    def image(picture):
        return canvas_of(quadrants[picture.drawing, picture.operation])

    forms = {
        name: {"latents": image(edits.after), "condition": image(edits.before), "caption": edits.caption}
        for name, edits in (("canvas", batch.canvas), ("single", batch.single))
    }
    forms["drawing"] = {"latents": image(batch.drawing.after), "caption": batch.drawing.caption}
    drawing, edits, dropped, caption = batch.large
    where = np.where if isinstance(dropped, np.ndarray) else jnp.where
    forms["large"] = {
        "latents": where(dropped[:, None, None, None], image(edits.after), large[drawing]),
        "caption": caption,
    }
    return forms
