"""What all views of the page share: the one pipeline, limits of uploads, a private folder, the device's runner."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError
from lorweb_jax.images.arrays import MAX_PIXELS
from lorweb_jax.images.io import decode_image, encoded_size
from lorweb_jax.pipeline.pipeline import Pipeline
from lorweb_jax.pipeline.styles import Style
from lorweb_jax.studio.runner import Finished, Runner, Tell

Adapted = Callable[[int], object]  # is told each step of an adaptation
PREVIEWS = 8  # of one image while it is sampled, at most


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of what is uploaded. nbytes: of a file. pixels: of a picture. size: longest edge in pixels to which the grid of
    an edit, or a picture, is shrunk. pictures: of one field that takes several."""

    nbytes: int = 20_000_000
    pixels: int = 16_000_000
    size: int = 1024
    pictures: int = 16


class Step(NamedTuple):
    """Progress of a request: `done` of `total` steps, and what the result would be now, where that was computed.

    adapting: whether the last of them adapted coefficients; else it sampled.
    """

    done: int
    total: int
    preview: np.ndarray | None = None
    adapting: bool = False


class Done(NamedTuple):
    """The result of one of a request's images; they come in order."""

    image: np.ndarray


@dataclasses.dataclass
class Studio:
    """One model in memory, and what it was loaded from (for the command lines that the page shows).

    options: words of the command line that say which pipeline and how it computes. basis: words that say which basis.
    folded: fold an edit's mix into a copy of the weights; False applies it beside them. styles: to choose from, by
    the file or folder that they are from.
    data: the data set whose tasks are shown beside an analogy, if there is one.
    """

    pipeline: Pipeline
    options: Sequence[str] = ()
    basis: Sequence[str] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)
    folded: bool | None = False
    styles: Mapping[str, Style] = dataclasses.field(default_factory=dict)
    data: Path | None = None
    runner: Runner = dataclasses.field(default_factory=Runner)

    def __post_init__(self):
        self._temporary = tempfile.TemporaryDirectory(prefix="lorweb_studio_")

    @property
    def folder(self) -> Path:
        """Of this user alone, removed at the end: what the page makes and what is uploaded."""
        return Path(self._temporary.name)

    def close(self) -> None:
        self._temporary.cleanup()

    def file(self, name: str) -> Path:
        """A new path that ends in `name`, below `folder`."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / name

    @property
    def has_basis(self) -> bool:
        return self.pipeline.model.basis is not None

    @property
    def has_mixes(self) -> bool:
        """Whether coefficients are known before an edit, so that they can be scaled, mixed and written to a file."""
        basis = self.pipeline.model.basis
        return basis is not None and basis.config.coefficients.in_advance

    @property
    def routed(self) -> bool:
        """Whether the mix of an analogy depends on its images."""
        basis = self.pipeline.model.basis
        return basis is not None and basis.config.coefficients.in_advance and basis.config.coefficients.from_images

    def read(self, path: str | None, name: str) -> np.ndarray:
        """An uploaded picture as uint8 [H, W, 3]; UserError, which calls it `name`, where it is missing, no picture,
        or has more pixels than the limit."""
        if not path:
            raise UserError(f"{name} is missing; upload a picture there")
        data = Path(path).read_bytes()
        width, height = encoded_size(data, name)
        if width * height > (most := min(self.limits.pixels, MAX_PIXELS)):
            raise UserError(
                f"{name} has {width}x{height} pixels, at most {most:,} in all are taken here; make it smaller first"
            )
        return decode_image(data, name, lambda *_: None)

    def read_all(self, paths: Sequence[str] | None, name: str) -> list[np.ndarray]:
        """Several pictures, at least one."""
        paths = paths or [""]
        if len(paths) > self.limits.pictures:
            raise UserError(
                f"{len(paths)} pictures were given for {name}, at most {self.limits.pictures} are taken at once; give "
                "some of them later"
            )
        return [self.read(path, name if len(paths) == 1 else f"{name} number {i + 1}") for i, path in enumerate(paths)]

    def run(
        self, tab: str, images: Sequence[Callable[[dict[str, Any], Adapted], np.ndarray]], steps: int, adapt: int = 0
    ) -> Iterator[Step | Done]:
        """Make images one by one when the device is free: Steps as they go, Done after each.

        images: for each a function of the sampling's options that the runner adds, and of what to call after each step
        of an adaptation. steps, adapt: of one image's sampling, and of its adaptation before that.
        """

        def work(tell: Tell) -> None:
            total = (adapt + steps) * len(images)
            for number, make in enumerate(images):
                start, last = number * (adapt + steps), [-1.0]
                before = start + adapt

                def adapted(step: int, start: int = start) -> None:
                    tell(Step(start + step + 1, total, adapting=True))

                def callback(step: int, _: Any, before: int = before, last: list[float] = last) -> None:
                    now = time.monotonic()
                    if now - last[0] > 0.1 or step + 1 == steps:  # a page that draws ten a second is lively enough
                        last[0] = now
                        tell(Step(before + step + 1, total))

                def preview(step: int, shown: list[np.ndarray], before: int = before) -> None:
                    tell(Step(before + step + 1, total, shown[0]))

                tell(Step(start, total))
                every = max(1, -(-steps // (PREVIEWS + 1)))
                tell(Done(make({"callback": callback, "preview": preview, "preview_every": every}, adapted)))

        for event in self.runner.stream(tab, work):
            if not isinstance(event, Finished):
                yield event

    def coefficients(self, pair: tuple[np.ndarray, np.ndarray], b: np.ndarray) -> Mix | None:
        """What the router chooses for a pair (a, a′) and b; None where it isn't known beforehand."""
        return self.pipeline.coefficients(*pair, b) if self.has_mixes else None

    def adapt(
        self, mix: Mix, pair: tuple[np.ndarray, np.ndarray], b: np.ndarray, prompt: str, steps: int, seed: int,
        adapted: Adapted,
    ) -> Mix:  # fmt: skip
        """The mix fitted to the pair, within the limits."""
        options = {"steps": steps, "seed": seed, "max_size": self.limits.size}
        return self.pipeline.adapt(*pair, b, prompt, mix=mix, callback=adapted, **options)

    def edit(
        self, pair: tuple[np.ndarray, np.ndarray], b: np.ndarray, prompt: str, mix: Mix | None, sampling: dict[str, Any]
    ) -> np.ndarray:
        """b′ by this mix, within the limits; None leaves the choice to the basis."""
        return self.pipeline.edit(*pair, b, prompt, mix=mix, folded=self.folded, max_size=self.limits.size, **sampling)

    def lora(self, mix: Mix | None, names: str, rank: int | None) -> str:
        """A mix as a LoRA's file of its own. rank: 0 or None for the exact one."""
        if mix is None:
            raise UserError(
                "no LoRA can be made of this result: its coefficients are not known beforehand; attach a basis whose "
                "router asks the image encoder"
            )
        path = self.file(f"analogy_{names}.safetensors")
        self.pipeline.save_lora(path, mix, names=names, rank=rank or None)
        return str(path)

    def words(self, command: str, *, basis: bool = True) -> list[Any]:
        """How a command line begins that has this model. command: the module's name in lorweb_jax. basis: whether it
        has the basis too."""
        words: list[Any] = ["python", "-m", f"lorweb_jax.{command}", *self.options]
        if basis and self.has_basis:
            words += [
                *self.basis,
                *{None: [], True: ["--apply", "folded"], False: ["--apply", "low-rank"]}[self.folded],
            ]
        return words
