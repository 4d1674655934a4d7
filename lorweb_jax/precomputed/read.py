"""Text embeddings and queries read from disk instead of computed by the encoders."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError
from lorweb_jax.images.grid import quadrants
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.encoder import ImageEncoder, load_image_encoder
from lorweb_jax.precomputed.scope import Scope


class Precomputed:
    """Text embeddings and queries of a scope's captions and images."""

    def __init__(self, scope: Scope):
        """Raises UserError if there is nothing precomputed, if it belongs to other models, settings or data."""
        self.scope = scope
        self._text = scope.text_store()
        _require(
            self._text.folder,
            "captions",
            [repr(text) for text in scope.captions() if fingerprint.of_text(text) not in self._text],
        )
        self._images = None
        if not scope.queries_kept:
            self._images = scope.image_store()
            # Items hold the time of change too, which copies of the data may not share.
            settled = {item.rpartition(" ")[0] for item in self._images.settled}
            _require(self._images.folder, "image files", [name for name in scope.pairs() if name not in settled])

    def prompt(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """text [b, t, j] and pooled [b, p] of captions of the data."""
        keys = [fingerprint.of_text(text) for text in texts]
        if absent := [text for text, key in zip(texts, keys) if key not in self._text]:
            raise UserError(
                f"the caption {absent[0]!r} is not in {self._text.folder}, which has the captions of the "
                "data alone; use one of these"
            )
        return self._text.gather("text", keys), self._text.gather("pooled", keys)

    def batch_query(self, images: np.ndarray, tasks: Sequence[str]) -> np.ndarray | None:
        """Of a training batch: a, a', b uint8 [b, 3, h, w, 3] -> query float32 [b, q]; None if the step makes it.

        Raises UserError, which names the task, for an image that isn't known.
        """
        if self._images is None:
            return None
        query, absent = self._query(images)
        if query is None:
            raise UserError(
                f"an image of task {tasks[absent]} is not in {self._images.folder}: its file was changed, "
                "or is decoded differently on this machine; run `python -m lorweb_jax.precompute` here "
                "with another --config.precomputed"
            )
        return query

    def query(self, grids: Sequence[np.ndarray]) -> np.ndarray:
        """Of any condition grids uint8 [H, W, 3]: float32 [b, q]. Where an image isn't known, the encoder is asked."""
        if self._images is not None:
            query, _ = self._query([quadrants(grid)[:3] for grid in grids])
            if query is not None:
                return query
        return self.image_encoder.query(self.scope.basis.query_mode, list(grids))

    def _query(self, images) -> tuple[np.ndarray | None, int]:
        """(query, −1), or (None, the first analogy with an image that isn't known)."""
        keys = [[fingerprint.of_image(image) for image in analogy] for analogy in images]
        for number, analogy in enumerate(keys):
            if any(key not in self._images for key in analogy):
                return None, number
        embeddings_bve = np.stack([self._images.gather("embedding", analogy) for analogy in keys])
        return queries.compose(self.scope.basis.query_mode, embeddings_bve), -1

    @functools.cached_property
    def image_encoder(self) -> ImageEncoder | None:
        """The encoder itself, read when it is first asked for: scores of results need it, and sizes of their own."""
        return load_image_encoder(self.scope.folder.encoder_folder) if self.scope.folder.encoder_folder else None

    def release(self) -> None:
        """Drop the encoder, so that training has its memory back."""
        self.__dict__.pop("image_encoder", None)


def _require(folder: Path, what: str, absent: list[str]) -> None:
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent):,} of the data's {what}, {absent[0]} first; run "
            "`python -m lorweb_jax.precompute` with the same options, which adds them",
            2,
        )
