"""A data set that tensorflow-datasets keeps as ArrayRecord: written by `python -m lorweb_jax.data.store`, read by row.

Each record has both images as PNG, the caption and the task. The data set's metadata has all texts and sizes, so that
listing its rows reads no record. TensorFlow itself is not needed.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.data.analogies import Task, file_changed
from lorweb_jax.data.extras import extra
from lorweb_jax.data.problems import Problems, reason
from lorweb_jax.data.rows import AFTER, BEFORE, CAPTION, COLUMNS, TASK, Row, RowPair, read_rows
from lorweb_jax.images.io import encoded_png

PREFIX = "tfds:"
SPLIT = "train"
_INFO, _VERSION = "dataset_info.json", "1.0.0"
_SIZES = "bytes"  # metadata beside caption and task: [bytes before, bytes after] of each row


class Name(NamedTuple):
    """Of a data set, in a folder of data sets; None for the library's own."""

    name: str
    folder: str | None


def parse_name(text: str) -> Name:
    """tfds:NAME or tfds:NAME:DIR. UserError without a name."""
    name, _, folder = text.removeprefix(PREFIX).partition(":")
    # A Path has one slash in the place of the two of gs://bucket.
    folder = re.sub(r"^(\w+):/(?=[^/])", r"\1://", folder)
    if not name:
        raise UserError(f"{text} names no data set; give one such as {PREFIX}analogies:local_data/tfds")
    return Name(name, folder or None)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredPair(RowPair):
    """A row of the data set `of`, which lies in `folder`."""

    of: Name

    def _files(self, *sides: str) -> list[bytes]:
        source = _opened(self.of).source
        try:
            record = source[self.row]
        except Exception as error:  # of array_record and protobuf, for all kinds of damage
            raise UserError(
                f"{self.places[0]} can't be read ({printable(str(error).strip(), 200)}); store the data set again"
            ) from None
        return [record[side] for side in sides]

    def changed(self) -> int:
        return file_changed(f"{self.folder}/{_INFO}")


def read_tasks(root: Path, problems: Problems) -> list[Task]:
    """The tasks of tfds:NAME[:DIR]. No image is read.

    Adds to `problems` a task with fewer than two pairs. Raises UserError where there is no such data set, where it is
    damaged or wasn't written by `store`, and where the library isn't installed.
    """
    of = parse_name(str(root))
    opened = _opened(of)

    def pair(row: Row, instruction: str) -> StoredPair:
        number = row.values["row"]
        return StoredPair(opened.folder, number, tuple(opened.columns[_SIZES][number]), instruction, of)

    rows = (
        Row(f"row {row}", {"row": row, BEFORE: row, AFTER: row, CAPTION: caption, TASK: task})
        for row, (caption, task) in enumerate(zip(opened.columns[CAPTION], opened.columns[TASK]))
    )
    return read_rows(rows, Path(opened.folder), pair, problems)


class _Opened(NamedTuple):
    """source: row -> record, whose images are bytes. columns: of the metadata."""

    folder: str
    source: Any
    columns: dict[str, list]


@functools.lru_cache(maxsize=16)
def _opened(of: Name) -> _Opened:
    """Once in each process."""
    tfds = extra("tensorflow_datasets", "tfds", f"to read {PREFIX}{of.name}")
    try:
        builder = tfds.builder(of.name, data_dir=of.folder)
        raw = {side: tfds.decode.SkipDecoding() for side in (BEFORE, AFTER)}
        source = builder.as_data_source(split=SPLIT, decoders=raw)
        columns = dict(builder.info.metadata or {})
    except Exception as error:  # the library's own and Python's, for what is absent and all kinds of damage
        raise UserError(
            f"{PREFIX}{of.name} can't be read in {of.folder or 'the folder of tensorflow-datasets'} "
            f"({printable(' '.join(str(error).split()), 200)}); check its name and folder, or store it again"
        ) from None
    if {len(columns.get(name, ())) for name in (CAPTION, TASK, _SIZES)} != {len(source)}:
        raise UserError(
            f"{PREFIX}{of.name} lacks the list of its captions and tasks, which `python -m lorweb_jax.data.store` "
            "writes; store the data with it"
        )
    return _Opened(str(builder.data_path), source, columns)


def store(tasks: Iterable[Task], name: str, folder: Path, problems: Problems) -> tuple[Path, int]:
    """Write all pairs as the data set `name` of split "train" below `folder`; (its folder, the number of pairs).

    Images are kept to the pixel. Adds to `problems` the pairs that can't be read. Raises UserError where a data set of
    that name is there, for a name that tensorflow-datasets doesn't take, and if no pair can be read. What is broken off
    leaves nothing under the name.
    """
    tfds = extra("tensorflow_datasets", "tfds", "to store a data set")
    tfds.disable_progress_bar()
    if not name.isidentifier() or name != name.lower() or not name.isascii():
        raise UserError(f"{name!r} is no data set's name; give lower-case letters, digits and underscores", 2)
    columns: dict[str, list] = {CAPTION: [], TASK: [], _SIZES: []}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(_VERSION)
        code_path = None  # by which it looks for checksums, with a package that it doesn't install

        def _info(self):
            png = functools.partial(tfds.features.Image, shape=(None, None, 3), encoding_format="png")
            text = tfds.features.Text
            features = dict(zip(COLUMNS, (png(), png(), text(), text())))
            return tfds.core.DatasetInfo(
                builder=self,
                description="Pairs of images before and after an edit, by task.",
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(columns),
                disable_shuffling=True,  # rows in the metadata's order
            )

        def _split_generators(self, dl_manager):
            return {SPLIT: self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(_records(tasks, columns, problems))
            if not columns[TASK]:
                raise UserError(f"no pair can be read; {problems.summary()}")
            self.info.metadata.update(columns)

    Builder.name = name
    builder = Builder(data_dir=folder, file_format="array_record")
    if Path(builder.data_path).exists():
        raise UserError(f"{builder.data_path} is there already; give another --name or --out, or remove it")
    builder.download_and_prepare()
    return Path(builder.data_path), len(columns[TASK])


def _records(tasks: Iterable[Task], columns: dict[str, list], problems: Problems) -> Iterator[dict[str, Any]]:
    """A record each pair; its row of the columns is added as it comes."""
    for task in tasks:
        for pair in task.pairs:
            try:
                before, after = map(encoded_png, pair.read(problems.tell))
            except Exception as error:  # whatever is wrong with one pair, the others are stored
                problems.add(task.name, task.relative(pair), reason(error))
                continue
            for name, value in ((CAPTION, pair.instruction), (TASK, task.name), (_SIZES, [len(before), len(after)])):
                columns[name].append(value)
            yield dict(zip(COLUMNS, (before, after, pair.instruction, task.name)))
