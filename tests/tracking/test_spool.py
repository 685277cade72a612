"""A tracking server that goes away: nothing is lost, nothing is doubled, order is kept."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from runs import TINY, Finished, has_checkpoint, run_file, start, wait_for
from servers import free_port, served

from pipeline.errors import RetryPolicy
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.storage.filesystem import Storage
from pipeline.tracking.mlflow_tracker import MlflowTracker
from pipeline.tracking.spool import FOLDER, RETRIES, SpooledTracker
from pipeline.tracking.tracker import ENTRY_TAG, Dataset, Point, RecordingTracker, TrackerAwayError


class Unreliable(RecordingTracker):
    """Keeps what it is told, unless it is away; may also keep it and lose the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.loses_answer = False
        self.calls: list[str] = []

    def _meet(self, action: str) -> None:
        if self.is_away:
            raise TrackerAwayError("nobody there")
        self.calls.append(action)

    def _answer(self) -> None:
        if self.loses_answer:
            self.loses_answer, self.is_away = False, True
            raise TrackerAwayError("the answer was lost")

    def start_run(self, name: str, tags: Any, parent: str | None = None, time_ms: int | None = None) -> str:
        self._meet(f"start {name}")
        known = [run for run, kept in self.runs.items() if kept.tags.get(ENTRY_TAG) == tags[ENTRY_TAG]]
        run = known[0] if known else super().start_run(name, tags, parent)
        self._answer()
        return run

    def log_points(self, run: str, points: Any) -> None:
        self._meet(f"points {len(points)}")
        super().log_points(run, [point for point in points if point not in self.runs[run].points])
        self._answer()

    def log_file(self, run: str, name: str, data: bytes) -> None:
        self._meet(f"file {name}")
        super().log_file(run, name, data)

    def log_inputs(self, run: str, datasets: Any) -> None:
        self._meet("inputs")
        super().log_inputs(run, datasets)
        self._answer()

    def log_model(self, run: str, folder: Path, tags: Any) -> None:
        self._meet("model")
        self.runs[run].models.append(Path(*(path.name for path in sorted(folder.iterdir()))))

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:
        self._meet("end")
        super().end_run(run, succeeded=succeeded)


STORE = Dataset("activations", "0123456789abcdef", "s3://bucket/activations/0123456789abcdef", {"num_rows": 3.0})


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


AT_ONCE = RetryPolicy(first_wait_seconds=0.0, longest_wait_seconds=0.0, deadline_seconds=0.0)
"""Asks again at every call, and only once at the end."""


def points(first: int, last: int) -> list[Point]:
    return [Point("loss", 1.0 / step, step, 1000 + step) for step in range(first, last)]


def test_nothing_is_written_while_the_server_answers(storage: Storage) -> None:
    server = Unreliable()
    tracker = SpooledTracker(server, storage, lambda _: None)
    run = tracker.start_run("run", {})
    tracker.log_points(run, points(1, 4))
    tracker.end_run(run, succeeded=True)
    tracker.close()
    assert server.calls == ["start run", "points 3", "end"]
    assert not storage.exists(FOLDER)


def test_what_waits_is_delivered_in_order_once(storage: Storage) -> None:
    server, said = Unreliable(), list[str]()
    tracker = SpooledTracker(server, storage, said.append, retries=AT_ONCE)
    parent = tracker.start_run("parent", {"a": "b"})
    tracker.log_points(parent, points(1, 3))
    server.is_away = True
    child = tracker.start_run("child", {}, parent=parent)
    tracker.log_points(child, points(3, 5))
    tracker.log_inputs(child, [STORE])
    tracker.log_file(child, "table.bin", b"\x00\xff")
    (storage_folder := Path(storage.root).parent / "model").mkdir()
    (storage_folder / "weights").write_bytes(b"w")
    tracker.log_model(child, storage_folder, {})
    tracker.end_run(child, succeeded=True)
    assert len(storage.files(FOLDER)) == 6 + 2
    server.is_away = False
    tracker.log_points(parent, points(5, 6))
    while_away = ["start child", "points 2", "inputs", "file table.bin", "model", "end"]
    assert server.calls == ["start parent", "points 2", *while_away, "points 1"]
    kept = {run.name: run for run in server.runs.values()}
    assert kept["child"].parent == next(run for run, own in server.runs.items() if own.name == "parent")
    assert kept["parent"].points == points(1, 3) + points(5, 6) and kept["child"].points == points(3, 5)
    assert kept["child"].files == {"table.bin": b"\x00\xff"} and kept["child"].models == [Path("weights")]
    assert kept["child"].inputs == [STORE]
    assert not storage.files(FOLDER)
    assert [line.split(";")[0] for line in said] == [
        "tracking: nobody there",
        "tracking: the server is back, 6 waiting entries were delivered",
    ]


@pytest.mark.parametrize("action", ["start", "points", "inputs"])
def test_a_call_whose_answer_is_lost_leaves_nothing_twice(storage: Storage, action: str) -> None:
    server = Unreliable()
    tracker = SpooledTracker(server, storage, lambda _: None)
    run = tracker.start_run("first", {})
    server.loses_answer = True
    second = tracker.start_run("second", {}) if action == "start" else run
    if action == "inputs":
        tracker.log_inputs(run, [STORE])
    tracker.log_points(second, points(1, 3))
    server.is_away = False
    tracker.close()
    assert [kept.name for kept in server.runs.values()] == (["first", "second"] if action == "start" else ["first"])
    assert list(server.runs.values())[-1].points == points(1, 3)
    assert list(server.runs.values())[-1].inputs == ([STORE] if action == "inputs" else [])


def test_what_still_waits_at_the_end_is_delivered_by_the_next_run(storage: Storage) -> None:
    server, said = Unreliable(), list[str]()
    tracker = SpooledTracker(server, storage, said.append, retries=AT_ONCE)
    run = tracker.start_run("first", {})
    server.is_away = True
    tracker.log_points(run, points(1, 3))
    tracker.end_run(run, succeeded=True)
    tracker.close()
    assert "2 entries wait in" in said[-1]
    server.is_away = False
    SpooledTracker(server, storage, said.append)
    assert said[-1] == "tracking: 2 entries of a former run were delivered"
    (kept,) = server.runs.values()
    assert (kept.points, kept.ended) == (points(1, 3), [True])
    assert not storage.files(FOLDER)


def test_closing_waits_for_the_server_until_the_deadline(storage: Storage) -> None:
    server, said, seconds = Unreliable(), list[str](), [0.0]

    def sleep(wait: float) -> None:
        seconds[0] += wait
        server.is_away = seconds[0] < 20

    retries = RETRIES._replace(sleep=sleep, clock=lambda: seconds[0])
    tracker = SpooledTracker(server, storage, said.append, retries=retries)
    run = tracker.start_run("first", {})
    server.is_away = True
    tracker.log_points(run, points(1, 3))
    tracker.close()
    assert seconds[0] == 20.0
    assert server.runs[tracker_id(server)].points == points(1, 3)
    assert said[-1] == "tracking: the server is back, 1 waiting entries were delivered"


def tracker_id(server: Unreliable) -> str:
    (run,) = server.runs
    return run


@pytest.fixture
def mlflow_command(tmp_path: Path) -> Iterator[tuple[list[str], str]]:
    """The command of an MLflow server with its own database, and its address."""
    port = free_port()
    yield (
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"),
            *("--artifacts-destination", str(tmp_path / "artifacts")),
        ],
        f"http://127.0.0.1:{port}",
    )


@pytest.mark.rare
def test_a_real_server_misses_nothing_while_it_is_stopped(
    mlflow_command: tuple[list[str], str], storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, url = mlflow_command
    often = RetryPolicy(first_wait_seconds=0.0, longest_wait_seconds=0.0, deadline_seconds=60.0)
    torch.manual_seed(0)
    Crosscoder(16, 2, 4).save_pretrained(tmp_path / "model")
    with served(command, f"{url}/health", tmp_path / "one.log", seconds=300):
        tracker = SpooledTracker(MlflowTracker(url, "spool", None), storage, lambda _: None, retries=often)
        parent = tracker.start_run("parent", {})
        tracker.log_points(parent, points(1, 50))
    child = tracker.start_run("child", {}, parent=parent)
    tracker.log_points(child, points(1, 30))
    tracker.log_points(parent, points(50, 80))
    tracker.log_inputs(child, [STORE])
    tracker.log_file(child, "figures/a.svg", b"<svg/>")
    tracker.log_model(child, tmp_path / "model", {})
    tracker.end_run(child, succeeded=True)
    assert storage.files(FOLDER)
    with served(command, f"{url}/health", tmp_path / "two.log", seconds=300):
        tracker.end_run(parent, succeeded=True)
        tracker.close()
        client = mlflow.MlflowClient(tracking_uri=url)
        experiment = client.get_experiment_by_name("spool")
        assert experiment is not None
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert {name: run.info.status for name, run in runs.items()} == {"parent": "FINISHED", "child": "FINISHED"}
        for name, last in (("parent", 80), ("child", 30)):
            history = client.get_metric_history(runs[name].info.run_id, "loss")
            assert sorted(metric.step for metric in history) == list(range(1, last))
        assert [one.dataset.digest for one in runs["child"].inputs.dataset_inputs] == [STORE.digest]
        own = runs["child"].info.run_id
        assert [file.path for file in client.list_artifacts(own, "figures")] == ["figures/a.svg"]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)  # undone afterwards, unlike set_tracking_uri alone
        mlflow.set_tracking_uri(url)
        mlflow.pyfunc.load_model(f"runs:/{own}/crosscoder")
    assert not storage.files(FOLDER)


@pytest.mark.rare
def test_a_run_goes_on_while_mlflow_is_stopped(
    finished: Finished, mlflow_command: tuple[list[str], str], tmp_path: Path
) -> None:
    command, url = mlflow_command
    root = tmp_path / "runs"
    for stage in ("organism", "corpus", "tokens", "activations"):
        shutil.copytree(finished.root / stage, root / stage)
    path = run_file(
        tmp_path,
        str(root),
        training={"batch_rows": 256, "num_rows": 256 * 600},
        crosscoders=TINY["crosscoders"][1:],
        analyses={**TINY["analyses"], "causality": None, "planted": None, "steering": None},
        tracking={"uri": url, "experiment": "away", "log_every_steps": 10},
    )
    with served(command, f"{url}/health", tmp_path / "one.log", seconds=300):
        process = start(path)
        wait_for(lambda: has_checkpoint(root), process)
    wait_for(lambda: any((root / FOLDER).rglob("*")), process)  # what cannot be delivered waits there
    with served(command, f"{url}/health", tmp_path / "two.log", seconds=300):
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]
        assert "the run goes on" in errors and "the server is back" in errors
        client = mlflow.MlflowClient(tracking_uri=url)
        experiment = client.get_experiment_by_name("away")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert {run.info.status for run in runs} == {"FINISHED"}
        assert len({run.info.run_name for run in runs}) == len(runs)
        for run in runs:
            if run.info.run_name.startswith("crosscoder"):
                steps = sorted(m.step for m in client.get_metric_history(run.info.run_id, "train/loss"))
                assert steps == list(range(10, 601, 10))
