"""The pages in docs/ name files and sections that are there."""

import re
from pathlib import Path

import numpy as np
import pytest

from lorweb_jax.jobs import make_job
from lorweb_jax.main import read_config
from lorweb_jax.training.loop import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links {target}"


def test_a_job_of_ones_own_trains(tmp_path, monkeypatch):
    """The example in docs/jobs.md, for fewer steps: the exported kernel reverses four numbers."""
    (tmp_path / "my_job.py").write_text(
        re.search(r"```python\n(import.*?)```", (ROOT / "docs/jobs.md").read_text(), re.S)[1]
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = read_config(str(tmp_path / "my_job.py"))
    config.train.steps, config.optimizer.learning_rate, config.optimizer.weight_decay = 100, 0.05, 0.0
    train(config, tmp_path / "run", make_job)
    np.testing.assert_allclose(np.load(tmp_path / "run" / "kernel.npy"), np.eye(4)[::-1], atol=0.1)


def test_method_names_code_that_is_there():
    places = re.findall(r"`([a-z0-9_]+/[a-z0-9_/]+(?:\.py)?)`", (ROOT / "docs" / "method.md").read_text())
    absent = [place for place in places if not ((ROOT / "lorweb_jax" / place).exists() or (ROOT / place).exists())]
    assert len(places) > 30 and not absent


def test_code_cites_sections_that_are_there():
    sections = set(re.findall(r"^## (\d)\.", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    for file in (ROOT / "lorweb_jax").rglob("*.py"):
        cited = re.findall(r"method\.md (?:§|sections? )(\d)", file.read_text())
        assert set(cited) <= sections, file
