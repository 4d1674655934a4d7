"""grid.npz and external_query.npz: the analogy grid, and what the image encoder says about it."""

from functools import cache, partial

import jax
import numpy as np

from lorweb_jax.images.grid import condition_grid, quadrants
from lorweb_jax.models.image_encoder import queries
from parity.folder import RecordedModels, Recording, groups
from parity.report import EXACT, OUTPUT, Absent, Comparison

_QUADRANTS = ("a", "atag", "b")
# Modes that show the encoder the whole grid: no cut, so nothing differs where the grid is not square.
_UNCUT = ("aa'bb'", "caa'bb'")
_CUT = "grids that aren't square are cut at half their width and half their height"


def deviation(mode: str, square: bool) -> str | None:
    """Why a mode's query of a grid is not the published one, if it isn't meant to be."""
    return None if square or mode in _UNCUT else _CUT


def check_grid(report: Comparison, name: str, data: Recording) -> None:
    """<set>/{a,atag,b} -> <set>/grid_max<long edge or None>, byte for byte."""
    for group, arrays in groups(data).items():
        for key, theirs in arrays.items():
            if key.startswith("grid_max") and all(part in arrays for part in _QUADRANTS):
                limit = None if key == "grid_maxNone" else int(key.removeprefix("grid_max"))
                images = [arrays[part] for part in _QUADRANTS]
                report.compare(f"{name} {group}/{key}", partial(condition_grid, *images, limit), theirs, EXACT)


class _Compiled:
    """An image encoder that is compiled once for each number of images, whatever the query mode."""

    def __init__(self, model):
        self._model = model

    def __call__(self, pixels):
        return _embed(self._model, pixels)

    def hidden_states(self, pixels):
        return _hidden_states(self._model, pixels)


@jax.jit
def _embed(model, pixels):
    return model(pixels)


@jax.jit
def _hidden_states(model, pixels):
    return model.hidden_states(pixels)


def check_external_query(report: Comparison, name: str, data: Recording, models: RecordedModels) -> None:
    """<set>/image -> <set>/pil/<mode>, <set>/tensor/<mode> and the pixel values of its quadrants."""
    try:
        models.part("clip_vision")
    except Absent as absent:
        report.skip(name, str(absent))
        return
    for group, arrays in groups(data).items():
        if "image" not in arrays:
            continue
        image = arrays["image"]
        square = image.shape[0] == image.shape[1]
        parts = dict(zip(_QUADRANTS, quadrants(image)))

        @cache
        def of_mode(mode, image=image):
            encoder = models.image_encoder
            compute = queries.query if queries.query_mode(mode).depths is None else queries.patch_tokens
            pixels = encoder.processor.normalised(queries.views(mode, [image], encoder.processor))
            return np.asarray(compute(mode, _Compiled(encoder.model), pixels))

        for key, theirs in arrays.items():
            line = f"{name} {group}/{key}"
            kind, _, mode = key.partition("/")
            if kind in ("pil", "tensor"):
                _check_query(report, line, mode, theirs, square, partial(of_mode, mode))
            elif not key.startswith(("pixel_values_", "crop_size_")):
                continue
            elif not square:
                report.deviates(line, _CUT)
            elif key.startswith("crop_size_"):
                part = parts[key.removeprefix("crop_size_")]
                report.compare(line, partial(lambda part: part.shape[1::-1], part), theirs, EXACT)
            else:
                part = parts[key.removeprefix("pixel_values_")]
                report.compare(
                    line,
                    partial(lambda part: models.image_encoder.processor([part]).transpose(0, 3, 1, 2), part),
                    theirs,
                    OUTPUT,
                )


def _check_query(report: Comparison, line: str, mode: str, theirs: np.ndarray, square: bool, ours) -> None:
    if mode not in queries.QUERY_MODES:
        report.skip(line, "a query mode that isn't known here")
    elif why := deviation(mode, square):
        report.deviates(line, why)
    elif queries.QUERY_MODES[mode].depths is None:
        report.compare(line, lambda: ours().reshape(theirs.shape), theirs, OUTPUT)
    else:
        report.compare(f"{line} patch tokens", lambda: ours().reshape(theirs.shape), theirs, OUTPUT)
        report.deviates(line, "our query is the mean over each view's and depth's tokens")
