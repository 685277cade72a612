"""Runs as jobs of a cluster: what travels, what is refused, and a whole run on a real cluster with a real S3 server."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import s3fs
from clusters import Nodes
from playwright.sync_api import sync_playwright
from runs import TINY, Finished, run_file
from runs import command as command_in
from servers import free_port

from pipeline.cluster.jobs import Jobs, pack
from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.stages.finished_crosscoder import CURVES_NAME
from pipeline.storage.filesystem import Storage

ROOT = Path(__file__).parent.parent.parent
command = partial(command_in, cwd=ROOT)


@pytest.fixture
def job_cluster(tmp_path: Path, services: dict[str, str]) -> Iterator[str]:
    """The dashboard of a head without CPUs and two nodes with one each, whose environment holds the credentials."""
    cluster = Nodes(tmp_path, head_cpus=0, variables=services)
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.close()


def test_a_job_carries_code_settings_and_named_files(tmp_path: Path) -> None:
    text = tmp_path / "mine.jsonl"
    text.write_text('{"text": "hello"}\n')
    sources = [
        *TINY["corpus"]["sources"],
        {"name": "mine", "kind": "jsonl", "paths": [str(text)], "text_column": "text"},
    ]
    path = run_file(tmp_path, "s3://bucket/runs", corpus={"sources": sources}, tracking={"uri": "http://mlflow:5000"})
    folder = tmp_path / "job"
    folder.mkdir()
    pack(load(path), folder)
    assert (folder / "pipeline" / "cli.py").is_file() and (folder / "pipeline" / "organisms" / "build.py").is_file()
    settings = json.loads((folder / "run.yaml").read_text())
    (packed,) = settings["corpus"]["sources"][-1]["paths"]
    assert (folder / packed).read_text() == text.read_text()
    assert settings["resources"]["cluster"] == {"address": "auto", "autoscales": False}
    assert load(folder / "run.yaml").crosscoders == load(path).crosscoders


@pytest.mark.parametrize(
    ("root", "tracking", "message"),
    [
        ("runs", {}, r"storage\.root: expected a place that every node of the cluster reaches"),
        ("s3://bucket/runs", {}, r"tracking\.uri: expected the address of an MLflow server that the cluster reaches"),
    ],
    ids=["folder", "no tracking"],
)
def test_places_of_this_machine_are_refused(
    tmp_path: Path, root: str, tracking: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load(run_file(tmp_path, root, tracking=tracking))
    (tmp_path / "job").mkdir()
    with pytest.raises(InputError, match=message):
        pack(config, tmp_path / "job")
    assert not list((tmp_path / "job").iterdir())


def test_large_local_files_do_not_travel(tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(100_000_001)
    sources = [{"name": "large", "kind": "text", "paths": [str(large)]}]
    config = load(run_file(tmp_path, str(tmp_path), corpus={"sources": sources}))
    (tmp_path / "job").mkdir()
    with pytest.raises(InputError, match=r"paths: .*100 MB"):
        pack(config, tmp_path / "job")


def test_a_wrong_address_is_one_line(tmp_path: Path) -> None:
    path = run_file(tmp_path, str(tmp_path))
    done = command("submit", str(path), "--address", f"http://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("crossray: --address: expected a running Ray cluster at http://127.0.0.1:")
    assert done.stderr.count("\n") == 1
    with pytest.raises(InputError, match=r"--address: expected the cluster's dashboard, like http.*got 'ray://head'"):
        Jobs("ray://head")


@pytest.mark.rare
@pytest.mark.timeout(1500)
def test_a_run_as_a_job_gives_the_local_verdict_from_the_object_store(
    finished: Finished,
    services: dict[str, str],
    job_cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("store", services["CROSSRAY_STORE"])
    record_property("database", services["CROSSRAY_DATABASE"])

    for name, value in services.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # another test's credentials
    root, server = "s3://crossray/jobs", services["MLFLOW_TRACKING_URI"]
    places = ("--set", f"storage.root={root}", "--set", f"tracking.uri={server}", "--set", "tracking.experiment=jobs")
    path = str(run_file(tmp_path, "runs"))
    done = command("submit", path, *places, "--address", job_cluster, "--name", "one")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"job      one on {job_cluster}\n" in done.stdout
    assert "job      one SUCCEEDED" in done.stdout
    assert f"tracking: {server}/#/experiments/" in done.stdout

    assert finished.outcome.verdict in done.stdout
    store = Storage(root)
    for state in finished.states.values():
        folder = state.step.key.folder
        assert store.exists(f"{folder}/record.json"), folder
        for table in (finished.root / folder).rglob("*.parquet"):
            if table.name != CURVES_NAME:  # which tell the time
                own = f"{root}/{table.relative_to(finished.root)}"
                pd.testing.assert_frame_equal(pd.read_parquet(own), pd.read_parquet(table))
    assert command("verify", path, *places).returncode == 0
    _check_tracked(server, tmp_path)
    _check_refusals(path, places, job_cluster)

    listed = command("status", "--address", job_cluster)
    assert {tuple(line.split()[:2]) for line in listed.stdout.splitlines()} == {
        ("one", "SUCCEEDED"),
        ("gpus", "FAILED"),
    }
    assert "SUCCEEDED" in command("status", "one", "--address", job_cluster).stdout
    assert "report   s3://" in command("logs", "one", "--address", job_cluster).stdout
    stopped = command("stop", "one", "--address", job_cluster)
    assert stopped.stdout == "one: had ended already; run it again to continue\n"
    missing = command("logs", "nope", "--address", job_cluster)
    assert missing.returncode == 2 and "expected the name of a job, got 'nope'" in missing.stderr


def _check_tracked(server: str, folder: Path) -> None:
    """Runs, metrics, model and report through MLflow's API, and the run's page in a real browser."""
    client = mlflow.MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("jobs")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    fits = [run for run in runs if run.info.run_name.startswith("crosscoder")]
    assert len(fits) == 2 and all(run.outputs.model_outputs for run in fits)
    assert all(client.get_metric_history(run.info.run_id, "train/loss") for run in fits)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert not [run for run in runs if secret in repr(run.to_dictionary())]
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("everything but the page was checked: no browser here")
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.goto(f"{server}/#/experiments/{experiment.experiment_id}/runs/{parent.info.run_id}")
        page.get_by_text("tiny", exact=True).first.wait_for(timeout=60_000)
        page.screenshot(path=folder / "mlflow.png")
        page.context.browser.close()  # type: ignore[union-attr]
    assert (folder / "mlflow.png").stat().st_size > 20_000


def _check_refusals(path: str, places: tuple[str, ...], address: str) -> None:
    again = command("submit", path, *places, "--address", address, "--name", "one")
    assert again.returncode == 2 and "--name: expected a new name, got 'one', which is taken" in again.stderr
    asked = command("submit", path, *places, "--address", address, "--env", "AWS_SECRET_ACCESS_KEY=x")
    assert asked.returncode == 2 and "a job's environment is readable in the dashboard" in asked.stderr
    unable = command(
        *("submit", path, *places, "--address", address, "--name", "gpus"),
        *("--set", "resources.extraction.gpus=1", "--set", "activations.layer=0"),
    )
    assert unable.returncode == 2
    assert unable.stderr.startswith(
        "crossray: job gpus: resources.extraction: expected at most the cluster's 0 GPUs, got"
    )
    assert unable.stderr.count("\n") == 1
