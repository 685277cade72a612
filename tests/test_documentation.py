"""What the documents say can be done: run files load, commands parse, and every file that is named is there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import _parser
from pipeline.config.data import ModelsSection
from pipeline.config.run_file import RunConfig, load

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts))
PLACES = ("", "pipeline", "workloads", "infra", "pipeline/numerics")
"""Where a path in running text may start, beside the document's own folder."""
README = (ROOT / "README.md").read_text()
(RUN_FILE,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
WISHES = re.findall(r"^\| (.+?) \| (.*`.+`.*) \|$", README.split("| want | write |")[1].split("\n\n")[0], re.MULTILINE)


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
def test_the_readmes_run_file_and_every_wish_load(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    tree = with_wish(yaml.safe_load(RUN_FILE), text)
    path.write_text(yaml.safe_dump(tree))
    assert load(path).model_dump(mode="json", include={"name"}) == {"name": "gemma-2-2b"}
    assert not text or tree != yaml.safe_load(RUN_FILE)


def commands() -> list[str]:
    """Command lines of the documents: indented ones, and those in backticks that stand alone."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"^ {4}(crossray \w+.*)$", text, re.MULTILINE)
        found += re.findall(r"`(crossray \w+ [^`|]+)`", text)
    return [re.sub(r"\s#.*$", "", line) for line in found]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_of_the_documents_is_one(line: str) -> None:
    parsed = _parser().parse_args(shlex.split(line)[1:])
    assert parsed.command == shlex.split(line)[1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    text = path.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    named = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|md|toml)|(?:[\w.-]+/)+)`", text)
    places = [path.parent, *(ROOT / place for place in PLACES)]
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
