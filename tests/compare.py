"""How far two arrays are apart."""

import numpy as np


def relative(found, expected) -> float:
    """‖found − expected‖₂ / ‖expected‖₂ in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
