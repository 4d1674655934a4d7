"""A folder of records: what each method made of each triplet, with its scores.

    OUT/setup.json                 what all records have in common: triplets, sizes, sampling, base, skipped data
    OUT/triplets/ID.png            a | a′ | b | b′ (without b′ where the truth isn't known)
    OUT/methods/NAME/method.json   what the method is
    OUT/methods/NAME/ID.png, .json one record: the image; its scores and its cost

A record counts once its .json is there, which is written after the image. Every file is written whole or not at all,
so that several processes may work in one folder, and an interrupted evaluation goes on where it ended.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import write_file
from lorweb_jax.common.schema import read_json
from lorweb_jax.evaluation.samples import Sample
from lorweb_jax.images.io import read_image, write_image

SETUP, METHOD = "setup.json", "method.json"
FORMAT = 1
_LARGEST = 2**28  # bytes of a setup, which lists all triplets
_AGAIN = "give another --out, or the options that its records were made with"


def write_json(path: Path, value: Any) -> None:
    """UserError if it can't be written; numbers that are no JSON are a bug."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, text.encode(errors="backslashreplace"))


class Records:
    """The records in a folder. Raises UserError where setup.json is missing, damaged or of another format."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / SETUP
        if not path.is_file():
            raise UserError(
                f"{self.folder} holds no {SETUP}, so no evaluation; give its folder, or --data to begin one"
            )
        self.setup = read_json(path, limit=_LARGEST)
        if self.setup.get("format") != FORMAT or not isinstance(self.setup.get("triplets"), dict):
            raise UserError(
                f"{path} is of format {self.setup.get('format')!r}, {FORMAT} was expected; give another --out"
            )

    @classmethod
    def begin(
        cls,
        folder: str | Path,
        samples: Sequence[Sample],
        conditions: Mapping[str, Any],
        skipped: Sequence[Mapping[str, str]] = (),
    ) -> "Records":
        """The records of these samples under these conditions (JSON values), begun or gone on with.

        Raises UserError, with the difference, where the folder has records of other triplets, sizes or conditions.
        """
        folder = Path(folder)
        triplets = {
            sample.id: {
                "split": sample.split,
                "task": sample.task,
                "caption": sample.caption,
                "size": [sample.b.shape[1], sample.b.shape[0]],
                "truth": sample.b2 is not None,
                "digest": sample.digest(),
            }
            for sample in samples
        }
        if len(triplets) < len(samples):
            raise UserError("two triplets are the same ones; give each data folder once, with a split of its own")
        setup = {"format": FORMAT, "conditions": dict(conditions), "skipped": list(skipped), "triplets": triplets}
        if (folder / SETUP).exists():
            records = cls(folder)
            if what := difference(records.setup, json.loads(json.dumps(setup))):
                raise UserError(f"{folder} holds the records of another evaluation: {what}; {_AGAIN}")
        else:
            if (folder / "methods").exists():
                raise UserError(f"{folder} has records and no {SETUP}; give another --out")
            write_json(folder / SETUP, setup)
            records = cls(folder)
        for sample in samples:
            path = folder / "triplets" / f"{sample.id}.png"
            if not path.exists():
                images = [image for image in (*sample.condition, sample.b2) if image is not None]
                write_image(path, np.concatenate(images, 1))
        return records

    def samples(self) -> dict[str, Sample]:
        """{id: the sample} as it was evaluated, read from triplets/."""
        samples = {}
        for key, about in self.setup["triplets"].items():
            path = self.folder / "triplets" / f"{key}.png"
            image = read_image(path)
            count, width = (4 if about["truth"] else 3), about["size"][0]
            if image.shape[1] != count * width:
                raise UserError(f"{path} is {image.shape[1]} pixels wide, {count * width} were expected; delete {path}")
            parts = [image[:, i * width : (i + 1) * width] for i in range(count)]
            samples[key] = Sample(about["task"], about["caption"], *parts, *[None] * (4 - count), split=about["split"])
        return samples

    def method(self, name: str, about: Mapping[str, Any] | None = None) -> "MethodRecords":
        """The records of one method, gone on with or begun. about: what it is, with a "fingerprint" of its weights.

        Raises UserError where records of this name were made with other weights.
        """
        folder = self.folder / "methods" / slug(name)
        path = folder / METHOD
        if path.exists():
            known = read_json(path)
            if about is not None and known.get("fingerprint") != about["fingerprint"]:
                raise UserError(
                    f"the records of {name!r} in {self.folder} were made with other weights ({known.get('fingerprint')}"
                    f", and {about['fingerprint']} now): give it another name (NAME=PATH), another --out, or delete "
                    f"{folder}"
                )
            return MethodRecords(folder, known)
        if about is None:
            raise UserError(
                f"{self.folder} has no records of {name!r}; there are {', '.join(map(str, self.methods()))}"
            )
        known = {"order": len(self.methods()), **about, "name": name}
        write_json(path, known)
        return MethodRecords(folder, known)

    def methods(self) -> list["MethodRecords"]:
        """Of all methods, in the order in which they were first evaluated."""
        paths = list((self.folder / "methods").glob(f"*/{METHOD}"))
        found = [MethodRecords(path.parent, read_json(path)) for path in paths]
        return sorted(found, key=lambda method: (method.about.get("order", 0), method.name))


class MethodRecords:
    """One method's records. about: name, kind, source, fingerprint, parameters."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about = folder, about
        self.name: str = about["name"]

    def __str__(self) -> str:
        return self.name

    def read(self) -> dict[str, dict]:
        """{id: record} of all that are whole. UserError for a damaged one, which names the file."""
        records = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name != METHOD:
                record = read_json(path)
                if not isinstance(record.get("scores"), dict) or not isinstance(record.get("digest"), str):
                    raise UserError(f"{path} is no record; delete it, and the same command makes it again")
                if path.with_suffix(".png").exists():
                    records[path.stem] = record
        return records

    def image(self, key: str, record: Mapping[str, Any]) -> np.ndarray:
        """UserError if the image isn't the one that the record is about."""
        path = self.folder / f"{key}.png"
        image = read_image(path)
        if fingerprint.of_image(image) != record["digest"]:
            raise UserError(f"{path} is not the image that was scored; delete it, and the same command makes it again")
        return image

    def write(self, key: str, image: np.ndarray, seed: int, cost: Mapping[str, Any]) -> None:
        """A new record, without scores as yet. seed: with which `edit` makes the same image."""
        write_image(self.folder / f"{key}.png", image)
        write_json(
            self.folder / f"{key}.json",
            {"digest": fingerprint.of_image(image), "seed": seed, "cost": dict(cost), "scores": {}},
        )

    def update(self, key: str, record: Mapping[str, Any]) -> None:
        write_json(self.folder / f"{key}.json", record)


def slug(name: str) -> str:
    """A folder's name for a method: its letters, and a hash where that isn't all of it."""
    plain = re.sub(r"[^A-Za-z0-9.\-]+", "_", name).strip("._")[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def difference(there: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two setups, in words; empty if nothing does. What was skipped shows in the triplets."""
    parts = []
    for name in dict.fromkeys([*there["conditions"], *new["conditions"]]):
        one, other = (setup["conditions"].get(name, "the default") for setup in (there, new))
        if one != other:
            parts.append(f"{name} was {one} and is {other}")
    old, now = there["triplets"], new["triplets"]
    common = [key for key in old if key in now]
    for what, keys in (
        ("{} of its triplets are not asked for", [key for key in old if key not in now]),
        ("{} triplets are not in it", [key for key in now if key not in old]),
        ("{} triplets have another size", [key for key in common if old[key]["size"] != now[key]["size"]]),
        (
            "{} triplets have other images or captions",
            [
                key
                for key in common
                if old[key]["size"] == now[key]["size"] and old[key]["digest"] != now[key]["digest"]
            ],
        ),
    ):
        if keys:
            parts.append(f"{what.format(len(keys))} (such as {(old | now)[keys[0]]['task']}: {keys[0]})")
    return "; ".join(parts)
