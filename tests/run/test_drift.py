"""Why a step is stale is told in the fields that the user changed, at the step that they belong to."""

import re
from pathlib import Path
from typing import Any

import pytest
from runs import TINY, run_file

from pipeline.config.run_file import load
from pipeline.run.flow import build_flow
from pipeline.run.runner import DONE, STALE, inspect
from pipeline.storage.artifacts import write_record
from pipeline.storage.filesystem import Storage


def finish(path: Path) -> Storage:
    """Records of every step of a run, as if it had ended."""
    config = load(path)
    storage = Storage(config.storage.root)
    for step in build_flow(config).steps:
        write_record(storage, step.key, name=step.name, counts={}, seconds=1.0, run_name=config.name)
    return storage


def drift(path: Path, storage: Storage, *overrides: str) -> dict[str, list[str]]:
    """What is told of each stale step; the others are done."""
    states = inspect(load(path, overrides), storage)
    assert {state.state for state in states} <= {DONE, STALE}
    return {state.step.name: state.drift for state in states if state.state == STALE}


def test_the_field_is_told_where_it_was_changed_and_what_follows_names_what_it_reads(tmp_path: Path) -> None:
    path = run_file(tmp_path, str(tmp_path / "runs"))
    storage = finish(path)
    assert drift(path, storage) == {}
    found = drift(path, storage, "activations.norm_cap=7")
    assert found["activations"] == ["section.norm_cap: 10.0 -> 7.0"]
    assert "tokens" not in found
    assert len(found) > 3
    for name, lines in found.items():
        assert not any(re.search(r"[0-9a-f]{16}", line) for line in lines)
        if name != "activations" and not any(line.startswith("section.norm_cap") for line in lines):
            assert len(lines) == 1
            assert lines[0].startswith("reads other artifacts: ")


def test_a_changed_file_is_told_as_other_content(tmp_path: Path) -> None:
    text = tmp_path / "web.txt"
    text.write_text("one")
    source = {"name": "web", "kind": "text", "paths": [str(text)]}
    corpus: dict[str, Any] = {"sources": [*TINY["corpus"]["sources"], source]}
    path = run_file(tmp_path, str(tmp_path / "runs"), corpus=corpus)
    storage = finish(path)
    text.write_text("two")
    place = len(TINY["corpus"]["sources"])
    assert drift(path, storage)["corpus"] == [f"section.sources[{place}].paths[0]: other content"]


@pytest.mark.parametrize(("name", "kind"), [("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")])
def test_a_changed_model_is_told_by_what_of_it_changed(tmp_path: Path, name: str, kind: str) -> None:
    model = tmp_path / "chat"
    model.mkdir()
    for own in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / own).write_text("{}")
    models = {**TINY["models"], "chat": {"source": str(model)}}
    path = run_file(tmp_path, str(tmp_path / "runs"), models=models)
    storage = finish(path)
    (model / name).write_text("{ }")
    found = drift(path, storage)
    assert found["tokens"] == [f"section.models.chat.source.{kind}: other content"]
