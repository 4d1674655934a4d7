"""The pages in docs/ name files and sections that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links {target}"


def test_method_names_code_that_is_there():
    places = re.findall(r"`([a-z0-9_]+/[a-z0-9_/]+(?:\.py)?)`", (ROOT / "docs" / "method.md").read_text())
    absent = [place for place in places if not ((ROOT / "lorweb_jax" / place).exists() or (ROOT / place).exists())]
    assert len(places) > 30 and not absent


def test_code_cites_sections_that_are_there():
    sections = set(re.findall(r"^## (\d)\.", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    for file in (ROOT / "lorweb_jax").rglob("*.py"):
        cited = re.findall(r"method\.md (?:§|sections? )(\d)", file.read_text())
        assert set(cited) <= sections, file
