"""A run file that counts its layers from 1 is told which number names the same place now."""

from pathlib import Path
from typing import Any

import pytest
from runs import run_file

from pipeline.config.run_file import load
from pipeline.run.flow import build_flow
from pipeline.run.runner import notes
from pipeline.storage.artifacts import ArtifactKey, fingerprint_of, write_record
from pipeline.storage.filesystem import Storage


def publish(storage: Storage, path: Path, *, version: int, run_name: str, **section: Any) -> None:
    """The record of activations as an earlier release wrote it; it had fewer settings."""
    own = build_flow(load(path)).data.activations.key.identity
    kept = {name: value for name, value in own["section"].items() if name != "norm_cap"}
    identity = {**own, "version": version, "section": {**kept, **section}, "inputs": {"tokens": "of then"}}
    key = ArtifactKey("activations", fingerprint_of(identity), identity)
    write_record(storage, key, name="activations", counts={}, seconds=1.0, run_name=run_name)


@pytest.mark.parametrize(
    ("version", "former", "run_name", "is_said"),
    [
        (3, {}, "tiny", True),
        (4, {}, "tiny", False),  # made since
        (3, {"layer": 2}, "tiny", False),  # the run file was changed already
        (3, {"drop_first_tokens": 5}, "tiny", False),
        (3, {}, "another", False),
    ],
)
def test_the_number_that_keeps_the_place_is_named(
    tmp_path: Path, version: int, former: dict[str, Any], run_name: str, is_said: bool
) -> None:
    path, storage = run_file(tmp_path, str(tmp_path / "runs")), Storage(str(tmp_path / "runs"))
    before = notes(load(path), storage)
    publish(storage, path, version=version, run_name=run_name, **former)
    said = [line for line in notes(load(path), storage) if line not in before]
    assert len(said) == is_said
    for line in said:
        assert "model.layers[1]" in line and "set activations.layer to 0" in line
