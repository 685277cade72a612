"""Fixtures for the whole suite: one Ray cluster per session, an S3-compatible server, an MLflow server.

With `-n 2 --dist loadgroup` (`make test`) two processes share the files of the suite, each with its own of all these.
"""

import fcntl
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# One thread a process: as many processes as cores compute at a time, and sums have one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read once, when huggingface_hub is first imported, so it is set before anything of ours is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# MLflow's server otherwise keeps eight processes that ask for jobs all the time and take most of a core.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("HF_TOKEN", "hf_nobodys-token-4711")  # looked for afterwards in everything that a run writes

import torch
from runs import Finished
from servers import free_port, served

from pipeline.cluster import connect as cluster
from pipeline.config.resources import ClusterSection

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files without Ray come first, so that what is quick to know is known first; the longest of the others follow.

    A file stays on one process, which shares what its fixtures made; files that need the heavy services or clusters of
    several nodes share one, so that no two such clusters start at a time.
    """
    starts_ray = Counter(
        item.path for item in items if item.get_closest_marker("ray") or _uses(item, "finished", "ray_cluster")
    )
    items.sort(key=lambda item: (bool(starts_ray[item.path]), -starts_ray[item.path]))
    heavy = {item.path for item in items if _uses(item, "services") or item.path.parent.name == "cluster"}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("services" if item.path in heavy else str(item.path)))


def _uses(item: pytest.Item, *fixtures: str) -> bool:
    return not set(fixtures).isdisjoint(getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def s3_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty bucket on an S3-compatible server that this session starts."""
    import boto3

    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "server.log"
    url = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with pytest.MonkeyPatch.context() as patch, served(command, f"{url}/moto-api/", log):
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="crossray")
        yield "s3://crossray"


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The settings of a real object store (Ceph's gateway where installed) and MLflow server (PostgreSQL likewise).

    Which ones they are is in CROSSRAY_STORE and CROSSRAY_DATABASE; a smaller substitute is said on the terminal.
    """
    folder = tmp_path_factory.mktemp("services")
    path = folder / "settings.json"
    program = Path(__file__).parent.parent / "infra" / "services" / "local.py"
    command = [sys.executable, str(program), "--folder", str(folder), "--settings", str(path)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not path.exists():
            if process.poll() is not None:
                pytest.fail(f"services did not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        settings = json.loads(path.read_text())
        if settings["CROSSRAY_STORE"] != "ceph":
            warnings.warn("no Ceph here: the object store is moto's", RuntimeWarning, stacklevel=1)
        yield settings
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server with its own database."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    with served(command, f"{url}/health", folder / "server.log", seconds=300):
        yield url


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One real local Ray cluster for the session, joined by every run of this process.

    Nodes that start on one machine at the same moment now and then time out, so processes start theirs in turn.
    """
    folder = tmp_path_factory.mktemp("ray")
    with ExitStack() as stack:
        with (folder.parent.parent / "starting-ray").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stack.enter_context(cluster.connected(ClusterSection(num_cpus=2), folder / "ray.log"))
        yield


@pytest.fixture(scope="session")
def finished(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished tiny run; one for all processes of a session, made by the first that needs it."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if session is None:
        return Finished(tmp_path_factory.mktemp("finished"))
    folder = tmp_path_factory.getbasetemp().parent / f"finished-{session}"
    folder.mkdir(exist_ok=True)
    path = folder / "finished.pickle"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_bytes(pickle.dumps(Finished(folder)))
        made: Finished = pickle.loads(path.read_bytes())
    return made
