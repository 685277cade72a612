"""The promises of SECURITY.md that are properties of the code and of what a run leaves behind."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from runs import Finished

from pipeline.config import RunConfig, _sections_in

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "pipeline").rglob("*.py"))


def sections(owner: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if owner in seen:
        return
    seen.add(owner)
    yield owner
    for field in owner.model_fields.values():
        for inner in _sections_in(field.annotation):
            yield from sections(inner, seen)


def test_no_key_of_a_run_file_holds_a_secret() -> None:
    """A key may name the environment variable that holds one (`..._env`)."""
    names = [name for section in sections(RunConfig, set()) for name in section.model_fields]
    assert len(names) > 100
    looks_secret = re.compile(r"password|secret|credential|api_?key|access_?key|auth|token$")
    assert not [name for name in names if looks_secret.search(name) and not name.endswith("_env")]


@pytest.mark.ray
def test_a_run_leaves_no_secret_behind(finished: Finished) -> None:
    """conftest sets HF_TOKEN before the run; nothing that was written or tracked may hold it."""
    secret = os.environ["HF_TOKEN"].encode()
    files = [path for path in finished.root.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not [path for path in files if secret in path.read_bytes()]
    told = repr(finished.tracker.runs).encode()
    assert b"crossray.fingerprint" in told and secret not in told


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_from_storage_is_unpickled(path: Path) -> None:
    """pickle serves messages between the processes of one run alone; torch.load reads tensors alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"):
            assert path.relative_to(ROOT) == Path("pipeline/stages/base.py"), f"line {node.lineno}"
        if ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", f"line {node.lineno}"


def test_remote_code_is_off_by_default() -> None:
    for section in sections(RunConfig, set()):
        if "trust_remote_code" in section.model_fields:
            assert section.model_fields["trust_remote_code"].default is False
