"""Identity and records: what was asked for decides, and nothing else."""

from pathlib import Path

import pytest

from pipeline.errors import ArtifactError
from pipeline.storage.artifacts import (
    RECORD_NAME,
    artifact_key,
    differing_fields,
    fingerprint_of,
    nearest_drift,
    read_record,
    write_record,
)
from pipeline.storage.filesystem import Storage


def test_a_fingerprint_depends_on_values_not_on_order() -> None:
    assert fingerprint_of({"a": 1, "b": [1, 2]}) == fingerprint_of({"b": [1, 2], "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})
    assert fingerprint_of({"a": [1, 2]}) != fingerprint_of({"a": [2, 1]})


@pytest.mark.parametrize("value", [{"a": object()}, {"a": {1, 2}}, {1: "a"}, {"a": float("nan")}, {"a": b"x"}])
def test_what_has_no_canonical_form_is_an_error(value: object) -> None:
    with pytest.raises((TypeError, ValueError), match="fingerprint"):
        fingerprint_of(value)


def test_stage_version_section_and_inputs_all_bear_identity() -> None:
    keys = {
        artifact_key("a", 1, {"x": 1}, {"i": "0"}).fingerprint,
        artifact_key("b", 1, {"x": 1}, {"i": "0"}).fingerprint,
        artifact_key("a", 2, {"x": 1}, {"i": "0"}).fingerprint,
        artifact_key("a", 1, {"x": 2}, {"i": "0"}).fingerprint,
        artifact_key("a", 1, {"x": 1}, {"i": "1"}).fingerprint,
    }
    assert len(keys) == 5


def test_a_folder_without_a_record_is_not_complete(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    key = artifact_key("stage", 1, {}, {})
    storage.write_bytes(f"{key.folder}/data", b"1")
    assert read_record(storage, key) is None
    written = write_record(storage, key, name="stage", counts={"n": 1}, seconds=1.0, run_name="r")
    assert read_record(storage, key) == written
    assert written.checksums == {"data": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"}


def test_a_record_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    key = artifact_key("stage", 1, {}, {})
    write_record(storage, key, name="stage", counts={}, seconds=0.0, run_name="r")
    value = storage.read_json(f"{key.folder}/record.json")
    storage.write_json(f"{key.folder}/record.json", {**value, "schema_version": 99})
    with pytest.raises(ArtifactError, match=r"version 1.* 99"):
        read_record(storage, key)
    storage.write_json(f"{key.folder}/record.json", {"schema_version": 1})
    with pytest.raises(ArtifactError, match="not a complete record"):
        read_record(storage, key)


def test_drift_names_the_fields_of_the_most_similar_artifact(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for layer, width, run_name in ((2, 8, "r"), (3, 9, "r"), (4, 8, "other")):
        key = artifact_key("stage", 1, {"layer": layer, "width": width}, {})
        write_record(storage, key, name="stage", counts={}, seconds=0.0, run_name=run_name)
    wanted = artifact_key("stage", 1, {"layer": 4, "width": 9}, {})
    assert nearest_drift(storage, wanted, name="stage", run_name="r") == ["section.layer: 3 -> 4"]
    assert nearest_drift(storage, wanted, name="stage", run_name="nobody") == []
    assert nearest_drift(storage, wanted, name="stage two", run_name="r") == []


def test_differing_fields_of_nested_values() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 0}
    new = {"a": {"b": 2, "c": [1, 3]}, "e": 0}
    assert differing_fields(old, new) == ["a.b: 1 -> 2", "a.c[1]: 2 -> 3", "d: 0 -> null", "e: null -> 0"]
    assert differing_fields(old, old) == []
    assert differing_fields({"a": "sha256:12"}, {"a": "sha256:34"}) == ["a: other content"]
    assert differing_fields({"a": "sha256:12"}, {"a": "hub/id"}) == ['a: "sha256:12" -> "hub/id"']


WRONG_PARTS = {
    "stage": 3,
    "name": None,
    "identity": "x",
    "counts": [],
    "checksums": {"a": 1},
    "seconds": "long",
    "provenance": 4,
    "unknown": 1,
}


@pytest.mark.parametrize("part", WRONG_PARTS)
def test_a_record_whose_parts_have_another_type_is_named(part: str, tmp_path: Path) -> None:
    storage, key = Storage(str(tmp_path)), artifact_key("a", 1, {}, {})
    write_record(storage, key, name="a", counts={"n": 1}, seconds=1.0, run_name="r")
    where = f"{key.folder}/{RECORD_NAME}"
    storage.write_json(where, {**storage.read_json(where), part: WRONG_PARTS[part]})
    with pytest.raises(ArtifactError) as caught:
        read_record(storage, key)
    assert part in str(caught.value) and key.folder in str(caught.value) and len(str(caught.value)) < 600


def test_the_record_of_another_artifact_is_refused_in_its_place(tmp_path: Path) -> None:
    storage, key, other = Storage(str(tmp_path)), artifact_key("a", 1, {}, {}), artifact_key("a", 2, {}, {})
    write_record(storage, other, name="a", counts={}, seconds=1.0, run_name="r")
    storage.write_json(f"{key.folder}/{RECORD_NAME}", storage.read_json(f"{other.folder}/{RECORD_NAME}"))
    with pytest.raises(ArtifactError, match=f"{key.folder}.*{other.folder}"):
        read_record(storage, key)


@pytest.mark.parametrize("value", ["x", 3, [1], {"name": "n"}])
def test_a_stray_record_is_no_former_state(value: object, tmp_path: Path) -> None:
    storage, key = Storage(str(tmp_path)), artifact_key("a", 1, {}, {})
    storage.write_json(f"a/0123/{RECORD_NAME}", value)
    assert nearest_drift(storage, key, name="n", run_name="r") == []
