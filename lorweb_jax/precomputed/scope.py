"""What is precomputed for a training run: text embeddings by caption, image embeddings by pixels.

Training from them needs no text encoder, and no image encoder where queries are composed of embeddings of single
images (queries.QueryMode.per_image). An image is known by the pixels of its quadrant, so that a changed file can't be
taken for what it was.

Letters: t text tokens, j their width, p pooled width, e embedding width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorweb_jax.adapters.basis import BasisConfig
from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Pair, Task
from lorweb_jax.data.buckets import quadrant_shapes
from lorweb_jax.files.store import Store
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.pipeline.folder import PipelineFolder

# Incremented when the same files would give other arrays than before.
FORMAT = 1
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclasses.dataclass(frozen=True)
class Scope:
    """What is precomputed for a config: where it lies, what makes it, and for which captions and images.

    queries_kept: why queries are not precomputed; None if they are.
    """

    root: Path
    folder: PipelineFolder
    basis: BasisConfig
    quadrant: tuple[int, int] | None
    compute_dtype: str
    param_dtype: str
    tasks: Mapping[str, Sequence[Task]]
    queries_kept: str | None

    @classmethod
    def of(cls, config, folder: PipelineFolder, tasks: Mapping[str, Sequence[Task]]) -> "Scope":
        """From a basis job's config; UserError if it names no folder for what is precomputed."""
        if not config.precomputed:
            raise UserError("the config names no folder for what is precomputed; set --config.precomputed=FOLDER", 2)
        basis, shapes = BasisConfig(**config.basis), quadrant_shapes(config.data)
        quadrant = shapes[0] if len(shapes) == 1 else None
        return cls(
            Path(config.precomputed),
            folder,
            basis,
            quadrant,
            config.compute_dtype,
            config.train.param_dtype,
            tasks,
            _queries_kept(basis, quadrant),
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parts of the model that training then doesn't need."""
        in_step = self.queries_kept and self.basis.coefficients.from_images
        return TEXT_ENCODERS if in_step else (*TEXT_ENCODERS, "image_encoder")

    def text_store(self, create: bool = False) -> Store:
        """By `fingerprint.of_text` of a caption: "text" [t, j] and "pooled" [p], as the training step has them."""
        parts = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2")
        made_by = {part: fingerprint.of_folder(self.folder.folder / part) for part in parts}
        return Store(
            self.root / "text",
            {
                "format": FORMAT,
                **made_by,
                "text_tokens": self.folder.text_tokens,
                "compute_dtype": self.compute_dtype,
                "param_dtype": self.param_dtype,
            },
            create=create,
        )

    def image_store(self, create: bool = False) -> Store:
        """By `fingerprint.of_image` of a quadrant: "embedding" [e], float32."""
        return Store(
            self.root / "images",
            {
                "format": FORMAT,
                "image_encoder": fingerprint.of_folder(self.folder.encoder_folder),
                "embedding": queries.embedding_kind(self.basis.query_mode),
                "quadrant_size": list(self.quadrant),
                "param_dtype": self.param_dtype,
            },
            create=create,
        )

    def captions(self) -> list[str]:
        """Every caption that training or its pictures may need, the empty one first."""
        return sorted(
            {"", *(pair.instruction for tasks in self.tasks.values() for task in tasks for pair in task.pairs)}
        )

    def pairs(self) -> dict[str, tuple[Task, Pair]]:
        """{name with the files' sizes: task and pair} of all the data; a file that is gone has size −1."""
        return {
            f"{split}/{task.name}/{task.relative(pair)} {'+'.join(map(str, pair.nbytes()))}": (task, pair)
            for split, tasks in self.tasks.items()
            for task in tasks
            for pair in task.pairs
        }


def _queries_kept(basis: BasisConfig, quadrant: tuple[int, int] | None) -> str | None:
    if not basis.coefficients.from_images:
        return f"the {basis.query} query asks no image encoder"
    if not queries.query_mode(basis.query_mode).per_image:
        return (
            f"the query mode {basis.query_mode} looks at whole grids, of which there are about as many as pairs of "
            "images; the image encoder stays in the training step"
        )
    if quadrant is None:
        return (
            "with config.data.buckets, or without config.data.quadrant_size, an image's size depends on those it is "
            "shown with; the image encoder stays in the training step"
        )
    return None
