"""Schemas for editors: what docs/schema/ holds is current, and it takes and refuses what the loader does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pipeline.cli import main
from pipeline.config.json_schema import FILE_NAME, header
from pipeline.config.run_file import RunConfig, read_tree, validated
from pipeline.config.yaml_file import parse_yaml
from pipeline.errors import InputError

ROOT = Path(__file__).parent.parent.parent
SCHEMAS = ROOT / "docs" / "schema"
FILES = sorted((ROOT / "workloads").rglob("*.yaml"))


def validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((SCHEMAS / f"{kind}.json").read_text()))


def as_editors_read(text: str) -> Any:
    """In YAML 1.2 a number with underscores is a text."""
    return parse_yaml(re.sub(r"(?<=[ \[:])(\d+(?:_\d+)+)\b", r'"\1"', text))


@pytest.mark.parametrize("kind", ["run", "benchmark", "show"])
def test_what_is_published_is_current(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", kind]) == 0
    assert capsys.readouterr().out == (SCHEMAS / f"{kind}.json").read_text(), f"crossray schema {kind} > docs/schema/"
    Draft202012Validator.check_schema(json.loads((SCHEMAS / f"{kind}.json").read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_workload_names_its_schema_and_follows_it(path: Path) -> None:
    first, _, text = path.read_text().partition("\n")
    kind = "benchmark" if "world" in read_tree(path) else "run"
    named = Path(first.removeprefix(header("")))
    assert (path.parent / named).resolve() == SCHEMAS / f"{kind}.json"
    assert list(validator(kind).iter_errors(read_tree(path))) == []
    assert list(validator(kind).iter_errors(as_editors_read(text))) == []


@pytest.mark.parametrize(
    ("place", "value", "where"),
    [
        (("activations", "layers"), 3, "$.activations"),
        (("activations", "layer"), -1, "$.activations.layer"),
        (("training", "precision"), "int4", "$.training.precision"),
        (("training", "num_rows"), "many", "$.training.num_rows"),
        (("crosscoders", 0, "sparsity", "kind"), "magic", "$.crosscoders[0]"),
        (("models", "base"), {}, "$.models.base"),
    ],
)
def test_what_the_loader_refuses_is_marked_where_it_stands(place: tuple[Any, ...], value: Any, where: str) -> None:
    tree = read_tree(ROOT / "workloads" / "demo.yaml")
    node: Any = tree
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    with pytest.raises(InputError):
        validated(RunConfig, tree, "run")
    assert where in {error.json_path for error in validator("run").iter_errors(tree)}


def test_every_field_has_its_documentation() -> None:
    schema = json.loads((SCHEMAS / "run.json").read_text())
    sections = [schema, *schema["$defs"].values()]
    own = [(name, field) for section in sections for name, field in section["properties"].items() if name != "kind"]
    told = [field.get("description") or schema["$defs"][field.get("$ref", "/")[8:]]["description"] for _, field in own]
    assert len(told) > 150 and all(told)


def test_init_writes_the_schema_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    assert main(["init", "google/gemma-2-2b", "google/gemma-2-2b-it", "--output", str(path)]) == 0
    assert path.read_text().startswith(header(FILE_NAME) + "\n")
    schema = json.loads((tmp_path / FILE_NAME).read_text())
    assert schema == json.loads((SCHEMAS / "run.json").read_text())
    assert list(Draft202012Validator(schema).iter_errors(as_editors_read(path.read_text()))) == []
