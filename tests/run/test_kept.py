"""`crossray runs` and `crossray rm`: which artifacts belong to whom, and what stays because others read it."""

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import CrossrayError, InputError
from pipeline.run.kept import kept_runs, removal, remove
from pipeline.storage.artifacts import RECORD_NAME, all_folders, artifact_key, write_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.locks import locked


def make(storage: Storage, stage: str, run: str, *, reads: dict[str, str] | None = None, size: int = 10) -> str:
    """An artifact with one file of so many bytes; its fingerprint."""
    section = {"name": run, "crosscoders": ["l1"]} if stage == "report" else {"of": run}
    key = artifact_key(stage, 1, section, reads or {})
    storage.write_bytes(f"{key.folder}/data", b"x" * size)
    write_record(storage, key, name=stage, counts={}, seconds=1.0, run_name=run)
    return key.fingerprint


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Run `a` made the corpus, which `b` reads too; `c` has a corpus alone."""
    storage = Storage(str(tmp_path / "runs"))
    corpus = make(storage, "corpus", "a", size=1000)
    for run in ("a", "b"):
        latents = make(storage, "latents", run, reads={"corpus": corpus}, size=500)
        make(storage, "report", run, reads={"latents l1": latents}, size=100)
    make(storage, "corpus", "c", size=300)
    return storage


def aged(storage: Storage, run: str, days: float) -> None:
    for folder in all_folders(storage):
        record = storage.read_json(f"{folder}/{RECORD_NAME}")
        if record["run_name"] == run:
            created = datetime.now(UTC) - timedelta(days=days)
            record["provenance"]["created"] = created.isoformat(timespec="seconds")
            storage.write_json(f"{folder}/{RECORD_NAME}", record)


def test_runs_are_listed_with_what_they_made(storage: Storage) -> None:
    found = {run.name: run for run in kept_runs(storage)}
    assert {name: run.num_artifacts for name, run in found.items()} == {"a": 3, "b": 2, "c": 1}
    assert found["a"].crosscoders == ("l1",) and str(found["a"].report).endswith("report.html")
    assert found["c"].report is None
    aged(storage, "a", 3)
    assert [run.name for run in kept_runs(storage)][-1] == "a"


def test_what_another_run_reads_stays(storage: Storage) -> None:
    planned = removal(storage, ["a"])
    assert {folder.partition("/")[0] for folder in planned.sizes} == {"latents", "report"}
    assert planned.num_kept == 1 and planned.num_bytes > 600
    remove(storage, planned)
    assert {run.name: run.num_artifacts for run in kept_runs(storage)} == {"a": 1, "b": 2, "c": 1}
    assert removal(storage, ["a", "b"]).num_kept == 0
    remove(storage, removal(storage, ["a", "b"]))
    assert [run.name for run in kept_runs(storage)] == ["c"]


def test_sizes_are_those_of_all_files(storage: Storage) -> None:
    (folder,) = removal(storage, ["c"]).sizes
    on_disk = sum(path.stat().st_size for path in (Path(storage.root) / folder).rglob("*"))
    assert removal(storage, ["c"]).num_bytes == on_disk > 300


def test_age_is_that_of_the_newest_artifact(storage: Storage) -> None:
    aged(storage, "c", 40)
    aged(storage, "b", 20)
    assert removal(storage, [], older_than_days=30).runs == ("c",)
    assert removal(storage, [], older_than_days=10).runs == ("b", "c")
    assert removal(storage, [], older_than_days=50).sizes == {}


def test_what_cannot_be_removed_is_refused(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a, b, c"):
        removal(storage, ["d"])
    with pytest.raises(InputError, match="older-than"):
        removal(storage, [])
    with pytest.raises(InputError, match="nowhere"):
        kept_runs(Storage(str(tmp_path / "nowhere")))
    planned = removal(storage, ["c"])
    with locked(storage, list(planned.sizes), "c"), pytest.raises(CrossrayError):
        remove(storage, planned)
    assert removal(storage, ["c"]) == planned


def test_a_damaged_record_hides_no_other(storage: Storage) -> None:
    (folder,) = removal(storage, ["c"]).sizes
    storage.write_bytes(f"{folder}/{RECORD_NAME}", json.dumps({"schema_version": 0}).encode())
    assert {run.name for run in kept_runs(storage)} == {"a", "b"}


def test_the_command_removes_only_what_it_was_told_to(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "c", "--root", storage.root]) == 0  # nobody is there to ask
    assert {run.name for run in kept_runs(storage)} == {"a", "b", "c"}
    assert main(["rm", "c", "--root", storage.root, "--yes"]) == 0
    capsys.readouterr()
    assert main(["runs", "--root", storage.root]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]
    assert main(["rm", "c", "--root", storage.root]) == 2


class Terminal(io.StringIO):
    """Standard input with somebody in front of it."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "left"), [("y\n", {"a", "b"}), ("\n", {"a", "b", "c"}), ("no\n", {"a", "b", "c"})])
def test_a_person_is_asked(storage: Storage, monkeypatch: pytest.MonkeyPatch, answer: str, left: set[str]) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert main(["rm", "c", "--root", storage.root]) == 0
    assert {run.name for run in kept_runs(storage)} == left
