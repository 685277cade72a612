"""What a tracker can do: the few methods by which numbers, figures, inputs and models are logged.

Every call names its run, so one tracker serves parent and child runs. `NoopTracker` logs nothing, `RecordingTracker`
keeps everything in memory, for tests. MLflow is in mlflow_tracker.py, what waits while its server is away in spool.py;
choose.py picks one of them.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ENTRY_TAG = "crossray.entry"
"""Tag by which a run is found again when the answer to its creation was lost."""
NOTE_TAG = "mlflow.note.content"
"""Tag whose text, Markdown, is shown as the run's description."""


class Point(NamedTuple):
    """One value of a curve."""

    name: str
    value: float
    step: int
    time_ms: int


class Dataset(NamedTuple):
    """A data artifact that a run reads."""

    name: str
    """Of its stage: corpus, tokens, activations."""
    digest: str
    """Its fingerprint."""
    source: str
    """Path or URL of its folder."""
    profile: dict[str, float]
    """Measured numbers, num_rows and num_bytes among them."""


class TrackerAwayError(Exception):
    """The tracking server did not answer; the same call may succeed later."""


class TrackerRefusedError(Exception):
    """The tracking server answered and does not take this run's values until a person mends something there."""


class Tracker(Protocol):
    """Where a run logs. Every call may be repeated without anything being there twice."""

    def start_run(
        self, name: str, tags: Mapping[str, str], parent: str | None = None, time_ms: int | None = None
    ) -> str:
        """Open a run (a child, if `parent` is a run id), begun at `time_ms` (None: now), and return its id."""
        ...

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Settings of a run; nested mappings become dotted names."""
        ...

    def log_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Tags of a run that are known later than its start; NOTE_TAG is its description."""
        ...

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Values of curves or single numbers (step 0)."""
        ...

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """A file of the run; `name` may hold folders."""
        ...

    def log_inputs(self, run: str, datasets: Sequence[Dataset]) -> None:
        """What a run reads; a dataset of the same name and digest is the same one, whichever run names it."""
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

    def machine_load(self) -> dict[str, float]:
        """Load of this machine now (processor, memory, disk, network, GPUs) by name; empty where no one sees it."""
        ...

    def close(self) -> None:
        """Deliver what still waits; the last call."""
        ...


class TrackingServer(Tracker, Protocol):
    """A tracker whose server may be away (TrackerAwayError) or refuse (TrackerRefusedError), and finds runs by tag."""

    experiment: str
    """Name of the experiment that its runs belong to."""

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
        """Return an id that means nothing."""
        return "none"

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Nothing."""

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """Nothing."""

    def log_inputs(self, run: str, datasets: Sequence[Dataset]) -> None:
        """Nothing."""

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:
        """Nothing."""

    def machine_load(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Nothing."""

    def link(self, run: str) -> str:  # noqa: ARG002
        """Say that tracking is off."""
        return "tracking is off (tracking.kind: none)"


class RecordedRun(NamedTuple):
    """Everything that was logged of one run."""

    name: str
    parent: str | None
    tags: dict[str, str]
    params: dict[str, str]
    points: list[Point]
    files: dict[str, bytes]
    inputs: list[Dataset]
    models: list[Path]
    ended: list[bool]


class RecordingTracker:
    """Keeps everything in memory, for tests."""

    experiment = "crossray"

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
        self.runs[run] = RecordedRun(name, parent, dict(tags), {}, [], {}, [], [], [])
        return run

    def find_run(self, entry: str) -> str:
        """The run with this tag."""
        return next(run for run, kept in self.runs.items() if kept.tags.get(ENTRY_TAG) == entry)

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Keep settings."""
        self.runs[run].params.update(flatten(params))

    def log_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Keep tags."""
        self.runs[run].tags.update(tags)

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Keep values."""
        self.runs[run].points.extend(points)

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """Keep a file."""
        self.runs[run].files[name] = data

    def log_inputs(self, run: str, datasets: Sequence[Dataset]) -> None:
        """Keep datasets."""
        self.runs[run].inputs.extend(dataset for dataset in datasets if dataset not in self.runs[run].inputs)

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:  # noqa: ARG002
        """Keep a model's folder name."""
        self.runs[run].models.append(folder)

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:  # noqa: ARG002
        """Close a run."""
        self.runs[run].ended.append(succeeded)

    def machine_load(self) -> dict[str, float]:
        """Nothing: two logs of one run are the same."""
        return {}

    def close(self) -> None:
        """Nothing waits."""

    def link(self, run: str) -> str:
        """The run's id."""
        return run


def now_ms() -> int:
    """Now, in milliseconds since 1970: the time of a point of a curve."""
    return time.time_ns() // 1_000_000


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
