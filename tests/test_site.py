"""The documentation site builds with every broken link as an error, and says what the code says."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crossray
from pipeline.analyses.example_columns import HISTOGRAM_COLUMNS
from pipeline.analyses.ratio_statistics import RATIO_COLUMNS
from pipeline.analyses.steering_columns import STEERING_COLUMNS
from pipeline.config.analyses import ExamplesSection
from pipeline.schema import LATENT_COLUMNS

ROOT = Path(__file__).parent.parent


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*command, "-f", str(source / "mkdocs.yml")], capture_output=True, text=True, env=variables)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder


def text_of(site: Path, page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text()))


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def test_every_public_name_key_and_column_has_its_place(site: Path) -> None:
    api, keys, tables = (text_of(site, f"reference/{page}") for page in ("api", "run-file", "tables"))
    assert all(f"crossray.{name}" in api for name in crossray.SURFACE)
    for name, field in ExamplesSection.model_fields.items():
        assert name in keys and plain(field.description or "") in keys
    for columns in (LATENT_COLUMNS, STEERING_COLUMNS, HISTOGRAM_COLUMNS, RATIO_COLUMNS):
        assert all(column.name in tables and plain(column.doc) in tables for column in columns)


def test_pages_from_outside_docs_and_notebooks_are_there(site: Path) -> None:
    assert "KubeRay" in text_of(site, "repository/infra")
    for path in (ROOT / "docs" / "tutorials").glob("*.ipynb"):
        assert "demo_pair" in text_of(site, f"tutorials/{path.stem}")
    assert not list(site.rglob("*.ipynb")) and not list(site.rglob("*.py"))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert re.findall(r'<(?:script|link rel="stylesheet"|img)[^>]+(?:src|href)="(?:https?:)?//', page) == []


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings.replace("hooks: [docs/site/hooks.py]", ""))
    page = tmp_path / "docs" / "README.md"
    page.write_text("# Home\n\nA [page](other.md).\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0
    page.write_text("# Home\n\nA [part](#home).\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
