"""A tracker whose server may be away or refuse: what cannot be delivered waits on the storage root, in order.

While the server answers, every call goes straight through and nothing is written. When it does not, this call and all
later ones become entries below `tracking/` on the storage root. Each is published before the call returns, so neither a
long absence nor the end of this process loses one. They are delivered in order as soon as the server is back; what
still waits when a run ends is delivered by the next run on the same root and experiment.

What the server refuses (its run or experiment was deleted) waits too, without holding up what it takes. Nothing here
ends a run that computes: trouble is told in one line.

Nothing arrives twice: a call whose answer was lost is repeated, and every call of a tracker may be repeated (a run is
found again by the tag `crossray.entry`; points, parameters, files, inputs and models replace what is there).

Our own code, because MLflow's asynchronous logging keeps what waits in memory only.
"""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import RLock
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CrossrayError, InputError, RetryPolicy, first_line
from pipeline.storage.filesystem import Storage
from pipeline.storage.locks import HeldError, locked
from pipeline.tracking.tracker import (
    ENTRY_TAG,
    Dataset,
    Point,
    TrackerAwayError,
    TrackerRefusedError,
    TrackingServer,
    flatten,
    now_ms,
)

FOLDER = "tracking"
"""Below the storage root; empty unless a server was away."""
RETRIES = RetryPolicy(first_wait_seconds=5.0, longest_wait_seconds=5.0, deadline_seconds=60.0)
"""The first wait also lies between two attempts during the run, of which each may take as long as its timeout; the
deadline is that of the last delivery, when the run ends."""
_PAUSE_PER_TRY = 4.0
"""So many times as long as an attempt has taken nobody tries again: a server that hangs must not stop the run."""

_log = logging.getLogger(__name__)


class _Entry(BaseModel):
    """One call that waits; what a file of the spool holds."""

    model_config = ConfigDict(extra="forbid")

    action: Literal[
        "start_run", "log_params", "log_tags", "log_points", "log_file", "log_inputs", "log_model", "end_run"
    ]
    run: str
    """Our own id of the run."""
    experiment: str | None = None
    """None in the files of former releases."""
    name: str = ""
    tags: dict[str, str] = {}
    parent: str | None = None
    time_ms: int | None = None
    params: dict[str, str] = {}
    points: list[Point] = []
    datasets: list[Dataset] = []
    succeeded: bool = True
    has_data: bool = False


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
        self._held = ExitStack()
        self._queue = _Queue(storage, f"{FOLDER}/{uuid.uuid4().hex[:12]}")
        self._runs: dict[str, str] = {}
        self._next_try = float("-inf")
        self._told: set[str] = set()
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

    def log_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Tags of a run that are known later than its start."""
        self._call("log_tags", run, {"tags": dict(tags)})

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Values of curves."""
        self._call("log_points", run, {"points": points})

    def log_file(self, run: str, name: str, data: bytes) -> None:
        """A file of the run."""
        self._call("log_file", run, {"name": name}, data=data)

    def log_inputs(self, run: str, datasets: Sequence[Dataset]) -> None:
        """What a run reads."""
        self._call("log_inputs", run, {"datasets": datasets})

    def log_model(self, run: str, folder: Path, tags: Mapping[str, str]) -> None:
        """A crosscoder's folder as a model; a copy waits with the entry while the server is away."""
        self._call("log_model", run, {"tags": dict(tags)}, folder=folder)

    def end_run(self, run: str, *, succeeded: bool, time_ms: int | None = None) -> None:
        """Close a run."""
        ended = time_ms or now_ms()
        self._call("end_run", run, {"succeeded": succeeded, "time_ms": ended})

    def machine_load(self) -> dict[str, float]:
        """Load of this machine now."""
        return self._inner.machine_load()

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
                except TrackerAwayError as error:
                    self._say_waiting(self._queue, f"the server is still away ({error})")
            self._held.close()
            self._inner.close()

    def _call(
        self, action: str, run: str, content: dict[str, Any], *, data: bytes = b"", folder: Path | None = None
    ) -> None:
        entry = _Entry.model_validate(
            {"action": action, "run": run, "experiment": self._inner.experiment, "has_data": bool(data), **content}
        )
        with self._lock:
            if self._queue.waits and self._retries.clock() >= self._next_try:
                try:
                    self._drain()
                except TrackerAwayError as error:
                    _log.info("tracking: %s", error)
            if not self._queue.waits:
                started = self._retries.clock()
                try:
                    self._deliver(entry, data, folder, self._runs)
                    return
                except TrackerAwayError as error:
                    self._pause_since(started)
                    self._say(f"tracking: {error}; the run goes on, values wait in {self._storage.url(FOLDER)}")
                except TrackerRefusedError as error:
                    self._say_once(
                        "refused", f"tracking: {error}; the run goes on, values wait in {self._storage.url(FOLDER)}"
                    )
                    self._keep(entry, data, folder, is_refused=True)
                    return
            self._keep(entry, data, folder)

    def _keep(self, entry: _Entry, data: bytes, folder: Path | None, *, is_refused: bool = False) -> None:
        """Publish an entry; where the storage takes none either, the run goes on without it."""
        try:
            if not self._queue:
                self._held.enter_context(locked(self._storage, [self._queue.folder], entry.name or entry.run))
            self._queue.add(entry, data, folder, is_refused=is_refused)
        except (CrossrayError, OSError) as error:
            text = f"values cannot wait in {self._storage.url(FOLDER)} ({first_line(error)})"
            self._say_once("lost", f"tracking: {text}; the run goes on without them")

    def _pause_since(self, started: float) -> None:
        now = self._retries.clock()
        wait = self._retries.first_wait_seconds
        self._next_try = now + (max(wait, _PAUSE_PER_TRY * (now - started)) if wait else 0.0)

    def _say_once(self, kind: str, text: str) -> None:
        """Tell the first of a kind; the log has all."""
        _log.info("%s", text)
        if kind not in self._told:
            self._told.add(kind)
            self._say(text)

    def _say_waiting(self, queue: "_Queue", reason: str) -> None:
        self._say(
            f"tracking: {reason}; {len(queue)} entries wait in {self._storage.url(queue.folder)}, the next run on this "
            "storage root delivers them (remove that folder to give them up)"
        )

    def _drain(self) -> None:
        """Deliver what waits, in order; TrackerAwayError where the server goes away meanwhile."""
        total, started = len(self._queue), self._retries.clock()
        try:
            refusal = self._deliver_all(self._queue, self._runs)
        finally:
            self._pause_since(started)
        if delivered := total - len(self._queue):
            self._say(f"tracking: the server is back, {delivered} waiting entries were delivered")
        if refusal is not None:
            self._say_waiting(self._queue, refusal)

    def _deliver_leftovers(self) -> None:
        """What former runs could not deliver; their runs are found again by their tags."""
        for name in self._storage.folders(FOLDER):
            try:
                with locked(self._storage, [f"{FOLDER}/{name}"], "delivery"):
                    self._deliver_leftover(_Queue(self._storage, f"{FOLDER}/{name}"))
            except HeldError:  # a run that is under way delivers its own
                continue
            except TrackerAwayError as error:
                self._say(f"tracking: {error}; entries of a former run still wait in {self._storage.url(FOLDER)}")
                return

    def _deliver_leftover(self, queue: "_Queue") -> None:
        total = len(queue)
        refusal = self._deliver_all(queue, {})
        if delivered := total - len(queue):
            self._say(f"tracking: {delivered} entries of a former run were delivered")
        if refusal is not None:
            self._say_waiting(queue, f"of a former run: {refusal}")

    def _deliver_all(self, queue: "_Queue", runs: dict[str, str]) -> str | None:
        """Deliver every entry that the server takes; why the first of the others is not, None where there are none."""
        refusal = None
        for number in queue.numbers:
            try:
                entry, data = queue.read(number)
                if entry.experiment not in (None, self._inner.experiment):
                    raise TrackerRefusedError(f"they are of tracking.experiment {entry.experiment!r}")
                with self._storage.local_folder(queue.model_key(number)) as folder:
                    self._deliver(entry, data, folder, runs)
            except (TrackerRefusedError, InputError) as error:
                refusal = refusal or first_line(error)
                queue.refuse(number)
            else:
                queue.drop(number)
        return refusal

    def _deliver(self, entry: _Entry, data: bytes, folder: Path | None, runs: dict[str, str]) -> None:
        """One call to the inner tracker, under the server's ids."""
        if entry.action == "start_run":
            parent = None if entry.parent is None else self._known(entry.parent, runs)
            runs[entry.run] = self._inner.start_run(entry.name, entry.tags, parent, time_ms=entry.time_ms)
            return
        run = self._known(entry.run, runs)
        match entry.action:
            case "log_params":
                self._inner.log_params(run, entry.params)
            case "log_tags":
                self._inner.log_tags(run, entry.tags)
            case "log_points":
                self._inner.log_points(run, entry.points)
            case "log_file":
                self._inner.log_file(run, entry.name, data)
            case "log_inputs":
                self._inner.log_inputs(run, entry.datasets)
            case "log_model":
                if folder is None or not folder.is_dir():
                    raise TrackerRefusedError(f"expected a model's folder beside its entry, got none ({folder})")
                self._inner.log_model(run, folder, entry.tags)
            case "end_run":
                self._inner.end_run(run, succeeded=entry.succeeded, time_ms=entry.time_ms)

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
        stems = [name.removesuffix(".json") for name in found if name.endswith(".json")]
        self.numbers = sorted(int(stem) for stem in stems if stem.isdecimal() and stem.isascii())
        self._refused: set[int] = set()
        self._next = self.numbers[-1] + 1 if self.numbers else 1

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def waits(self) -> bool:
        """Whether an entry waits that the server has not refused: what is newer must wait behind it."""
        return len(self._refused) < len(self.numbers)

    def add(self, entry: _Entry, data: bytes, folder: Path | None, *, is_refused: bool) -> None:
        """Publish an entry; it counts from the moment its JSON is there, which is last."""
        number, key = self._next, self._key(self._next)
        if data:
            self._storage.write_bytes(f"{key}.bin", data)
        if folder is not None:
            self._storage.upload_folder(folder, f"{key}-model")
        self._storage.write_bytes(f"{key}.json", entry.model_dump_json(exclude_defaults=True).encode())
        self.numbers = [*self.numbers, number]
        self._next = number + 1
        if is_refused:
            self._refused.add(number)

    def read(self, number: int) -> tuple[_Entry, bytes]:
        """An entry and its bytes; TrackerRefusedError for what is none."""
        key = self._key(number)
        try:
            entry = _Entry.model_validate(self._storage.read_json(f"{key}.json"))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            where = ".".join(map(str, fault["loc"]))
            raise TrackerRefusedError(f"{self._storage.url(key)}.json: no entry ({where}: {fault['msg']})") from error
        return entry, self._storage.read_bytes(f"{key}.bin") if entry.has_data else b""

    def model_key(self, number: int) -> str:
        """The folder of an entry's model, whether or not it has one."""
        return f"{self._key(number)}-model"

    def refuse(self, number: int) -> None:
        """Leave an entry where it is, without holding up others."""
        self._refused.add(number)

    def drop(self, number: int) -> None:
        """Forget an entry; the last one takes the folder with it."""
        self.numbers = [own for own in self.numbers if own != number]
        self._refused.discard(number)
        key = self._key(number)
        for name in (f"{key}.json", f"{key}.bin", f"{key}-model"):
            self._storage.delete(name)
        if not self.numbers:
            self._storage.delete(self.folder)

    def _key(self, number: int) -> str:
        return f"{self.folder}/{number:06d}"
