"""An edit session: a pipeline with one mix of its basis in place, folded once for as many images as it makes.

with pipeline.session(pipeline.coefficients(a, a2, b)) as session:
    for picture in pictures:
        write_image(…, session.edit(a, a2, picture, prompt="put a frame around it"))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.fold import fold, layers_at
from lorweb_jax.adapters.mixture import added
from lorweb_jax.common.errors import UserError
from lorweb_jax.images.fit import STRETCH
from lorweb_jax.nn.layers import Adapter
from lorweb_jax.pipeline import devices
from lorweb_jax.pipeline.arguments import Images
from lorweb_jax.pipeline.request import Request, edit_request, generation_request
from lorweb_jax.pipeline.sampling import Rows, Text, make_images
from lorweb_jax.pipeline.stages import stages, texts
from lorweb_jax.pipeline.styles import SIDE_DEFAULT, Style, Styles, with_defaults

if TYPE_CHECKING:
    from lorweb_jax.pipeline.pipeline import Pipeline


class Session:
    """Made by `Pipeline.session`. Images are uint8 [H, W, 3]; what `**sampling` takes stands in `Sampling`.

    A folded session holds weights beside the pipeline's: those kernels of the transformer that the basis adapts (23.7
    GB of FLUX.1 Kontext's 23.8 in bfloat16); all else is shared. Every step then costs what the base costs. A session
    that isn't folded holds the coefficients alone. Styles are always beside the weights: guidance asks for the base at
    every step. `close`, or the end of a `with` block, frees the weights at once; `nbytes` is their size.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        basis: Basis | None,
        coefficients: dict[str, jax.Array] | None,
        folded: bool,
        styles: Sequence[Style] = (),
    ):
        """basis: None for the base alone. coefficients: {path: c [l, b, n]} of each row of a batch, or of all rows
        where b is 1; None where the layers' own inputs choose them. folded: b must be 1. styles: what guides."""
        self._pipeline, self._basis, self._coefficients = pipeline, basis, coefficients
        mesh = devices.mesh_of(pipeline.model.transformer)
        self._styles = Styles(styles, pipeline.folder.backbone.adapted, mesh) if styles else None
        self._model, self._own = pipeline.model, ()
        if folded:
            transformer = fold(pipeline.model.transformer, basis.adapters(coefficients))
            self._own = tuple(layer.kernel[...] for path in coefficients for layer in layers_at(transformer, path))
            self._model, self._basis = pipeline.model.replace(transformer=transformer), None

    def edit(
        self,
        a: np.ndarray,
        a2: np.ndarray,
        b: np.ndarray,
        prompt: str = "",
        *,
        max_size: int | None = None,
        fit: str = STRETCH,
        **sampling,
    ) -> np.ndarray:
        """b′ by this session's mix; as `Pipeline.edit`, which lets a, a2 and b choose the mix."""
        return self.edit_batch([(a, a2, b)], [prompt], max_size=max_size, fit=fit, **sampling)[0]

    def edit_batch(
        self,
        conditions: Sequence[Images],
        prompts: Sequence[str],
        *,
        max_size: int | None = None,
        fit: str = STRETCH,
        **sampling,
    ) -> list[np.ndarray]:
        """b′ of several analogies (a, a′, b) at once, all by this session's mix; as `Pipeline.edit_batch`."""
        _, request = edit_request(
            self._pipeline.folder, conditions, prompts, with_defaults(sampling, self._styles), max_size, fit
        )
        return self.edited(request)

    def generate(
        self,
        prompt: str,
        image: np.ndarray | Sequence[np.ndarray] | None = None,
        *,
        size: tuple[int, int] | None = None,
        max_size: int | None = None,
        **sampling,
    ) -> np.ndarray:
        """One image from a text, or from a text and reference images; as `Pipeline.generate`."""
        images = None if image is None else [image]
        return self.generate_batch([prompt], images, size=size, max_size=max_size, **sampling)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[np.ndarray | Sequence[np.ndarray]] | None = None,
        *,
        size: tuple[int, int] | None = None,
        max_size: int | None = None,
        **sampling,
    ) -> list[np.ndarray]:
        """One image for each prompt; as `Pipeline.generate_batch`."""
        if self._styles and images is None and max_size is None:
            max_size = SIDE_DEFAULT
        sampling = with_defaults(sampling, self._styles)
        request = generation_request(self._pipeline.folder, prompts, images, sampling, size, max_size)
        return self.generated(request)

    def edited(self, request: Request) -> list[np.ndarray]:
        """b′ of the analogies of an edit_request."""
        cut = self._pipeline.folder.backbone.references.result

        def results(images: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [place.back(cut(image)) for place, image in zip(request.places, images)]

        shown = request
        if preview := request.sampling.preview:
            sampling = dataclasses.replace(
                request.sampling, preview=lambda step, images: preview(step, results(images))
            )
            shown = dataclasses.replace(request, sampling=sampling)
        return results(self._images(shown))

    def generated(self, request: Request) -> list[np.ndarray]:
        """The images of a generation_request."""
        if self._basis is not None and self._coefficients is None:
            raise UserError(
                "the basis takes its coefficients from an analogy's condition grid, which this has none of; edit an "
                "analogy, or use a pipeline without a basis"
            )
        return list(self._images(request))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that this session holds beside the pipeline's."""
        return sum(leaf.nbytes for leaf in self._own)

    def close(self) -> None:
        """Free the folded weights now. The session makes no images any more."""
        for leaf in self._own:
            leaf.delete()
        self._model, self._basis, self._own = None, None, ()

    def __enter__(self) -> Session:
        self._require_open()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._model is None:
            raise UserError("the session is closed; open another one with the pipeline's `session`")

    def _images(self, request: Request) -> np.ndarray:
        self._require_open()
        strengths, words = [], []
        if self._styles:
            strengths, words = request.sampling.strengths or self._styles.strengths, self._styles.words
            if len(strengths) != len(words):
                raise UserError(f"{len(strengths)} strengths were given for {len(words)} styles; give one for each", 2)
        batch, sections = len(request.prompts), stages(request.sampling, strengths)
        shown = list(dict.fromkeys(each for stage in sections for each in stage.passes))
        text = self._pipeline.prompt([line for each in shown for line in texts(request, words, each)])
        rows = [
            Rows(
                stage,
                _rows_of(text, [shown.index(each) for each in stage.passes], batch),
                added(self._adapters(len(stage.passes)), self._styles and self._styles.adapters(stage.passes, batch)),
            )
            for stage in sections
        ]
        return make_images(self._model, self._pipeline.folder.schedule, request, text, rows)

    def _adapters(self, passes: int) -> dict[str, Adapter] | None:
        """What the basis has beside the weights, for the rows of so many passes."""
        if self._basis is None:
            return None
        if self._coefficients is None:
            return self._basis.adapters(None)
        return self._basis.adapters(
            {path: jnp.tile(c, (1, passes, 1)) if c.shape[1] > 1 else c for path, c in self._coefficients.items()}
        )


def _rows_of(text: Text, passes: Sequence[int], batch: int) -> Text:
    """The texts of these passes, of all that were encoded pass after pass."""
    places = np.concatenate([np.arange(number * batch, (number + 1) * batch) for number in passes])
    if len(places) == len(text[0]) and (places == np.arange(len(places))).all():
        return text
    return text[0][places], text[1][places]
