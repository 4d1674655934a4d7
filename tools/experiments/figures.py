"""matplotlib figures as images."""

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pixels(figure: "Figure") -> np.ndarray:
    """uint8 [H, W, 3]"""
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        return np.asarray(Image.open(file).convert("RGB"))
