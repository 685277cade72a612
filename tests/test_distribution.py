"""What is published: a wheel with the package, its types and templates, and nothing else; and its version."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, the wheel made from the sdist as an index gets it."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "crossray", "tests", "workloads"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return folder


def test_the_wheel_holds_the_package_with_types_and_templates(built: Path) -> None:
    (wheel,) = built.glob(f"crossray-{PROJECT['version']}-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"crossray-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"pipeline", "crossray", info}
    sources = [path for top in ("pipeline", "crossray") for path in (ROOT / top).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in sources if "__pycache__" not in path.parts}
    assert names - {name for name in names if name.startswith(info)} == expected
    assert {"crossray/py.typed", "pipeline/py.typed", "pipeline/report/templates/card.html"} <= names
    told = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "crossray = pipeline.cli:main" in told
    assert (built / f"crossray-{PROJECT['version']}.tar.gz").is_file()


def test_every_extra_is_told_to_installers(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    metadata = zipfile.ZipFile(wheel).read(f"crossray-{PROJECT['version']}.dist-info/METADATA").decode()
    assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)) == set(PROJECT["optional-dependencies"])


def test_it_imports_in_an_environment_without_anything_else(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    (wheel,) = built.glob("*.whl")
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, cwd=tmp_path)
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import crossray; print(len(crossray.SURFACE), crossray.__file__)"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path, env=own)
    assert str(tmp_path) in done.stdout
    script = [str(tmp_path / "env" / "bin" / "crossray"), "--version"]
    done = subprocess.run(script, check=True, capture_output=True, text=True, cwd=tmp_path, env=own)
    assert done.stdout.strip() == f"crossray {PROJECT['version']}"


def test_the_changelog_has_the_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] in versions[:1]
