"""Every sentence that the small base is trained on, by row: instructions for edits, captions for text to image."""

from collections.abc import Sequence

import numpy as np

from lorweb_jax.data.embedded.operations import LAST_ONLY, OPERATIONS, STYLES

_OF_EDIT = 6  # rows of an operation or style: three wordings for all drawings of a canvas, three for the last alone


class Captions:
    """Row 0 is empty; then come the operations (1 …), the styles in the order of STYLES, and the drawings' captions.

    Wording 0 of an edit is the vague one, which leaves its parameter open; 1 and 2 are the specific ones.
    """

    def __init__(self, of_drawings: Sequence[Sequence[str]] = ()):
        self.texts = [""]
        for edit in (*OPERATIONS.values(), *STYLES.values()):
            sentences = (edit.instruction, *edit.specific)
            self.texts += [*sentences, *(LAST_ONLY.format(sentence) for sentence in sentences)]
        self.count = np.array([len(texts) for texts in of_drawings], np.int32)
        self.start = (len(self.texts) + np.cumsum(self.count) - self.count).astype(np.int32)
        for texts in of_drawings:
            self.texts += texts

    @staticmethod
    def of_operation(operation, last_only, wording):
        """Rows of operations, counted from 1; arrays of numpy or jax."""
        return 1 + _OF_EDIT * (operation - 1) + 3 * last_only + wording

    @staticmethod
    def of_style(style, last_only, wording):
        """Rows of styles, counted from 0."""
        return 1 + _OF_EDIT * (len(OPERATIONS) + style) + 3 * last_only + wording
