"""The data of a basis's training run: the tasks trained on, and those only evaluated."""

from pathlib import Path

from lorweb_jax.data.analogies import Task
from lorweb_jax.data.embedded.build import embedded_dataset
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.problems import Problems


def read_splits(config, problems: Problems) -> dict[str, list[Task]]:
    """{split: tasks} of `config.data`, "train" first; what can't be used goes into `problems`.

    The embedded data set is built on the first call. Raises UserError for a folder without a usable task.
    """
    if config.data.root == "embedded":
        data = embedded_dataset(config.data.cache, config.data.quadrant_size)
        roots = {"train": data.train, "held_out_drawings": data.heldout_drawings, "held_out_tasks": data.heldout_tasks}
    else:
        roots = {"train": Path(config.data.root)}
        if config.data.held_out:
            roots["held_out_tasks"] = Path(config.data.held_out)
    return {split: read_tasks(root, problems) for split, root in roots.items()}
