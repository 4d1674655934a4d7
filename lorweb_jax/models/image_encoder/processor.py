"""How images reach an encoder, by its own preprocessor_config.json.

The resize is PIL's, on the host and on uint8, since no other bicubic gives the same bytes; what follows it
(rescale, normalise) is traceable. Images that have the encoder's size already need no host work, so a training
step may be handed uint8 images and call `normalised` inside jit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, Pixels, checked, read_json
from lorweb_jax.images.arrays import MAX_PIXELS
from lorweb_jax.images.resize import resize

FILE = "preprocessor_config.json"

_Mean = Annotated[float, Between(-1e4, 1e4)]
_Scale = Annotated[float, Between(1e-6, 1e6)]


@dataclass(frozen=True)
class _Size:
    __pydantic_config__ = {"extra": "forbid"}  # such as longest_edge, which asks for something else

    height: Pixels | None = None
    width: Pixels | None = None
    shortest_edge: Pixels | None = None

    def pair(self, source: str) -> tuple[int, int] | None:
        """(height, width); None where neither is given."""
        if (self.height is None) != (self.width is None):
            raise UserError(
                f"{source} has one of height and width, both were expected; copy the file again from where "
                "the encoder came from"
            )
        return None if self.height is None or self.width is None else (self.height, self.width)


@dataclass(frozen=True)
class _ProcessorFile:
    """preprocessor_config.json."""

    image_mean: tuple[_Mean, _Mean, _Mean] | None = None
    image_std: tuple[_Scale, _Scale, _Scale] | None = None
    rescale_factor: _Scale = 1 / 255
    resample: Annotated[int, Between(0, 5)] = Image.Resampling.BICUBIC
    size: _Size | None = None
    crop_size: _Size | None = None
    do_resize: bool | None = True
    do_center_crop: bool | None = None
    do_rescale: bool | None = True
    do_normalize: bool | None = True


@dataclass(frozen=True)
class ImageProcessor:
    """CLIP's: short side to `shortest_edge`, centre crop to `crop`. SigLIP's: straight to `size`. (height, width)"""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float = 1 / 255
    shortest_edge: int | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ImageProcessor":
        """Raises UserError if the folder holds no usable preprocessor_config.json."""
        path = Path(folder) / FILE
        return cls.from_json(
            read_json(path, remedy="it says how images reach the encoder: copy it from where the encoder came from"),
            path,
        )

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str | Path = FILE) -> "ImageProcessor":
        """From the contents of a preprocessor_config.json, called `source` in messages; UserError where it makes no
        sense."""
        # Older files of CLIP give sizes as one number.
        sizes = {
            name: dict.fromkeys(fields, data[name])
            for name, fields in (("size", ["shortest_edge"]), ("crop_size", ["height", "width"]))
            if type(data.get(name)) is int
        }
        found = checked(data | sizes, _ProcessorFile, source)
        if found.do_normalize and not (found.image_mean and found.image_std):
            raise UserError(f"{source} has no image_mean and image_std; copy it again from where the encoder came from")
        size = (found.size or _Size(shortest_edge=224)) if found.do_resize else _Size()
        size_pair = size.pair(f"{source}: size")
        cropped = data.get("do_center_crop", "crop_size" in data)
        crop = (found.crop_size or _Size(224, 224)).pair(f"{source}: crop_size") if cropped else None
        if (cropped and not crop) or (found.do_resize and not (size_pair or size.shortest_edge)):
            raise UserError(
                f"{source} has a size or crop_size without height and width; copy it again from where the "
                "encoder came from"
            )
        made = cls(
            mean=found.image_mean if found.do_normalize else (0.0,) * 3,
            std=found.image_std if found.do_normalize else (1.0,) * 3,
            rescale=found.rescale_factor if found.do_rescale else 1.0,
            shortest_edge=size.shortest_edge,
            size=size_pair,
            crop=crop,
            resample=found.resample,
        )
        if made.made_size is None:
            raise UserError(
                f"{source} gives no fixed size (crop_size, or size with height and width), which the encoder "
                "needs; copy it again from where the encoder came from"
            )
        return made

    @property
    def made_size(self) -> tuple[int, int] | None:
        """(height, width) of what `resized` returns; None where it depends on the image."""
        return self.crop or (None if self.shortest_edge else self.size)

    def to_json(self) -> dict:
        """The preprocessor_config.json that transformers' CLIPImageProcessor or SiglipImageProcessor reads."""
        size: dict[str, Any] = {}
        if self.shortest_edge:
            size = {"size": {"shortest_edge": self.shortest_edge}}
        elif self.size:
            size = {"size": {"height": self.size[0], "width": self.size[1]}}
        crop = {"crop_size": {"height": self.crop[0], "width": self.crop[1]}} if self.crop else {}
        return {
            "image_processor_type": "CLIPImageProcessor" if self.crop else "SiglipImageProcessor",
            "do_resize": bool(size),
            **size,
            "resample": int(self.resample),
            "do_center_crop": bool(self.crop),
            **crop,
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }

    def resized(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [h, w, 3], the encoder's size; bytes equal to transformers' processors'.

        UserError for an image so long that its short side would take it beyond MAX_PIXELS.
        """
        height, width = image.shape[:2]
        if self.shortest_edge:
            short, long = sorted((height, width))
            longer = int(self.shortest_edge * long / short)
            target = (self.shortest_edge, longer) if height <= width else (longer, self.shortest_edge)
        else:
            target = self.size or (height, width)
        if target[0] * target[1] > MAX_PIXELS:
            raise UserError(
                f"an image of {width}x{height} pixels can't be brought to the image encoder's size, "
                f"{target[1]}x{target[0]}; crop it to a less extreme shape"
            )
        image = resize(image, target[::-1], self.resample)
        return _centre_crop(image, *self.crop) if self.crop else image

    def normalised(self, images: jax.Array | np.ndarray) -> jax.Array:
        """uint8 [..., h, w, 3] of the encoder's size -> float32 pixel values, same shape; traceable."""
        pixels = jnp.asarray(images).astype(jnp.float32) * self.rescale
        return (pixels - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)

    def __call__(self, images: list[np.ndarray]) -> jax.Array:
        """uint8 images [H, W, 3] of any sizes -> float32 [b, h, w, 3]."""
        return self.normalised(np.stack([self.resized(image) for image in images]))


def _centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of an image, with black around it where it is too small."""
    h, w = image.shape[:2]
    top, left = max(height - h, 0), max(width - w, 0)
    if top or left:
        # transformers pads to ceil on the top and left.
        image = np.pad(image, ((-(-top // 2), top // 2), (-(-left // 2), left // 2), (0, 0)))
        h, w = image.shape[:2]
    top, left = (h - height) // 2, (w - width) // 2
    return image[top : top + height, left : left + width]
