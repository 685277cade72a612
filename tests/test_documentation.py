"""What the documents say can be done: run files load, commands parse, code compiles, links and paths lead somewhere."""

import argparse
import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.arguments import make_parser
from pipeline.config.data import ModelsSection
from pipeline.config.run_file import RunConfig, load

ROOT = Path(__file__).parent.parent
HIDDEN = re.compile(r"^(\..*|runs|build|dist|.*\.egg-info)$")
"""Folders that are not part of the repository."""


def files(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in ROOT.rglob(pattern)]
    return sorted(path for path in found if not any(HIDDEN.match(part) for part in path.relative_to(ROOT).parts))


DOCUMENTS = files("*.md")
HISTORY = ROOT / "CHANGELOG.md"
"""Names files of the past too."""
NAMING = [*files("*.md", "*.yaml", "*.sh", "Dockerfile"), *sorted((ROOT / "infra").rglob("*.py"))]
"""Files that name files of the repository in running text or comments."""
PLACES = ("", "pipeline", "workloads", "infra", "pipeline/numerics")
"""Where a path in running text may start, beside the document's own folder."""
README = (ROOT / "README.md").read_text()
OWN_PAIR = (ROOT / "docs" / "own-pair.md").read_text()
RUN_FILE = re.findall(r"```yaml\n(.*?)```", OWN_PAIR, re.DOTALL)[0]
WISHES = re.findall(
    r"^\| (.+?) \| (.*`.+`.*) \|$", OWN_PAIR.split("| want | write |")[1].split("\n\n")[0], re.MULTILINE
)


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def with_wish(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """The run file with what one row of the table of wishes says, each key where it belongs."""
    for piece in re.findall(r"`([^`]*: [^`]*)`", text):
        for key, value in yaml.safe_load(f"{{{piece}}}").items():
            if key in RunConfig.model_fields:
                tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
            elif key in ModelsSection.model_fields:
                tree["models"][key] = value
            else:
                tree["crosscoders"][0][key] = value
    return tree


@pytest.mark.parametrize("text", ["", *(text for _, text in WISHES)], ids=["plain", *(want for want, _ in WISHES)])
def test_the_run_file_of_the_guide_and_every_wish_load(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    tree = with_wish(yaml.safe_load(RUN_FILE), text)
    path.write_text(yaml.safe_dump(tree))
    assert load(path).model_dump(mode="json", include={"name"}) == {"name": "gemma-2-2b"}
    assert not text or tree != yaml.safe_load(RUN_FILE)


def test_sections_of_run_files_in_the_other_documents_load(tmp_path: Path) -> None:
    """Each block completes the run file of docs/own-pair.md."""
    blocks = [block for path in DOCUMENTS for block in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL)]
    assert blocks
    for block in blocks:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(RUN_FILE) | yaml.safe_load(block)))
        assert load(path).name == "gemma-2-2b"


def commands() -> list[str]:
    """Command lines of documents and comments: indented ones, those after `run:` and alike, those in backticks."""
    found = []
    for path in NAMING:
        text = re.sub(r"\\\n(#\s*)?", " ", path.read_text())
        found += re.findall(r"^ {4,}(crossray \w+.*)$", text, re.MULTILINE)
        found += re.findall(r"^# +(?:\w+: +)?(crossray \w+ [^()\n]+)", text, re.MULTILINE)
        found += re.findall(r"`(crossray \w+ [^`|]+)`", text)
    return [re.sub(r"\s+[#>].*$", "", line).strip() for line in found]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_of_the_documents_is_one(line: str) -> None:
    parsed = make_parser().parse_args(shlex.split(line)[1:])
    assert parsed.command == shlex.split(line)[1]


def test_every_command_of_the_command_line_is_documented() -> None:
    (choices,) = [action.choices for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert {shlex.split(line)[1] for line in commands()} == set(choices)


def test_every_target_of_make_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name for path in DOCUMENTS for name in re.findall(r"(?:`|^ {4,})make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets


def test_every_module_that_a_document_runs_exists() -> None:
    named = {
        name for path in NAMING for name in re.findall(r"python -m ((?:workloads|pipeline)[\w.]*)", path.read_text())
    }
    assert named
    missing = [name for name in named if not list(ROOT.glob(f"{name.replace('.', '/')}*"))]
    assert missing == []


def python_blocks() -> list[tuple[Path, str]]:
    pattern = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    return [
        (path, re.sub(rf"^{indent}", "", block, flags=re.MULTILINE))
        for path in DOCUMENTS
        for indent, block in pattern.findall(path.read_text())
    ]


@pytest.mark.parametrize(("path", "block"), python_blocks(), ids=lambda value: getattr(value, "stem", None))
def test_python_in_the_documents_compiles_and_imports_what_exists(path: Path, block: str) -> None:
    compile(block, by_name(path), "exec")
    for line in re.findall(r"^(?:from|import) (?:pipeline|crossray).*$", block, re.MULTILINE):
        exec(line, {})


def named_paths(text: str) -> list[str]:
    """Paths in backticks, and those in plain text that begin with a top-level folder of the repository."""
    quoted = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|md|toml|sh)|(?:[\w.-]+/)+)`", text)
    plain = re.findall(r"(?<![\w/.-])((?:pipeline|workloads|infra|tests|docs)/[\w./-]*\w\.(?:py|yaml|md|sh))\b", text)
    return [*quoted, *plain]


@pytest.mark.parametrize("path", NAMING, ids=by_name)
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    if path == HISTORY:
        return
    places = [path.parent, *(ROOT / place for place in PLACES)]
    assert [
        name for name in named_paths(path.read_text()) if not any((place / name).exists() for place in places)
    ] == []


def test_every_file_that_a_module_docstring_names_is_there() -> None:
    missing = []
    for path in files("*.py"):
        named = re.findall(
            r"(?<![\w/.{-])((?:[\w-]+/)*[\w-]+\.(?:py|md|yaml))\b", ast.get_docstring(ast.parse(path.read_text())) or ""
        )
        places = [*path.parents, *(ROOT / place for place in PLACES)]
        missing += [(by_name(path), name) for name in named if not any((place / name).exists() for place in places)]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link


def test_every_page_of_the_documentation_is_listed_in_its_index() -> None:
    listed = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "README.md").read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


def test_the_tree_of_the_rooms_is_the_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    (tree,) = [block for block in text.split("```")[1::2] if block.startswith("\npipeline/")]
    lines = tree.strip("\n").splitlines()
    inner = {line.split()[0] for line in lines if line.startswith("  ")}
    present = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "pipeline").iterdir()
        if not path.name.startswith("__") and (path.is_dir() or path.suffix == ".py")
    }
    assert inner == present
    tops = {name for line in lines if not line.startswith("  ") for name in re.findall(r"(?<!\S)[a-z]+/(?!\S)", line)}
    assert tops == {"pipeline/", "workloads/", "infra/", "docs/", "tests/"}


def test_the_readme_is_one_page_whose_picture_is_small() -> None:
    assert README.count("\n") <= 100
    before_any_scroll = README.split("## ")[0]
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", before_any_scroll)
    assert (ROOT / picture).stat().st_size < 300_000
    for command in ("make demo", "make test"):
        assert f"    {command}" in before_any_scroll
