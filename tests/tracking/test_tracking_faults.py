"""Trouble with MLflow: refused before anything is computed, or told in one line while the run goes on."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

from pipeline.config.resources import TrackingSection
from pipeline.errors import InputError, RetryPolicy
from pipeline.storage.filesystem import Storage
from pipeline.tracking.choose import deliver_waiting, make_tracker
from pipeline.tracking.mlflow_tracker import MlflowTracker, safe_name
from pipeline.tracking.spool import FOLDER, SpooledTracker
from pipeline.tracking.tracker import Point, Tracker

AT_ONCE = RetryPolicy(first_wait_seconds=0.0, longest_wait_seconds=0.0, deadline_seconds=0.0)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an MLflow database, which takes long to make: here by two runs at the same time."""
    root = tmp_path_factory.mktemp("fresh")
    with ThreadPoolExecutor(2) as pool:
        trackers = list(pool.map(lambda _: make_tracker(TrackingSection(), Storage(str(root))), range(2)))
    for tracker in trackers:
        tracker.start_run("first", {})
    return root


@pytest.fixture
def database(fresh: Path, tmp_path: Path) -> Path:
    path = tmp_path / "root" / "mlflow" / "mlflow.db"
    path.parent.mkdir(parents=True)
    shutil.copy(fresh / "mlflow" / "mlflow.db", path)
    return path


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def client(database: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{database}")


def delete_experiment(database: Path) -> None:
    found = client(database).get_experiment_by_name("crossray")
    assert found is not None
    client(database).delete_experiment(found.experiment_id)


def of_version(version: str) -> Callable[[Path], None]:
    def change(database: Path) -> None:
        with sqlite3.connect(database) as connection:
            connection.execute("update alembic_version set version_num = ?", (version,))

    return change


def make_folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (delete_experiment, "tracking.experiment: "),
        (of_version("ffffffffffff"), "tracking.uri: "),
        (of_version("451aebb31d03"), "tracking.uri: "),
        (lambda database: database.write_bytes(b"no database" * 100), "tracking.uri: "),
        (make_folder, "tracking.uri: "),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_before_the_run(
    database: Path, storage: Storage, spoil: Callable[[Path], None], field: str
) -> None:
    spoil(database)
    with pytest.raises(InputError) as caught:
        make_tracker(TrackingSection(), storage)
    assert str(caught.value).startswith(field) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "uri",
    [
        "file:///nowhere/mlruns",
        "./mlruns",
        "gopher://host",
        "mysql://host/db",
        "mssql+pyodbc://host/db",
        "http://localhost:99999",
        "sqlite:////dev/null/x.db",
    ],
)
def test_an_address_that_is_no_server_is_refused_before_the_run(uri: str, storage: Storage) -> None:
    with pytest.raises(InputError) as caught:
        make_tracker(TrackingSection(uri=uri), storage)
    assert str(caught.value).startswith("tracking.uri: ") and uri in str(caught.value)
    assert "\n" not in str(caught.value)


def log_all(tracker: Tracker, run: str) -> None:
    tracker.log_params(run, {"a": 1})
    tracker.log_points(run, [Point("m", 1.0, 0, 1)])
    tracker.log_file(run, "f.txt", b"1")
    tracker.end_run(run, succeeded=True)
    tracker.close()


def test_a_deleted_run_goes_on_and_is_delivered_when_it_is_restored(database: Path, storage: Storage) -> None:
    said = list[str]()
    tracker = SpooledTracker(MlflowTracker(f"sqlite:///{database}", "crossray", None), storage, said.append)
    run = tracker.start_run("run", {})
    (mine,) = client(database).search_runs(["1"], "attributes.run_name = 'run'")
    client(database).delete_run(mine.info.run_id)
    log_all(tracker, run)
    assert len(said) == 2 and all(line.startswith("tracking: ") and storage.url(FOLDER) in line for line in said)
    client(database).restore_run(mine.info.run_id)
    deliver_waiting(TrackingSection(), storage, said.append)
    assert not storage.files(FOLDER)
    kept = client(database).get_run(mine.info.run_id)
    assert (kept.data.params, kept.data.metrics, kept.info.status) == ({"a": "1"}, {"m": 1.0}, "FINISHED")


def test_a_locked_database_stops_no_run(database: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    inner = MlflowTracker(f"sqlite:///{database}", "crossray", None)
    tracker = SpooledTracker(inner, storage, said.append, retries=AT_ONCE._replace(first_wait_seconds=60.0))
    run = tracker.start_run("run", {})

    def locked(*_: object, **__: object) -> None:
        with sqlite3.connect(database, timeout=0) as connection:
            connection.execute("create table t (x)")

    with sqlite3.connect(database, isolation_level=None) as connection:
        connection.execute("begin exclusive")
        monkeypatch.setattr(inner._client, "log_batch", _as_sqlalchemy(locked))  # MLflow itself waits for 20 s
        tracker.log_params(run, {"a": 1})
        assert len(storage.files(FOLDER)) == 1 and len(said) == 1
        connection.execute("rollback")
    monkeypatch.undo()
    tracker.end_run(run, succeeded=True)
    tracker.close()
    assert not storage.files(FOLDER)
    (kept,) = client(database).search_runs(["1"], "attributes.run_name = 'run'")
    assert kept.data.params == {"a": "1"}


def _as_sqlalchemy(function: Callable[..., None]) -> Callable[..., None]:
    """Faults as MLflow's store raises them."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    def call(*arguments: object, **options: object) -> None:
        try:
            function(*arguments, **options)
        except sqlite3.OperationalError as error:
            raise MlflowException(str(error)) from OperationalError("insert", None, error)

    return call


NAMES = ["..", "../x", "a\nb", "k" * 251, "x//y", "/root", "tab\t", "\x1b[31m", "a/./b", ". ", "", "\ud800"]


def test_names_that_mlflow_refuses_are_changed_and_stay_distinct(database: Path) -> None:
    tracker = MlflowTracker(f"sqlite:///{database}", "crossray", None)
    run = tracker.start_run("run", {})
    tracker.log_params(run, {name: str(place) for place, name in enumerate(NAMES)})
    tracker.log_points(run, [Point(name, float(place), 0, 1) for place, name in enumerate(NAMES)])
    for place, name in enumerate(NAMES):
        tracker.log_file(run, name, str(place).encode())
    kept = client(database).get_run(run).data
    assert sorted(kept.params.values()) == sorted(str(place) for place in range(len(NAMES)))
    assert sorted(kept.metrics.values()) == [float(place) for place in range(len(NAMES))]
    assert all(name in kept.params for name in map(safe_name, NAMES))
    assert safe_name("crosscoders.l1.sparsity.mu") == "crosscoders.l1.sparsity.mu"


ENTRY = {"action": "start_run", "run": "r", "name": "n", "tags": {"crossray.entry": "r"}}
BAD_ENTRIES = {
    "no JSON": b"{",
    "a list": b"[]",
    "an unknown action": json.dumps({**ENTRY, "action": "rm"}).encode(),
    "a missing key": b'{"action": "log_params"}',
    "another type": json.dumps({**ENTRY, "tags": 3}).encode(),
    "lost bytes": json.dumps({"action": "log_file", "run": "r", "has_data": True}).encode(),
    "an unknown run": json.dumps({"action": "end_run", "run": "nobody's"}).encode(),
    "a lost model": json.dumps({"action": "log_model", "run": "r"}).encode(),
    "another experiment": json.dumps({**ENTRY, "experiment": "other"}).encode(),
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_an_entry_that_cannot_be_delivered_stays_and_holds_up_nobody(
    kind: str, database: Path, storage: Storage
) -> None:
    good = json.dumps(ENTRY).encode()
    storage.write_bytes(f"{FOLDER}/old/000001.json", good)
    storage.write_bytes(f"{FOLDER}/old/000002.json", BAD_ENTRIES[kind])
    storage.write_bytes(f"{FOLDER}/old/stray.json", b"?")
    storage.write_bytes(f"{FOLDER}/zz/000001.json", json.dumps({**ENTRY, "run": "z"}).encode())
    said = list[str]()
    tracker = make_tracker(TrackingSection(), storage, said.append)
    run = tracker.start_run("mine", {})
    log_all(tracker, run)
    assert storage.files(FOLDER) == ["old/000002.json", "old/stray.json"]
    (told,) = [line for line in said if "old" in line]
    assert storage.url(f"{FOLDER}/old") in told
    assert {own.info.status for own in client(database).search_runs(["1"])} >= {"FINISHED"}


def test_storage_that_takes_no_spool_stops_no_run(database: Path, storage: Storage) -> None:
    said = list[str]()
    tracker = SpooledTracker(MlflowTracker(f"sqlite:///{database}", "crossray", None), storage, said.append)
    (Path(storage.root) / FOLDER).write_bytes(b"a file where the folder should be")
    log_all(tracker, "a run that nobody knows")
    assert len([line for line in said if "without them" in line]) == 1


def test_two_first_runs_make_one_database(fresh: Path) -> None:
    assert len(client(fresh / "mlflow" / "mlflow.db").search_runs(["1"])) == 2
