"""How images reach an encoder, by its own preprocessor_config.json.

The resize is PIL's, on the host and on uint8, since no other bicubic gives the same bytes; what follows it
(rescale, normalise) is traceable. Images that have the encoder's size already need no host work, so a training
step may be handed uint8 images and call `normalised` inside jit.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lorweb_jax.errors import UserError
from lorweb_jax.images.resize import resize

FILE = "preprocessor_config.json"


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
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_json(data)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no {FILE}, which says how images reach the encoder; copy it from where "
                            "the encoder came from") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not an image processor's config ({error}); copy it again from where the "
                            "encoder came from") from None

    @classmethod
    def from_json(cls, data: dict) -> "ImageProcessor":
        size = data.get("size", 224) if data.get("do_resize", True) else {}
        if isinstance(size, int):                                   # how older CLIP files write it
            size = {"shortest_edge": size}
        crop = data.get("crop_size", 224) if data.get("do_center_crop", "crop_size" in data) else None
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        normalise = data.get("do_normalize", True)
        return cls(
            mean=tuple(data["image_mean"]) if normalise else (0.0,) * 3,
            std=tuple(data["image_std"]) if normalise else (1.0,) * 3,
            rescale=data.get("rescale_factor", 1 / 255) if data.get("do_rescale", True) else 1.0,
            shortest_edge=size.get("shortest_edge"),
            size=(size["height"], size["width"]) if "height" in size else None,
            crop=(crop["height"], crop["width"]) if crop else None,
            resample=data.get("resample", Image.Resampling.BICUBIC))

    def to_json(self) -> dict:
        """The preprocessor_config.json that transformers' CLIPImageProcessor or SiglipImageProcessor reads."""
        size = ({"shortest_edge": self.shortest_edge} if self.shortest_edge
                else {"height": self.size[0], "width": self.size[1]})
        crop = {"crop_size": {"height": self.crop[0], "width": self.crop[1]}} if self.crop else {}
        return {"image_processor_type": "CLIPImageProcessor" if self.crop else "SiglipImageProcessor",
                "do_resize": True, "size": size, "resample": int(self.resample), "do_center_crop": bool(self.crop),
                **crop, "do_rescale": True, "rescale_factor": self.rescale, "do_normalize": True,
                "image_mean": list(self.mean), "image_std": list(self.std), "do_convert_rgb": True}

    def resized(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [h, w, 3], the encoder's size; bytes equal to transformers' processors'."""
        height, width = image.shape[:2]
        if self.shortest_edge:
            short, long = sorted((height, width))
            longer = int(self.shortest_edge * long / short)
            target = (self.shortest_edge, longer) if height <= width else (longer, self.shortest_edge)
        else:
            target = self.size or (height, width)
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
    return image[top:top + height, left:left + width]
