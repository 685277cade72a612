"""Runs as jobs of a distant Ray cluster: packed, submitted, watched, stopped.

A job carries this project's code, the resolved run file and the small local files that it names; the cluster needs
only the same Python packages. Every node must reach the storage root and the tracking server of a submitted run, so
folders of this machine are refused before the job is sent.

A job carries no secrets: Ray keeps a job's environment in clear text and shows it in the dashboard. Credentials belong
in the environment of the cluster's nodes.
"""

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pipeline.cluster.connect import use_token
from pipeline.cluster.job_package import NamedFiles, Packed, check_environment, pack_code
from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError, RetryPolicy, has_secret

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_RUN_FILE = "run.yaml"
_START_RETRIES = RetryPolicy(first_wait_seconds=0.5, longest_wait_seconds=2.0, deadline_seconds=60.0)
_NOISY_LOGGERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
"""They report uploads and closed sockets at INFO."""
_ERROR_PREFIX = "crossray: "
"""What the command line puts before an error."""


class JobState(NamedTuple):
    """What the cluster says of one job."""

    name: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    run_name: str
    """Of the run file, or empty for a job of another kind."""
    started: datetime | None
    ended: datetime | None
    last_line: str
    """Newest line of a running job's log; why a failed one ended; empty otherwise."""
    exit_code: int | None
    """Of the run: 0 done, 2 wrong input, 1 anything else; None while it runs or where the process never ended."""


class Jobs:
    """The jobs of one cluster. `address`: its dashboard, http(s)://host:port."""

    def __init__(self, address: str | None) -> None:
        use_token()
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
        if urlsplit(self.address).scheme not in ("http", "https"):
            raise InputError(
                f"--address: expected the cluster's dashboard, like {DEFAULT_ADDRESS}, got {self.address!r}"
            )
        try:
            self._client = JobSubmissionClient(self.address)
        except AuthenticationError as error:
            raise InputError(
                f"--address: {self.address} expects a token, got none that it accepts; set RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's token"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise InputError(
                f"--address: expected a running Ray cluster at {self.address}: {_first_line(error)}; start one, or "
                "open a tunnel to its dashboard"
            ) from error

    def submit(
        self,
        config: RunConfig,
        *,
        name: str | None = None,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], object] = lambda _: None,
    ) -> str:
        """Start a run on the cluster; the job's name. InputError where it could not work there or the name is taken.

        environment: plain settings for the run's processes; what looks like a secret is refused. say: what travels.
        """
        environment = dict(environment or {})
        check_environment(environment)
        name = name or f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        if any(job.submission_id == name for job in self._asked(self._client.list_jobs)):
            raise InputError(f"--name: expected a new name, got {name!r}, which is taken; `crossray status {name}`")
        with tempfile.TemporaryDirectory(prefix="crossray-job-") as folder:
            for packed in pack(config, Path(folder)):
                say(f"{packed.num_bytes / 1e6:.2f} MB in {packed.num_files} files of {packed.source}")
            self._submit(
                entrypoint=f"python -m pipeline run {_RUN_FILE}",
                submission_id=name,
                runtime_env={"working_dir": folder, "env_vars": environment},
                metadata={"crossray_run": config.name, "crossray_root": config.storage.root},
            )
        return name

    def _submit(self, **job: Any) -> None:
        """A cluster answers before its nodes take jobs, so this is tried for a while."""
        _START_RETRIES.call(
            lambda: self._asked(self._client.submit_job, **job),
            server=self.address,
            is_transient=lambda error: isinstance(error, InputError) and "No available agent" in str(error),
        )

    def states(self, name: str | None = None) -> list[JobState]:
        """One job, or all of them, newest first."""
        if name is not None:
            return [self._state(self._asked(self._client.get_job_info, name))]
        jobs = [job for job in self._asked(self._client.list_jobs) if job.submission_id]
        return [self._state(job) for job in sorted(jobs, key=lambda job: -(job.start_time or 0))]

    def log(self, name: str) -> str:
        """All that a job has written so far."""
        return str(self._asked(self._client.get_job_logs, name))

    def follow(self, name: str, write: Callable[[str], None]) -> JobState:
        """Hand a job's log to `write` as it grows, until the job ends; its last state."""

        async def copy() -> None:
            async for text in self._client.tail_job_logs(name):
                write(text)

        self._asked(self._client.get_job_info, name)
        self._asked(lambda: asyncio.run(copy()))
        return self.states(name)[0]

    def stop(self, name: str) -> bool:
        """Ask a job to end; false where it had ended already. What is finished stays, and a new run continues."""
        return bool(self._asked(self._client.stop_job, name))

    def _asked(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The cluster's answer; its refusals as one line."""
        try:
            return call(*arguments, **options)
        except (ConnectionError, RuntimeError) as error:
            text = _first_line(error)
            if "404" in text and arguments:
                raise InputError(
                    f"{self.address}: expected the name of a job, got {arguments[0]!r}; `crossray status` lists them"
                ) from error
            raise InputError(f"{self.address}: the cluster refused: {text}") from error

    def _state(self, job: Any) -> JobState:
        status = job.status.value
        last_line = ""
        if status in ("RUNNING", "FAILED"):
            lines = self._log_lines(job.submission_id)
            last_line = lines[-1] if status == "RUNNING" and lines else ""
            if status == "FAILED":
                message = str(job.message or "").partition(", last available logs")[0]  # which may be long
                last_line = _reason(lines) or " ".join(message.split())
        return JobState(
            job.submission_id,
            status,
            (job.metadata or {}).get("crossray_run", ""),
            _time(job.start_time),
            _time(job.end_time),
            last_line,
            job.driver_exit_code,
        )

    def _log_lines(self, name: str) -> list[str]:
        """Lines of a job's log; none where it went with its node."""
        try:
            return self.log(name).strip().splitlines()
        except InputError:
            return []


def _reason(lines: Sequence[str]) -> str:
    """The last error of a run's log, without the prefix; empty where there is none."""
    errors = [line.removeprefix(_ERROR_PREFIX) for line in lines if line.startswith(_ERROR_PREFIX)]
    return errors[-1] if errors else ""


def pack(config: RunConfig, folder: Path) -> list[Packed]:
    """Write what a job needs into an empty folder: code, run file, and the local files that it names.

    InputError for a storage root or a tracking URI that only this machine has, and for files too large to travel.
    """
    _check_places(config)
    settings = config.model_dump(mode="json")
    settings["resources"]["cluster"] = {"address": "auto", "autoscales": config.resources.cluster.autoscales}
    settings["tracking"]["uri"] = _tracking_uri(config)
    named = NamedFiles(folder / "files")
    settings = named.moved(settings)
    code = pack_code(folder)
    # JSON is YAML too.
    (folder / _RUN_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return [code, *named.packed]


def _check_places(config: RunConfig) -> None:
    root = config.storage.root
    if "://" not in root and not Path(root).is_absolute():
        raise InputError(
            f"storage.root: expected a place that every node of the cluster reaches (s3://bucket/prefix, or a shared "
            f"folder by its absolute path), got {root!r}"
        )


def _tracking_uri(config: RunConfig) -> str | None:
    """Where the job logs: what the file says, else MLFLOW_TRACKING_URI of this machine."""
    if config.tracking.kind == "none":
        return None
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and "://" in config.storage.root:
        raise InputError(
            "tracking.uri: expected the address of an MLflow server that the cluster reaches, got none (nor "
            "MLFLOW_TRACKING_URI); set it, or tracking.kind: none"
        )
    if uri is not None and has_secret(uri):
        raise InputError(
            "tracking.uri: expected an address without a password, since it is recorded; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's nodes"
        )
    return uri


def _time(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _first_line(error: Exception) -> str:
    """What a person can use of a server's answer: the last line of a traceback, else the first line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return (lines[-1] if any("Traceback" in line for line in lines) else lines[0]).strip().rstrip(".")
