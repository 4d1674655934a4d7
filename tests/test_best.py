"""The best checkpoint of a run is marked by a held-out score, and what the job keeps of it stays."""

import json
import math

from lorweb_jax.training.best import mark_best
from lorweb_jax.training.job import Job


class Scored(Job):
    """`model` is the score itself."""

    def validate(self, model, step):
        return model

    def keep(self, model, folder):
        (folder / "kept").write_text(str(model))


def test_the_lowest_score_is_kept(tmp_path):
    job = Scored()
    for step, score in enumerate([math.nan, 3.0, 1.0, 2.0, 1.0, math.inf], 1):
        mark_best(tmp_path, job, score, step)
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 3, "score": 1.0}
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["kept"]
    assert (tmp_path / "best" / "kept").read_text() == "1.0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best.json"]


def test_a_job_without_a_score_marks_nothing(tmp_path):
    assert mark_best(tmp_path, Job(), None, 1) is None and not list(tmp_path.iterdir())
