"""Runs trials one after the other: train by a config, measure, write a record. What has a record isn't run again."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.progress import progress_bar
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.jobs import make_job
from lorweb_jax.planning.remat import settled
from lorweb_jax.processes.coordination import stop_status
from lorweb_jax.settings import config as configs
from lorweb_jax.training.loop import train

Record = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One training run. labels: what tells it apart, such as {"method": "joint", "seed": 1}; they name its files."""

    labels: dict[str, Any]
    config: ConfigDict

    @property
    def name(self) -> str:
        return "_".join(str(value).replace(" ", "-") for value in self.labels.values())


def run(trials: Sequence[Trial], out: Path, measure: Callable[[Trial, Path], Record]) -> list[Record]:
    """The record of each trial: its "labels" and "config", "seconds" of training, and what `measure` makes of the trial
    and its run's folder.

    Records lie in out/records, runs in out/runs until they are measured; an experiment that is broken off goes on where
    it was, inside a run from its newest checkpoint. Raises UserError where a record is of another config.
    """
    records = [_read(out, trial) for trial in trials]
    with progress_bar("trials", len(trials), len(trials) - records.count(None), seconds=30.0) as bar:
        for place, trial in enumerate(trials):
            if records[place] is None:
                records[place] = _record(trial, out, measure)
                bar.update()
    return records


def _path(out: Path, trial: Trial) -> Path:
    return out / "records" / f"{trial.name}.json"


def _read(out: Path, trial: Trial) -> Record | None:
    path = _path(out, trial)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    changed = configs.differences(record["config"], _plain(trial.config)).items()
    # How something is computed may differ; what, not.
    for field, (old, new) in ((field, values) for field, values in changed if not configs.may_change(field)):
        raise UserError(
            f"{path} is of a run whose {field} was {old!r}, and now it is {new!r}; give another --out, or delete the "
            "record"
        )
    return record


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def _record(trial: Trial, out: Path, measure: Callable[[Trial, Path], Record]) -> Record:
    folder, start = out / "runs" / trial.name, time.perf_counter()
    if not train(trial.config, folder, settled(make_job)):
        raise SystemExit(stop_status())
    record = {"labels": trial.labels, "config": _plain(trial.config), "seconds": time.perf_counter() - start}
    record |= measure(trial, folder)
    write_json(_path(out, trial), record)
    shutil.rmtree(folder)
    return record


def grid(**axes: Iterable[Any]) -> list[dict[str, Any]]:
    """Labels of all combinations, the last axis running fastest."""
    combined: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        combined = [labels | {name: value} for labels in combined for value in list(values)]
    return combined
