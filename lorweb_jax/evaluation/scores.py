"""Scores of images that a method made, each a function of samples and images: those that come with the package, and
those of a user's own file."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.evaluation import metrics
from lorweb_jax.evaluation.chat import Judge
from lorweb_jax.evaluation.lpips import features, lpips
from lorweb_jax.evaluation.samples import Sample, batches
from lorweb_jax.settings.rules import shown


class Embedder(Protocol):
    """models.image_encoder.encoder.ImageEncoder, or anything that embeds images."""

    def embed(self, images: list[np.ndarray]) -> np.ndarray: ...


@dataclass(frozen=True)
class Score:
    """A figure for each image that a method made.

    compute(samples, images) -> a number each, of uint8 images [h, w, 3] in the samples' sizes; where `needs_truth`, it
    is asked only about samples whose b2 is known. digits: after the point, in tables. lower: whether less is better.
    meaning: a sentence for reports. source: short hash of weights that it depends on; figures of different sources
    are not mixed.
    """

    name: str
    label: str
    compute: Callable[[Sequence[Sample], Sequence[np.ndarray]], Sequence[float] | np.ndarray]
    lower: bool = True
    needs_truth: bool = False
    digits: int = 3
    meaning: str = ""
    source: str = ""

    def __call__(self, samples: Sequence[Sample], images: Sequence[np.ndarray]) -> list[float | None]:
        """One value a sample; None where it needs a truth and there is none. UserError for what isn't one finite number
        a sample."""
        asked = [i for i, sample in enumerate(samples) if sample.b2 is not None or not self.needs_truth]
        values: list[float | None] = [None] * len(samples)
        if asked:
            given = self.compute([samples[i] for i in asked], [images[i] for i in asked])
            try:
                computed = np.array([float(x) for x in given])
            except (TypeError, ValueError):  # no sequence, or not of numbers
                computed = np.array([np.nan])
            if len(computed) != len(asked) or not np.isfinite(computed).all():
                raise UserError(
                    f"the score {self.name} gave {shown(given)} for {len(asked)} images; expected one finite number an "
                    "image: correct it or leave it out"
                )
            for i, value in zip(asked, computed.tolist()):
                values[i] = value
        return values

    def describe(self) -> dict:
        """What records keep of it, enough to make tables again."""
        return {
            "label": self.label,
            "lower": self.lower,
            "digits": self.digits,
            "meaning": self.meaning,
            "source": self.source,
        }


def pixel_scores() -> list[Score]:
    """MSE, PSNR and LPIPS to the truth, and LPIPS to b."""
    return [
        Score("mse", "MSE", _mse, needs_truth=True, digits=4, meaning="mean squared error of result and true b′, 0..1"),
        Score(
            "psnr",
            "PSNR",
            lambda samples, images: [metrics.psnr(error) for error in _mse(samples, images)],
            lower=False,
            needs_truth=True,
            digits=2,
            meaning="peak signal-to-noise ratio of result and true b′, dB",
        ),
        Score(
            "lpips",
            "LPIPS",
            lambda samples, images: distances(images, [sample.truth for sample in samples]),
            needs_truth=True,
            meaning="perceptual distance of result and true b′",
        ),
        Score(
            "lpips_b",
            "LPIPS(b, result)",
            lambda samples, images: distances(images, [sample.b for sample in samples]),
            meaning="how far from b: preservation, of which copying b has 0; read it beside a direction",
        ),
    ]


def embedding_scores(name: str, label: str, encoder: Embedder, source: str = "") -> list[Score]:
    """<name>_directional: the cosine of E(a′) − E(a) and E(result) − E(b); <name>_distance: 1 − cos(E(result), E(b′)).

    label: the encoder, in tables. source: a hash of its weights.
    """
    embed = _Embeddings(encoder)

    def directional(samples, images):
        a, a2, b = (embed.kept([getattr(sample, part) for sample in samples]) for part in ("a", "a2", "b"))
        return metrics.clip_directional(a2 - a, embed.results(images) - b)

    def distance(samples, images):
        cosines = metrics.clip_directional(embed.kept([sample.truth for sample in samples]), embed.results(images))
        return np.maximum(1 - cosines, 0)  # rounding takes equal images below

    return [
        Score(
            f"{name}_directional",
            f"{label}-dir",
            directional,
            lower=False,
            meaning=f"cosine of E(a′) − E(a) and E(result) − E(b), E by {label}: the edit's accuracy",
            source=source,
        ),
        Score(
            f"{name}_distance",
            f"{label} distance",
            distance,
            needs_truth=True,
            meaning=f"1 − cosine of the embeddings of result and true b′ by {label}",
            source=source,
        ),
    ]


class AlexNet:
    """An image as LPIPS's network sees it: each layer's features averaged over positions, at unit length, [b, 1152].

    It needs no weights but LPIPS's own, and no router was ever trained on it.
    """

    def embed(self, images: list[np.ndarray]) -> np.ndarray:
        result = np.zeros((len(images), 0), np.float32)
        for chosen, padded in batches(images):
            parts = [np.asarray(x).mean((1, 2)) for x in features(np.stack([images[i] for i in padded]))]
            joined = np.concatenate([x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-10) for x in parts], 1)
            if not result.shape[1]:
                result = np.zeros((len(images), joined.shape[1]), np.float32)
            result[chosen] = joined[: len(chosen)]
        return result


class _Embeddings:
    """Embeddings [b, p] in float64; those of a, a′, b and b′, which every method is compared with, are kept.

    So are those of the last results, which both scores ask for.
    """

    def __init__(self, encoder: Embedder):
        self._encoder, self._kept, self._last = encoder, {}, {}

    def results(self, images: Sequence[np.ndarray]) -> np.ndarray:
        if any(id(image) not in self._last for image in images):
            self._last = {id(image): (image, row) for image, row in zip(images, self.fresh(images))}
        return np.stack([self._last[id(image)][1] for image in images])

    def fresh(self, images: Sequence[np.ndarray]) -> np.ndarray:
        # An encoder brings every image to its own size, so all of them count as one size.
        chunks = [
            self._encoder.embed([images[i] for i in padded])[: len(chosen)]
            for chosen, padded in batches([images[0]] * len(images))
        ]
        return np.concatenate(chunks).astype(np.float64)

    def kept(self, images: Sequence[np.ndarray]) -> np.ndarray:
        new = {id(image): image for image in images if id(image) not in self._kept}
        if new:
            # The image is kept with its embedding: an id is taken again once its object is gone.
            self._kept |= {key: (new[key], row) for key, row in zip(new, self.fresh(list(new.values())))}
        return np.stack([self._kept[id(image)][1] for image in images])


def _mse(samples: Sequence[Sample], images: Sequence[np.ndarray]) -> list[float]:
    return [metrics.mse(image, sample.truth) for image, sample in zip(images, samples)]


def distances(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> list[float]:
    """LPIPS of each image of x with its partner in y; sizes may differ from pair to pair."""
    result = np.zeros(len(x))
    for chosen, padded in batches(x):
        result[chosen] = lpips(np.stack([x[i] for i in padded]), np.stack([y[i] for i in padded]))[: len(chosen)]
    return result.tolist()


def standard(image_encoder: Embedder | None, source: str = "") -> list[Score]:
    """Pixels, LPIPS, the direction and the distance by the encoder, where there is one, and by AlexNet."""
    scores = pixel_scores()
    if image_encoder is not None:
        scores += embedding_scores("clip", "CLIP", image_encoder, source)
    return scores + embedding_scores("alexnet", "AlexNet", AlexNet())


def from_file(spec: str) -> list[Score]:
    """FILE.py:FUNCTION, package.module:FUNCTION, or either with =ARGUMENT: what the function returns, one score or a
    list of them. UserError where there is no such function, and for anything else that it returns."""
    made = called(spec, "score")
    scores = list(made) if isinstance(made, list | tuple) else [made]
    for score in scores:
        if not isinstance(score, Score):
            place = spec.partition("=")[0]
            raise UserError(f"{place} returned a {type(score).__name__}; expected lorweb_jax.evaluation.scores.Score")
    return scores


def judge_from_file(spec: str) -> Judge:
    """The same for a judge."""
    made = called(spec, "judge")
    if not all(hasattr(made, name) for name in ("url", "model", "question", "digest", "ask")):
        place = spec.partition("=")[0]
        raise UserError(f"{place} returned a {type(made).__name__}; expected a lorweb_jax.evaluation.chat.Judge")
    return made


def called(spec: str, what: str) -> Any:
    """What the function of FILE.py:FUNCTION[=ARGUMENT] returns. UserError where there is no such function."""
    place, _, argument = spec.partition("=")
    module_name, _, function = place.rpartition(":")
    if not module_name or not function.isidentifier():
        raise UserError(f"the {what} {spec!r} is no FILE.py:FUNCTION; give one such as my_{what}s.py:mine", 2)
    make = getattr(_module(module_name), function, None)
    if not callable(make):
        raise UserError(f"{module_name} has no function {function}; give one that returns a {what}", 2)
    arguments = [argument] if argument else []
    try:
        inspect.signature(make).bind(*arguments)
    except (TypeError, ValueError) as error:  # ValueError: what is built in has no signature
        form = f"{place} alone" if argument else f"{place}=ARGUMENT"
        raise UserError(f"{place} can't be called as {spec!r} says ({error}); give {form}", 2) from None
    return make(*arguments)


@functools.cache
def _module(name: str):
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # the file is the user's
        why = printable(f"{type(error).__name__}: {error}")
        raise UserError(f"{name} can't be loaded ({why}); check the file and what it imports", 2) from None


def select(scores: Sequence[Score], names: Sequence[str] | None) -> list[Score]:
    """Those of these names, in their order; all where `names` is None. UserError for two of one name, and for a name
    that there isn't."""
    by_name: Mapping[str, Score] = {score.name: score for score in scores}
    if len(by_name) < len(scores):
        raise UserError("two scores have one name; rename one of them", 2)
    if names is None:
        return list(scores)
    if unknown := [name for name in names if name not in by_name]:
        raise UserError(f"there is no score {unknown[0]}; there are {', '.join(by_name)}", 2)
    return [by_name[name] for name in dict.fromkeys(names)]
