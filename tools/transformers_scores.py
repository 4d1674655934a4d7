"""Scores for lorweb_jax.evaluate by models of transformers, which the package itself doesn't import.

    python -m lorweb_jax.evaluate … --add-score tools/transformers_scores.py:dino=FOLDER

FOLDER holds a DINO or DINOv2 (or any image model of transformers with a class token) and its preprocessor_config.json.
"""

from pathlib import Path

import numpy as np

from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError
from lorweb_jax.evaluation.scores import Score, embedding_scores


class Encoder:
    """The class token [b, p] of the last layer."""

    def __init__(self, folder: str):
        import torch
        from transformers import AutoImageProcessor, AutoModel

        self._torch = torch
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder} holds no image model that transformers reads ({reason}); check the folder"
            ) from None

    def embed(self, images: list[np.ndarray]) -> np.ndarray:
        with self._torch.no_grad():
            pixels = self._processor(images=list(images), return_tensors="pt")
            return self._model(**pixels).last_hidden_state[:, 0].float().numpy()


def dino(folder: str) -> list[Score]:
    """dino_directional and dino_distance, by the class token. Raises UserError for a folder without such a model."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}; give that of a DINO or DINOv2 model")
    return embedding_scores("dino", "DINO", Encoder(folder), fingerprint.of_folder(folder))
