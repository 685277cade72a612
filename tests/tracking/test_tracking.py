"""The tracking seam: MLflow in a SQLite file and on a real server, and what the recording tracker keeps."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from runs import run_file

from pipeline.config.resources import TrackingSection
from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.run.flow import build_flow
from pipeline.storage.filesystem import Storage
from pipeline.tracking.choose import make_tracker
from pipeline.tracking.mlflow_tracker import MlflowTracker
from pipeline.tracking.run_log import RunLog
from pipeline.tracking.spool import SpooledTracker
from pipeline.tracking.tracker import NOTE_TAG, Dataset, NoopTracker, Point, RecordingTracker, Tracker, flatten


@pytest.fixture(params=["sqlite", "server"])
def tracker(request: pytest.FixtureRequest, tmp_path: Path) -> MlflowTracker:
    if request.param == "server":
        return MlflowTracker(request.getfixturevalue("mlflow_server"), "crossray", None)
    return MlflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "crossray", (tmp_path / "artifacts").as_uri())


@pytest.fixture
def on_server(mlflow_server: str) -> MlflowTracker:
    return MlflowTracker(mlflow_server, "crossray", None)


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
    tracker.log_tags(child, {NOTE_TAG: "what came out"})
    tracker.log_file(child, "figures/a.png", b"png")
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
    assert [f.path for f in read.list_artifacts(child, "figures")] == ["figures/a.png"]
    assert read.get_run(child).data.tags[NOTE_TAG] == "what came out"
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
    signature = loaded.metadata.signature
    assert [part.inputs[0].shape for part in (signature.inputs, signature.outputs)] == [(-1, 2, 4), (-1, 16)]
    assert np.shape(loaded.input_example) == (2, 2, 4)
    (model,) = read.get_run(child).outputs.model_outputs
    assert mlflow.register_model(f"models:/{model.model_id}", "crosscoder").version


def test_a_logged_model_loads_where_nothing_of_ours_is_installed(
    on_server: MlflowTracker, model_folder: Path, tmp_path: Path
) -> None:
    run = on_server.start_run("run", {})
    on_server.log_model(run, model_folder, {})
    copy = client(on_server).download_artifacts(run, "crosscoder", str(tmp_path))
    names = {line.partition("==")[0] for line in (Path(copy) / "requirements.txt").read_text().split()}
    assert names == {"mlflow", "numpy", "safetensors", "torch"}
    code = (
        "import sys, mlflow; m = mlflow.pyfunc.load_model(sys.argv[1]); print(m.predict(m.input_example).shape);"
        "print(sys.modules['pipeline.numerics.crosscoder'].__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, copy], capture_output=True, text=True, cwd=tmp_path, env=_without_path()
    )
    assert done.stdout.split("\n")[0] == "(2, 16)", done.stderr
    assert Path(copy) in Path(done.stdout.split("\n")[1]).parents


def _without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_a_table_has_its_first_rows_where_the_page_of_the_run_shows_them(
    on_server: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", on_server.uri)  # load_table asks it, whatever its client's is
    frame = pd.DataFrame({"latent": range(501), "nu": [float("nan")] * 501, "tokens": [["a", "b"]] * 501})
    run = on_server.start_run("run", {})
    for name in ("tables/latents.parquet", "empty.parquet", "tables/latents.parquet"):
        on_server.log_file(run, name, frame.iloc[: None if "/" in name else 0].to_parquet())
    read = client(on_server)
    shown = read.load_table(experiment_id=read.get_run(run).info.experiment_id, artifact_file="tables/latents.json")
    assert shown["latent"].tolist() == list(range(500)) and shown["tokens"][0] == ["a", "b"]
    listed = json.loads(read.get_run(run).data.tags["mlflow.loggedArtifacts"])
    assert [entry["path"] for entry in listed] == ["tables/latents.json", "empty.json"]


def test_the_experiment_opens_among_trained_models(on_server: MlflowTracker) -> None:
    kinds = [read.tags["mlflow.experimentKind"] for read in [client(on_server).get_experiment_by_name("crossray")]]
    assert kinds == ["custom_model_development"]


def test_the_load_of_the_machine_is_told_while_a_run_goes_on(on_server: MlflowTracker, tmp_path: Path) -> None:
    config = load(run_file(tmp_path, str(tmp_path / "runs")))
    storage = Storage(config.storage.root)
    log = RunLog(SpooledTracker(on_server, storage, print), config, storage, build_flow(config))
    with log.machine_load():
        time.sleep(0.1)
    log.close(succeeded=True)
    (run, *_) = client(on_server).search_runs(["1"], "attributes.run_name = 'tiny'")
    metrics, tags = run.data.metrics, run.data.tags
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= metrics.keys()
    assert tags["mlflow.user"] and tags["mlflow.source.name"].startswith("crossray ")


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
