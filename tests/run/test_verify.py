"""Every kind of damage to a finished run is found, named and nothing else; verifying reads only."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from roots import SHARDS, Root, rows_of
from runs import contents

from pipeline.cli import main
from pipeline.errors import InputError
from pipeline.storage.activation_store import MANIFEST_NAME, ActivationStore
from pipeline.storage.artifacts import all_folders
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import Rows


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(Storage(str(tmp_path)))


@pytest.mark.parametrize("kind", ["none", "lossless", "int8"])
def test_what_is_whole_has_no_fault_and_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    root = Root(Storage(str(tmp_path)), kind)
    before = contents(tmp_path)
    result = root.verify()
    assert result.faults == ()
    assert (result.num_artifacts, result.num_unfinished) == (2, 0)
    assert result.num_bytes == sum(size for size, _ in before.values())
    assert contents(tmp_path) == before


@pytest.mark.s3
def test_an_object_store_is_verified_too(s3_root: str, tmp_path: Path) -> None:
    root = Root(Storage(f"{s3_root}/{tmp_path.name}"))
    assert root.verify().faults == ()
    root.storage.delete(f"{root.activations.folder}/train-00001.safetensors")
    assert "train-00001.safetensors: expected a shard, found none" in root.only_fault()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_byte_is_found_in_any_file(root: Root) -> None:
    flip(root.path("train-00001.safetensors"), -5)
    assert "damaged shard" in root.only_fault()
    flip(root.path("train-00001.safetensors"), -5)
    part = Path(root.storage.url(f"{root.tokens.folder}/part-1.parquet"))
    flip(part, len(part.read_bytes()) // 2)
    assert any("part-1.parquet: expected SHA-256" in f"{fault.where}: {fault.what}" for fault in root.verify().faults)


def test_a_truncated_and_a_missing_shard_are_found(root: Root) -> None:
    path = root.path("validation.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    root.path("train-00000.safetensors").unlink()
    found = [f"{fault.where}: {fault.what}" for fault in root.verify().faults]
    assert len(found) == 2
    assert "train-00000.safetensors: expected a shard, found none" in found[0]
    assert "got 200 bytes" in found[1]


def rebuilt(root: Root, name: str, rows: Rows, **counts: int) -> None:
    """Replace one shard by rows that its manifest agrees with: only the tokens can tell."""
    root.publish({own: rows if own == name else rows_of(*SHARDS[own]) for own in SHARDS}, **counts)


def changed(rows: Rows, **columns: torch.Tensor) -> Rows:
    return rows._replace(**columns)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (Rows(*(torch.cat([own, own[-1:]]) for own in rows_of(14))), "positions twice"),
        (rows_of(14, 14), "positions twice"),
        (rows_of(14, 12), "document 12: expected each row once, got 8 of them again"),
        (rows_of(14, 16), "document 16: expected it in the validation part, got it in train"),
        (Rows(*(own[1:] for own in rows_of(14))), "expected 27 rows, one per kept token, got 26"),
        (rows_of(14)._replace(token_id_B=rows_of(14).token_id_B + 1), "expected the tokens of the corpus"),
        (rows_of(14)._replace(doc_id_B=torch.full((5,), 99)), "document 99: expected none of its rows"),
        (Rows(*(own[:0] for own in rows_of(14))), "1 documents are missing, the first is 14"),
    ],
    ids=["doubled", "twice", "elsewhere", "split", "lost", "tokens", "foreign", "missing"],
)
def test_rows_that_the_tokens_do_not_know_are_found(root: Root, rows: Rows, expected: str) -> None:
    rebuilt(root, "train-00001.safetensors", rows)
    assert any(expected in fault.what for fault in root.verify().faults), root.verify().faults


def test_rows_above_the_norm_cap_may_be_missing_if_they_were_counted(root: Root) -> None:
    rebuilt(root, "train-00001.safetensors", Rows(*(own[1:] for own in rows_of(14))), num_rows_above_norm_cap=1)
    assert root.verify().faults == ()


def test_a_row_that_is_not_finite_is_found(root: Root) -> None:
    rows = rows_of(14)
    rows.x_BMD[2, 1, 0] = float("inf")
    rebuilt(root, "train-00001.safetensors", rows)
    assert "got NaN or Inf in row 2" in root.only_fault()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_manifest_that_disagrees_with_a_shard_is_found(root: Root) -> None:
    path = root.path(MANIFEST_NAME)
    edit(path, lambda value: value["shards"][0].update(num_rows=11))
    edit(root.path("record.json"), lambda value: value["checksums"].update({MANIFEST_NAME: _sha256(path)}))
    assert any("expected 11 rows of (2, 3)" in fault.what for fault in root.verify().faults)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_records_that_cannot_be_trusted_are_found(root: Root) -> None:
    path = root.path("record.json")
    good = path.read_text()
    edit(path, lambda value: value.update(schema_version=999))
    assert "expected an artifact of schema version" in root.only_fault()
    path.write_text("{")
    assert "expected JSON" in root.only_fault()
    path.write_text(good)
    edit(path, lambda value: value["identity"]["section"].update(layer=2))
    assert "whose identity has the fingerprint" in root.only_fault()


def test_what_is_unfinished_is_counted_and_not_judged(root: Root) -> None:
    root.path("record.json").unlink()
    result = root.verify()
    assert (result.num_artifacts, result.num_unfinished, result.faults) == (1, 1, ())


def test_the_command_does_not_call_an_unfinished_root_good(root: Root, capfd: pytest.CaptureFixture[str]) -> None:
    root.path("record.json").unlink()
    assert main(["verify", "--root", root.storage.root]) == 1
    assert "1 artifacts" in (out := capfd.readouterr().out)
    assert "1 unfinished" in out


@pytest.mark.parametrize("name", ["part-0.parquet", "validation.safetensors"])
@pytest.mark.parametrize("target", ["copy", "loop", "nowhere"])
def test_a_link_that_leads_out_is_a_fault_and_is_not_followed(
    root: Root, tmp_path_factory: pytest.TempPathFactory, name: str, target: str
) -> None:
    folder = root.tokens.folder if name.endswith("parquet") else root.activations.folder
    file, outside = Path(root.storage.url(f"{folder}/{name}")), tmp_path_factory.mktemp("outside")
    file.rename(outside / name)
    file.symlink_to({"copy": outside / name, "loop": file, "nowhere": outside / "absent"}[target])
    faults = root.verify().faults
    assert any(fault.where.endswith(name) and "leads out" in fault.what for fault in faults), faults


def test_a_root_and_its_stages_may_be_links(root: Root, tmp_path_factory: pytest.TempPathFactory) -> None:
    disk = tmp_path_factory.mktemp("disk")
    (Path(root.storage.root) / "activations").rename(disk / "activations")
    (Path(root.storage.root) / "activations").symlink_to(disk / "activations")
    (disk / "root").symlink_to(root.storage.root)
    assert root.verify().faults == ()
    assert main(["verify", "--root", str(disk / "root")]) == 0


@pytest.mark.parametrize("name", ["../../../etc/hostname", "/etc/hostname", "a/../../x"])
def test_a_record_that_names_files_elsewhere_is_a_fault(root: Root, name: str) -> None:
    edit(root.path("record.json"), lambda value: value["checksums"].update({name: "0" * 64}))
    assert "leads out" in root.only_fault()


WRONG_TYPES: list[Any] = [None, 5, "x", [1], {"a": 1}]


@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=["null", "number", "text", "list", "object"])
@pytest.mark.parametrize("part", ["checksums", "counts", "identity", "identity.section", "identity.inputs", "stage"])
def test_parts_of_a_record_of_another_type_are_faults(root: Root, part: str, wrong: Any) -> None:
    def change(value: dict[str, Any]) -> None:
        *parents, last = part.split(".")
        for parent in parents:
            value = value[parent]
        value[last] = wrong

    edit(root.path("record.json"), change)
    faults = root.verify().faults
    assert faults or (part, wrong) == ("counts", {"a": 1})
    assert all(len(fault.what) < 500 for fault in faults)


@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=["null", "number", "text", "list", "object"])
@pytest.mark.parametrize("field", ["name", "num_rows", "num_bytes", "sha256", "split"])
def test_parts_of_a_manifest_of_another_type_are_faults(root: Root, field: str, wrong: Any) -> None:
    path = root.path(MANIFEST_NAME)
    edit(path, lambda value: value["shards"][0].update({field: wrong}))
    edit(root.path("record.json"), lambda value: value["checksums"].update({MANIFEST_NAME: _sha256(path)}))
    assert root.verify().faults


def test_the_command_prints_a_line_per_fault_and_exits_with_2(root: Root, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--root", root.storage.root]) == 0
    assert "2 artifacts" in capfd.readouterr().out
    root.path("train-00000.safetensors").unlink()
    flip(root.path("validation.safetensors"), -1)
    assert main(["verify", "--root", root.storage.root]) == 2
    captured = capfd.readouterr()
    assert len([line for line in captured.err.splitlines() if line.startswith("fault ")]) == 2
    assert "2 faults" in captured.out
    assert main(["verify", "--root", f"{root.storage.root}/nowhere"]) == 2
    assert "expected a storage root" in capfd.readouterr().err


def test_a_root_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a storage root"):
        all_folders(Storage(str(tmp_path / "nowhere")))


def test_a_whole_store_can_be_read_after_it_was_verified(root: Root) -> None:
    store = ActivationStore(root.storage, root.activations.folder)
    assert sum(len(store.read(shard).x_BMD) for shard in store.manifest.shards) == 27
