"""The tracking seam: MLflow in a SQLite file and on a real server, and what the recording tracker keeps."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.resources import TrackingSection
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.storage.filesystem import Storage
from pipeline.tracking.choose import make_tracker
from pipeline.tracking.mlflow_tracker import MlflowTracker
from pipeline.tracking.tracker import Dataset, NoopTracker, Point, RecordingTracker, Tracker, flatten


@pytest.fixture(params=["sqlite", "server"])
def tracker(request: pytest.FixtureRequest, tmp_path: Path) -> MlflowTracker:
    if request.param == "server":
        return MlflowTracker(request.getfixturevalue("mlflow_server"), "crossray", None)
    return MlflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "crossray", (tmp_path / "artifacts").as_uri())


def client(tracker: MlflowTracker) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=tracker.uri)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    crosscoder = Crosscoder(16, 2, 4)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.normal_()
    crosscoder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_run_can_be_read_back(
    tracker: MlflowTracker, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    parent = tracker.start_run("parent", {"crossray.run_name": "demo"})
    child = tracker.start_run("child", {"crossray.stage": "crosscoder"}, parent=parent)
    tracker.log_params(child, {"sparsity": {"kind": "l1", "mu": 0.1}, "seed": 0})
    curve = [Point("train/loss", 1.0 / step, step, 1000 + step) for step in range(1, 2502)]
    tracker.log_points(child, curve)
    tracker.log_file(child, "figures/a.svg", b"<svg/>")
    datasets = [
        Dataset("activations", "0123456789abcdef", "s3://bucket/runs/activations/0123456789abcdef", {"num_rows": 3.0}),
        Dataset("tokens", "fedcba9876543210", "/runs/tokens/fedcba9876543210", {"num_rows": 2, "num_bytes": 9}),
    ]
    tracker.log_inputs(child, datasets)
    tracker.log_inputs(child, datasets)
    tracker.log_model(child, model_folder, {"crossray.fingerprint": "abc"})
    tracker.end_run(child, succeeded=True)
    tracker.end_run(parent, succeeded=False)

    read = client(tracker)
    inputs = [one.dataset for one in read.get_run(child).inputs.dataset_inputs]
    assert {(one.name, one.digest, mlflow.data.get_source(one).uri) for one in inputs} == {one[:3] for one in datasets}
    assert {one.name: json.loads(one.profile) for one in inputs} == {one.name: one.profile for one in datasets}
    assert read.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert read.get_run(child).data.params == {"sparsity.kind": "l1", "sparsity.mu": "0.1", "seed": "0"}
    history = read.get_metric_history(child, "train/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(p.step, p.value) for p in curve]
    assert [f.path for f in read.list_artifacts(child, "figures")] == ["figures/a.svg"]
    assert read.get_run(child).info.status == "FINISHED"
    assert read.get_run(parent).info.status == "FAILED"

    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)  # undone afterwards, unlike set_tracking_uri alone
    mlflow.set_tracking_uri(tracker.uri)
    loaded = mlflow.pyfunc.load_model(f"runs:/{child}/crosscoder")
    x_BMD = torch.randn(5, 2, 4)
    expected_BF = Crosscoder.from_pretrained(model_folder).encode(x_BMD).to_dense()
    np.testing.assert_allclose(loaded.predict(x_BMD.numpy()), expected_BF.numpy(), rtol=1e-6)
    assert expected_BF.any()


def test_the_link_leads_to_the_run(tracker: MlflowTracker) -> None:
    run = tracker.start_run("run", {})
    link = tracker.link(run)
    assert (
        run in link if tracker.uri.startswith("http") else link.endswith(f"mlflow ui --backend-store-uri {tracker.uri}")
    )


def test_a_server_that_is_not_there_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"tracking\.uri: .*'http://127\.0\.0\.1:9'"):
        make_tracker(TrackingSection(uri="http://127.0.0.1:9"), Storage(str(tmp_path)))


def test_tracking_can_be_off(tmp_path: Path) -> None:
    tracker = make_tracker(TrackingSection(kind="none"), Storage(str(tmp_path)))
    assert isinstance(tracker, NoopTracker)
    assert list(tmp_path.iterdir()) == []


def test_the_recording_tracker_keeps_everything() -> None:
    tracker: Tracker = RecordingTracker()
    parent = tracker.start_run("p", {"a": "b"})
    child = tracker.start_run("c", {}, parent=parent)
    tracker.log_points(child, [Point("x", 1.0, 2, 3)])
    tracker.log_file(child, "f", b"1")
    tracker.end_run(child, succeeded=True)
    assert isinstance(tracker, RecordingTracker)
    run = tracker.runs[child]
    assert (run.name, run.parent, run.points, run.files, run.ended) == (
        "c", parent, [Point("x", 1.0, 2, 3)], {"f": b"1"}, [True],
    )  # fmt: skip


def test_nested_settings_get_dotted_names() -> None:
    assert flatten({"a": {"b": 1}, "c": [{"name": "n", "d": 2}], "e": [1, 2]}) == {
        "a.b": "1",
        "c.n.name": "n",
        "c.n.d": "2",
        "e": "[1, 2]",
    }
