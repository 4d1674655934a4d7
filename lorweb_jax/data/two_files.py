"""A pair of two image files, one before and one after an edit."""

import dataclasses

import numpy as np

from lorweb_jax.data.analogies import Tell, file_bytes, file_changed
from lorweb_jax.images.io import image_size, read_image


@dataclasses.dataclass(frozen=True, slots=True)
class TwoFiles:
    """Follows data/analogies.py's Pair: the paths of both files, and the edit as an instruction."""

    before: str
    after: str
    instruction: str

    @property
    def places(self) -> tuple[str, str]:
        return self.before, self.after

    def read(self, tell: Tell | None = None) -> tuple[np.ndarray, np.ndarray]:
        return read_image(self.before, tell), read_image(self.after, tell)

    def size(self) -> tuple[int, int]:
        return image_size(self.before)

    def nbytes(self) -> tuple[int, int]:
        return file_bytes(self.before), file_bytes(self.after)

    def changed(self) -> int:
        return file_changed(self.before, self.after)
