"""A tracker whose server may be away: what cannot be delivered waits on the storage root, in order.

While the server answers, every call goes straight through and nothing is written. When it does not, this call and all
later ones become entries below `tracking/` on the storage root. Each is published before the call returns, so neither a
long absence nor the end of this process loses one. They are delivered in order as soon as the server is back; what
still waits when a run ends is delivered by the next run on the same root.

Nothing arrives twice: a call whose answer was lost is repeated, and every call of a tracker may be repeated (a run is
found again by the tag `crossray.entry`; points, parameters, files, inputs and models replace what is there).

Our own code, because MLflow's asynchronous logging keeps what waits in memory only.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any

from pipeline.errors import RetryPolicy
from pipeline.storage.filesystem import Storage
from pipeline.tracking.tracker import ENTRY_TAG, Dataset, Point, TrackerAwayError, TrackingServer, flatten, now_ms

FOLDER = "tracking"
"""Below the storage root; empty unless a server was away."""
RETRIES = RetryPolicy(first_wait_seconds=5.0, longest_wait_seconds=5.0, deadline_seconds=60.0)
"""The first wait also lies between two attempts during the run, of which each may take as long as its timeout; the
deadline is that of the last delivery, when the run ends."""


class SpooledTracker:
    """Tracker around another one; thread-safe.

    Args of the constructor: `say` is told when the server goes away and when it is back.
    """

    def __init__(
        self,
        inner: TrackingServer,
        storage: Storage,
        say: Callable[[str], object],
        *,
        retries: RetryPolicy = RETRIES,
    ) -> None:
        self._inner, self._storage, self._say, self._retries = inner, storage, say, retries
        self._lock = RLock()
        self._queue = _Queue(storage, f"{FOLDER}/{uuid.uuid4().hex[:12]}")
        self._runs: dict[str, str] = {}
        self._last_try = 0.0
        self._deliver_leftovers()

    def start_run(
        self, name: str, tags: Mapping[str, str], parent: str | None = None, time_ms: int | None = None
    ) -> str:
        """Open a run; the id is ours and stays valid whenever the server learns of it."""
        run = uuid.uuid4().hex
        tags = {**tags, ENTRY_TAG: run}
        started = time_ms or now_ms()
        self._call("start_run", run, {"name": name, "tags": tags, "parent": parent, "time_ms": started})
        return run

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Settings of a run."""
        self._call("log_params", run, {"params": flatten(params)})

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Values of curves."""
        self._call("log_points", run, {"points": [list(point) for point in points]})

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """A file of the run."""
        self._call("log_file", run, {"name": name}, data=data)

    def log_inputs(self, run: str, datasets: Sequence[Dataset]) -> None:
        """What a run reads."""
        self._call("log_inputs", run, {"datasets": [dataset._asdict() for dataset in datasets]})

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:
        """A crosscoder's folder as a model; a copy waits with the entry while the server is away."""
        self._call("log_model", run, {"tags": dict(tags)}, folder=folder)

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:
        """Close a run."""
        ended = time_ms or now_ms()
        self._call("end_run", run, {"succeeded": succeeded, "time_ms": ended})

    def link(self, run: str) -> str:
        """Where a person finds the run, as soon as the server knows it."""
        with self._lock:
            return self._inner.link(self._runs.get(run, run))

    def close(self) -> None:
        """Deliver what waits, within the deadline; then say what stays for the next run on this root."""
        with self._lock:
            if self._queue:
                try:
                    self._retries.call(
                        self._drain,
                        server="the tracking server",
                        is_transient=lambda error: isinstance(error, TrackerAwayError),
                    )
                except TrackerAwayError:
                    self._say(
                        f"tracking: the server is still away; {len(self._queue)} entries wait in "
                        f"{self._storage.url(self._queue.folder)}, the next run on this storage root delivers them"
                    )
            self._inner.close()

    def _call(
        self, action: str, run: str, content: dict[str, Any], *, data: bytes = b"", folder: Path | None = None
    ) -> None:
        entry = {"action": action, "run": run, **content}
        with self._lock:
            if self._queue and self._retries.clock() - self._last_try >= self._retries.first_wait_seconds:
                with suppress(TrackerAwayError):
                    self._drain()
            if not self._queue:
                try:
                    self._deliver(entry, data, folder, self._runs)
                    return
                except TrackerAwayError as error:
                    self._last_try = self._retries.clock()
                    self._say(f"tracking: {error}; the run goes on, values wait in {self._storage.url(FOLDER)}")
            self._queue.add(entry, data, folder)

    def _drain(self) -> None:
        """Deliver what waits, in order; TrackerAwayError where the server goes away meanwhile."""
        total = len(self._queue)
        try:
            self._deliver_all(self._queue, self._runs)
        finally:
            self._last_try = self._retries.clock()
        self._say(f"tracking: the server is back, {total} waiting entries were delivered")

    def _deliver_leftovers(self) -> None:
        """What former runs could not deliver; their runs are found again by their tags."""
        for name in self._storage.folders(FOLDER):
            queue = _Queue(self._storage, f"{FOLDER}/{name}")
            total = len(queue)
            try:
                self._deliver_all(queue, {})
            except TrackerAwayError as error:
                self._say(f"tracking: {error}; {len(queue)} entries of a former run still wait")
                return
            self._say(f"tracking: {total} entries of a former run were delivered")

    def _deliver_all(self, queue: "_Queue", runs: dict[str, str]) -> None:
        while queue:
            entry, data = queue.first()
            with self._storage.local_folder(queue.model_key()) as folder:
                self._deliver(entry, data, folder, runs)
            queue.drop_first()

    def _deliver(self, entry: Mapping[str, Any], data: bytes, folder: Path | None, runs: dict[str, str]) -> None:
        """One call to the inner tracker, under the server's ids."""
        action, own = entry["action"], entry["run"]
        if action == "start_run":
            parent = None if entry["parent"] is None else self._known(entry["parent"], runs)
            runs[own] = self._inner.start_run(entry["name"], entry["tags"], parent, time_ms=entry["time_ms"])
            return
        run = self._known(own, runs)
        if action == "log_params":
            self._inner.log_params(run, entry["params"])
        elif action == "log_points":
            self._inner.log_points(run, [Point(*values) for values in entry["points"]])
        elif action == "log_file":
            self._inner.log_file(run, entry["name"], data)
        elif action == "log_inputs":
            self._inner.log_inputs(run, [Dataset(**fields) for fields in entry["datasets"]])
        elif action == "log_model":
            assert folder is not None
            self._inner.log_model(run, folder, entry["tags"])
        else:
            assert action == "end_run", action
            self._inner.end_run(run, succeeded=entry["succeeded"], time_ms=entry["time_ms"])

    def _known(self, own: str, runs: dict[str, str]) -> str:
        """The server's id of one of our runs; a run of a former process is looked up by its tag."""
        if own not in runs:
            runs[own] = self._inner.find_run(own)
        return runs[own]


class _Queue:
    """Entries in a folder of the storage, oldest first: `000001.json`, with `.bin` or `-model/` beside it."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self.folder = storage, folder
        found = storage.files(folder) if storage.exists(folder) else []
        self._numbers = sorted(int(name.removesuffix(".json")) for name in found if name.endswith(".json"))
        self._next = self._numbers[-1] + 1 if self._numbers else 1

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, entry: Mapping[str, Any], data: bytes, folder: Path | None) -> None:
        """Publish an entry; it counts from the moment its JSON is there, which is last."""
        number, key = self._next, self._key(self._next)
        if data:
            self._storage.write_bytes(f"{key}.bin", data)
        if folder is not None:
            self._storage.upload_folder(folder, f"{key}-model")
        self._storage.write_bytes(f"{key}.json", json.dumps({**entry, "has_data": bool(data)}).encode())
        self._numbers.append(number)
        self._next = number + 1

    def first(self) -> tuple[dict[str, Any], bytes]:
        """The oldest entry and its bytes."""
        key = self._key(self._numbers[0])
        entry: dict[str, Any] = self._storage.read_json(f"{key}.json")
        return entry, self._storage.read_bytes(f"{key}.bin") if entry["has_data"] else b""

    def model_key(self) -> str:
        """The folder of the oldest entry's model, whether or not it has one."""
        return f"{self._key(self._numbers[0])}-model"

    def drop_first(self) -> None:
        """Forget the oldest entry; the last one takes the folder with it."""
        key = self._key(self._numbers.pop(0))
        for name in (f"{key}.json", f"{key}.bin", f"{key}-model"):
            self._storage.delete(name)
        if not self._numbers:
            self._storage.delete(self.folder)

    def _key(self, number: int) -> str:
        return f"{self.folder}/{number:06d}"
