"""Where numbers, figures and models are logged: one seam of a few methods, and MLflow behind it.

The only file that imports mlflow. Every call names its run, so one tracker serves parent and child runs. `NoopTracker`
logs nothing, `RecordingTracker` keeps all in memory for tests. MLflow writes curves in batches: one call per metric and
step would take longer than the training they describe.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.errors import InputError
from pipeline.sections.how import TrackingSection
from pipeline.storage import Storage

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

# A server that is away is noticed soon: whoever calls decides how long to wait for it (spool.py).
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

ENTRY_TAG = "crossray.entry"
"""Tag by which a run is found again when the answer to its creation was lost."""
_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000


class Point(NamedTuple):
    """One value of a curve."""

    name: str
    value: float
    step: int
    time_ms: int


class TrackerAwayError(Exception):
    """The tracking server did not answer; the same call may succeed later."""


class Tracker(Protocol):
    """What a run tells the outside world. Every call may be repeated: nothing is then there twice."""

    def start_run(
        self, name: str, tags: Mapping[str, str], parent: str | None = None, time_ms: int | None = None
    ) -> str:
        """Open a run (a child, if `parent` is a run id), begun at `time_ms` (None: now), and return its id."""
        ...

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Settings of a run; nested mappings become dotted names."""
        ...

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Values of curves or single numbers (step 0)."""
        ...

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """A file of the run; `name` may hold folders."""
        ...

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:
        """A crosscoder's folder (safetensors and config.json) as a model that loads back."""
        ...

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:
        """Close a run, at `time_ms` (None: now)."""
        ...

    def link(self, run: str) -> str:
        """Where a person finds the run: a URL or a command."""
        ...

    def close(self) -> None:
        """Deliver what still waits; the last call."""
        ...


class TrackingServer(Tracker, Protocol):
    """A tracker that may be away (TrackerAwayError) and remembers runs by tag."""

    def find_run(self, entry: str) -> str:
        """The id of the run whose tag ENTRY_TAG has this value."""
        ...


class NoopTracker:
    """Logs nothing."""

    def start_run(
        self,
        name: str,  # noqa: ARG002
        tags: Mapping[str, str],  # noqa: ARG002
        parent: str | None = None,  # noqa: ARG002
        time_ms: int | None = None,  # noqa: ARG002
    ) -> str:
        """Return an id that leads nowhere."""
        return "none"

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Nothing."""

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """Nothing."""

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def link(self, run: str) -> str:  # noqa: ARG002
        """Say that tracking is off."""
        return "tracking is off (tracking.kind: none)"


class RecordedRun(NamedTuple):
    """All that a RecordingTracker was told about one run."""

    name: str
    parent: str | None
    tags: dict[str, str]
    params: dict[str, str]
    points: list[Point]
    files: dict[str, bytes]
    models: list[Path]
    ended: list[bool]


class RecordingTracker:
    """Keeps everything in memory, for tests."""

    def __init__(self) -> None:
        self.runs: dict[str, RecordedRun] = {}

    def start_run(
        self,
        name: str,
        tags: Mapping[str, str],
        parent: str | None = None,
        time_ms: int | None = None,  # noqa: ARG002
    ) -> str:
        """Open a run."""
        run = f"run-{len(self.runs)}"
        self.runs[run] = RecordedRun(name, parent, dict(tags), {}, [], {}, [], [])
        return run

    def find_run(self, entry: str) -> str:
        """The run with this tag."""
        return next(run for run, kept in self.runs.items() if kept.tags.get(ENTRY_TAG) == entry)

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Keep settings."""
        self.runs[run].params.update(flatten(params))

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Keep values."""
        self.runs[run].points.extend(points)

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """Keep a file."""
        self.runs[run].files[name] = data

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:  # noqa: ARG002
        """Keep a model's folder name."""
        self.runs[run].models.append(folder)

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:  # noqa: ARG002
        """Close a run."""
        self.runs[run].ended.append(succeeded)

    def close(self) -> None:
        """Nothing waits."""

    def link(self, run: str) -> str:
        """The run's id."""
        return run


class MlflowTracker:
    """Logs to an MLflow server, or to a SQLite file without one."""

    def __init__(self, uri: str, experiment: str, artifact_root: str | None) -> None:
        import mlflow
        from mlflow.exceptions import MlflowException

        self.uri = uri
        self._mlflow = mlflow
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        try:
            with self._reaching():
                found = self._client.get_experiment_by_name(experiment)
                self._experiment = (
                    found.experiment_id
                    if found is not None
                    else self._client.create_experiment(experiment, artifact_location=artifact_root)
                )
        except (MlflowException, TrackerAwayError) as error:
            raise InputError(
                f"tracking.uri: expected an MLflow server at {uri!r}, got: {_first_line(error)}; start it, correct the "
                "address or its credentials, or set tracking.kind: none"
            ) from error

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn a server that does not answer into TrackerAwayError; what it answers stays as it is."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException

        try:
            yield
        except (MlflowException, RequestException) as error:
            if not is_absence(error):
                raise
            raise TrackerAwayError(f"{self.uri} does not answer ({_first_line(error)[:200]})") from error

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
            return str(self._runs_of(entry)[0].info.run_id)

    def _runs_of(self, entry: str) -> list[Any]:
        return list(self._client.search_runs([self._experiment], f"tags.`{ENTRY_TAG}` = '{entry}'"))

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Settings of a run; nested mappings become dotted names."""
        from mlflow.entities import Param

        entities = [Param(name, value[:_PARAM_LENGTH]) for name, value in flatten(params).items()]
        for start in range(0, len(entities), _PARAMS_PER_CALL):
            with self._reaching():
                self._client.log_batch(run, params=entities[start : start + _PARAMS_PER_CALL])

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Values of curves or single numbers (step 0)."""
        from mlflow.entities import Metric

        entities = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        for start in range(0, len(entities), _METRICS_PER_CALL):
            with self._reaching():
                self._client.log_batch(run, metrics=entities[start : start + _METRICS_PER_CALL])

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """A file of the run; `name` may hold folders."""
        with tempfile.TemporaryDirectory(prefix="crossray-") as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(data)
            parent = str(Path(name).parent)
            with self._reaching():
                self._client.log_artifact(run, str(path), artifact_path=None if parent == "." else parent)

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:
        """A crosscoder's folder as a pyfunc model: read by pyfunc.py, nothing is pickled."""
        with self._reaching():
            outputs = self._client.get_run(run).outputs
            if outputs is not None and outputs.model_outputs:
                return
        with self._reaching(), self._as_default(), self._mlflow.start_run(run_id=run, log_system_metrics=False):
            self._mlflow.pyfunc.log_model(
                name="crosscoder",
                loader_module="pipeline.pyfunc",
                data_path=str(folder),
                pip_requirements=["crossray"],
                tags=dict(tags),
            )

    @contextlib.contextmanager
    def _as_default(self) -> Iterator[None]:
        """MLflow's log_model knows no client, only a default that it also writes into the environment."""
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
            return f"{self.uri.rstrip('/')}/#/experiments/{self._experiment}/runs/{run}"
        command = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
        return f"{command} ui --backend-store-uri {self.uri}"


def make_tracker(section: TrackingSection, storage: Storage, say: Callable[[str], object] = lambda _: None) -> Tracker:
    """The tracker of a run. Without a URI: MLFLOW_TRACKING_URI, else a SQLite file under a local storage root.

    What a server cannot take at once waits on the storage root; `say` is told when that begins and ends.
    """
    if section.kind == "none":
        return NoopTracker()
    uri = section.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        from pipeline.spool import SpooledTracker

        return SpooledTracker(MlflowTracker(uri, section.experiment, None), storage, say)
    root = Path(storage.root) if storage.is_local else Path("runs").resolve()
    folder = root / "mlflow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"tracking: cannot create {folder}: {error.strerror}; set tracking.uri") from error
    with contextlib.redirect_stderr(None):  # the first use of a SQLite file announces each of its tables
        return MlflowTracker(f"sqlite:///{folder / 'mlflow.db'}", section.experiment, (folder / "artifacts").as_uri())


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names with text values."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                flat |= flatten(item, f"{name}.{item.get('name', index)}.")
        else:
            flat[name] = str(value)
    return flat


def is_absence(error: BaseException) -> bool:
    """Whether an error of MLflow means that nobody answered, or that a gateway answered in its place."""
    from requests import RequestException

    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    has_code = re.search(r"(error code|status code|server error|HTTP)\D{0,3}(429|50[0234])", str(error), re.IGNORECASE)
    return has_code is not None or any(isinstance(link, RequestException | ConnectionError) for link in chain)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
