"""The tracker that logs to MLflow: the only file that imports mlflow.

Curves are written in batches: one call per metric and step would take longer than the training that they describe. A
server that does not answer is a TrackerAwayError, one that refuses a TrackerRefusedError; a server, database or
experiment that cannot be used at all is refused when the tracker is made, before anything is computed.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import InputError, causes, first_line, redacted
from pipeline.tracking.tracker import ENTRY_TAG, Dataset, Point, TrackerAwayError, TrackerRefusedError, flatten

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

# A server that is away is noticed soon; spool.py decides how long to wait for it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_NAME_LENGTH = 250
_QUOTED_LETTERS = 200
_PREVIEW_ROWS = 500
"""Rows of a table that MLflow's page shows."""
_KIND_TAG = "mlflow.experimentKind"
"""Tag of an experiment by which MLflow's pages choose between their views of models and of agents."""
_TABLES_TAG = "mlflow.loggedArtifacts"
"""Tag of a run that lists the JSON files that are tables, as MLflow's log_table keeps it; that call would append the
rows again where an answer was lost."""


class MlflowTracker:
    """Logs to an MLflow server, or to a SQLite file without one."""

    def __init__(self, uri: str, experiment: str, artifact_root: str | None) -> None:
        self.uri, self.experiment = uri, experiment
        self._monitors: list[Any] | None = None
        try:
            _check_database(uri)
            import mlflow

            self._mlflow = mlflow
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            with self._reaching():
                found = self._client.get_experiment_by_name(experiment)
                self._experiment = (
                    found.experiment_id
                    if found is not None
                    else self._client.create_experiment(experiment, artifact_location=artifact_root)
                )
                if found is None or (found.lifecycle_stage == "active" and _KIND_TAG not in found.tags):
                    self._client.set_experiment_tag(self._experiment, _KIND_TAG, "custom_model_development")
        except Exception as error:  # of a server, a driver or a database of any kind; nothing has been computed yet
            raise InputError(
                f"tracking.uri: expected an MLflow server or database at {uri!r}, got: {_short(error)}; start or mend "
                "it, correct the address or its credentials, or set tracking.kind: none"
            ) from error
        if found is not None and found.lifecycle_stage != "active":
            raise InputError(
                f"tracking.experiment: expected an experiment that is not deleted, got {experiment!r}; restore it "
                f"(`mlflow experiments restore -x {self._experiment}`) or name another"
            )

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn every failure into TrackerAwayError (it may pass) or TrackerRefusedError (a person must mend something).

        MLflow hands on what its stores, drivers and artifact clients raise, so no list of classes would be complete.
        """
        try:
            yield
        except (TrackerAwayError, TrackerRefusedError):
            raise
        except Exception as error:
            if is_absence(error):
                raise TrackerAwayError(f"{redacted(self.uri)} does not answer ({_short(error)})") from error
            raise TrackerRefusedError(f"{redacted(self.uri)} refuses: {_short(error)}") from error

    def start_run(
        self, name: str, tags: Mapping[str, str], parent: str | None = None, time_ms: int | None = None
    ) -> str:
        """Open a run (a child, if `parent` is a run id), or find the one that an unanswered call has opened."""
        all_tags = {**tags, **({"mlflow.parentRunId": parent} if parent else {})}
        with self._reaching():
            opened = self._runs_of(tags[ENTRY_TAG]) if ENTRY_TAG in tags else []
            if opened:
                return str(opened[0].info.run_id)
            made = self._client.create_run(self._experiment, start_time=time_ms, run_name=name, tags=all_tags)
            return str(made.info.run_id)

    def find_run(self, entry: str) -> str:
        """The id of the run whose tag ENTRY_TAG has this value."""
        with self._reaching():
            found = self._runs_of(entry)
        if not found:
            raise TrackerRefusedError(f"{redacted(self.uri)} knows no run with the tag {ENTRY_TAG} = {entry!r}")
        return str(found[0].info.run_id)

    def _runs_of(self, entry: str) -> list[Any]:
        return list(self._client.search_runs([self._experiment], f"tags.`{ENTRY_TAG}` = '{entry}'"))

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Settings of a run; nested mappings become dotted names."""
        from mlflow.entities import Param

        entities = [Param(safe_name(name), value[:_PARAM_LENGTH]) for name, value in flatten(params).items()]
        for start in range(0, len(entities), _PARAMS_PER_CALL):
            with self._reaching():
                self._client.log_batch(run, params=entities[start : start + _PARAMS_PER_CALL])

    def log_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Tags of a run that are known later than its start."""
        from mlflow.entities import RunTag

        with self._reaching():
            self._client.log_batch(run, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Values of curves or single numbers (step 0)."""
        from mlflow.entities import Metric

        entities = [Metric(safe_name(point.name), point.value, point.time_ms, point.step) for point in points]
        for start in range(0, len(entities), _METRICS_PER_CALL):
            with self._reaching():
                self._client.log_batch(run, metrics=entities[start : start + _METRICS_PER_CALL])

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """A file of the run; `name` may hold folders. Beside a Parquet table go its first rows, as pages show them."""
        name = safe_name(name)
        self._log_artifact(run, name, data)
        if name.endswith(".parquet"):
            preview = f"{name.removesuffix('.parquet')}.json"
            self._log_artifact(run, preview, table_preview(data))
            with self._reaching():
                tables = json.loads(self._client.get_run(run).data.tags.get(_TABLES_TAG, "[]"))
            entry = {"path": preview, "type": "table"}
            if entry not in tables:
                self.log_tags(run, {_TABLES_TAG: json.dumps([*tables, entry])})

    def _log_artifact(self, run: str, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="crossray-") as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(data)
            parent = str(Path(name).parent)
            with self._reaching():
                self._client.log_artifact(run, str(path), artifact_path=None if parent == "." else parent)

    def log_inputs(self, run: str, datasets: Sequence[Dataset]) -> None:
        """What a run reads, as the datasets of its page; the server recognises them by name and digest."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput

        inputs = [
            DatasetInput(
                Entity(
                    name=dataset.name,
                    digest=dataset.digest,
                    source_type=urlsplit(dataset.source).scheme or "local",
                    source=json.dumps({"uri": dataset.source}),
                    profile=json.dumps(dataset.profile),
                )
            )
            for dataset in datasets
        ]
        with self._reaching():
            self._client.log_inputs(run, inputs)

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:
        """A crosscoder's folder as a pyfunc model that says what it takes and gives, and loads without an install.

        pyfunc.py reads it, nothing is pickled; the files that pyfunc.py needs go with it.
        """
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        from pipeline.tracking import pyfunc

        with self._reaching():
            outputs = self._client.get_run(run).outputs
            if outputs is not None and outputs.model_outputs:
                return
        interface = pyfunc.interface_of(folder)
        _, M, D = interface.example_BMD.shape
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype(np.float32), (-1, M, D))]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, interface.num_latents))]),
        )
        with (
            tempfile.TemporaryDirectory(prefix="crossray-") as code,
            self._reaching(),
            self._as_default(),
            self._mlflow.start_run(run_id=run, log_system_metrics=False),
        ):
            self._mlflow.pyfunc.log_model(
                name="crosscoder",
                loader_module=pyfunc.__name__,
                data_path=str(folder),
                code_paths=[str(pyfunc.copy_code(Path(code)))],
                pip_requirements=pyfunc.requirements(),
                signature=signature,
                input_example=interface.example_BMD,
                tags=dict(tags),
            )

    def machine_load(self) -> dict[str, float]:
        """What MLflow's page shows as system metrics, of this machine; GPUs where nvidia-ml-py is installed."""
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        if self._monitors is None:
            self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
            with contextlib.suppress(ImportError, RuntimeError):  # no NVML, no GPU
                self._monitors.append(GPUMonitor())
        load: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            load |= monitor.aggregate_metrics()
        return load

    @contextlib.contextmanager
    def _as_default(self) -> Iterator[None]:
        """MLflow's log_model takes no client, only a default that it also writes into the environment."""
        before = os.environ.get("MLFLOW_TRACKING_URI")
        self._mlflow.set_tracking_uri(self.uri)
        try:
            yield
        finally:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            if before is not None:
                os.environ["MLFLOW_TRACKING_URI"] = before

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:
        """Close a run."""
        with self._reaching():
            self._client.set_terminated(run, "FINISHED" if succeeded else "FAILED", end_time=time_ms)

    def close(self) -> None:
        """Every call has been answered already."""

    def link(self, run: str) -> str:
        """The run's page on a server, or the command that shows it from a SQLite file."""
        if self.uri.startswith("http"):
            page = f"{redacted(self.uri).rstrip('/')}/#/experiments/{self._experiment}/runs/{run}"
            return f"{page}?workflowType=machine_learning"  # a run's page does not ask the experiment's kind
        command = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
        return f"{command} ui --backend-store-uri {redacted(self.uri)}"


def safe_name(name: str) -> str:
    """A name of a parameter, metric or file as MLflow allows it; a digest keeps one that was changed distinct."""
    plain = "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)
    plain = "/".join(part for part in plain.split("/") if part.strip(". ")) or "_"
    if plain == name and len(name) <= _NAME_LENGTH:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{plain[: _NAME_LENGTH - 9].rstrip('/')}-{digest}"


def table_preview(data: bytes) -> bytes:
    """The first rows of a Parquet table in the JSON layout of MLflow's tables."""
    import pyarrow.parquet as pq

    rows = next(pq.ParquetFile(io.BytesIO(data)).iter_batches(_PREVIEW_ROWS), None)
    frame = pq.read_schema(io.BytesIO(data)).empty_table().to_pandas() if rows is None else rows.to_pandas()
    written: str = frame.to_json(orient="split", index=False, date_format="iso")
    return written.encode()


def is_absence(error: BaseException) -> bool:
    """Whether an error of MLflow may pass: no answer, only a gateway's, or a database that is locked, full or away."""
    from requests import RequestException
    from sqlalchemy.exc import OperationalError

    has_code = re.search(r"(error code|status code|server error|HTTP)\D{0,3}(429|50[0234])", str(error), re.IGNORECASE)
    passing = (RequestException, ConnectionError, TimeoutError, OperationalError)
    return has_code is not None or any(isinstance(link, passing) for link in causes(error, with_context=True))


def _check_database(uri: str) -> None:
    """Raise what a database answers that cannot be used; MLflow itself would try again for a hundred seconds."""
    if urlsplit(uri).scheme.partition("+")[0] not in ("sqlite", "postgresql", "mysql", "mssql"):
        return
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(url)
    try:
        sqlalchemy.inspect(engine)
    finally:
        engine.dispose()


def _short(error: BaseException) -> str:
    """What an error says, in one short line without secrets."""
    return redacted(first_line(error))[:_QUOTED_LETTERS]
