"""Processor time and resident memory of this process and all its descendants, by role.

A local Ray cluster is a tree below the process that started it, so its raylet, its head service (GCS) and its workers
are found in /proc by their parents. Only anonymous memory is recorded: a leak raises it, and shared pages of the object
store, which count in every process that maps them, do not. Linux only.
"""

import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
ROLES = ("driver", "raylet", "gcs", "workers", "helpers")
"""Roles: this process; Ray's raylet and GCS; processes that run our code; agents (environments, logs, dashboard)."""


class Sample(NamedTuple):
    """Memory of all processes at one time."""

    time: float
    memory_bytes: dict[str, int]
    """Anonymous resident memory by role."""


class Process(NamedTuple):
    """One entry of /proc."""

    parent: int
    name: str
    cpu_seconds: float


def _read(pid: int) -> Process | None:
    """The entry of a process in /proc, or None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rsplit(")", 1)[1].split()
    return Process(int(fields[1]), command.replace("\0", " "), (int(fields[11]) + int(fields[12])) / _TICKS)


def anonymous_bytes(pid: int) -> int:
    """Resident memory that belongs to no file and no shared segment, in bytes; 0 if the process has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def role_of(name: str) -> str:
    """The role, from the command line: Ray's workers are named ray::something."""
    program = name.split(" ", 1)[0].rsplit("/", 1)[-1]
    if program in ("raylet", "gcs_server"):
        return {"raylet": "raylet", "gcs_server": "gcs"}[program]
    return "workers" if name.startswith("ray::") or "default_worker.py" in name else "helpers"


def descendants(root: int) -> dict[int, Process]:
    """Every process below `root`, and `root` itself."""
    found = {int(entry.name): _read(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    alive = {pid: process for pid, process in found.items() if process is not None}
    children = defaultdict(list)
    for pid, process in alive.items():
        children[process.parent].append(pid)
    chosen, queue = {}, [root]
    while queue:
        pid = queue.pop()
        if pid in alive:
            chosen[pid] = alive[pid]
            queue += children[pid]
    return chosen


class Watch:
    """Samples this process's tree in a thread until the end of the block.

    If a worker ends between two samples, at most one interval of its processor time is missing.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._first: dict[int, float] = {}
        self._last: dict[int, tuple[str, float]] = {}
        self.samples: list[Sample] = []

    def __enter__(self) -> "Watch":
        self._look()
        self._first = {pid: seconds for pid, (_, seconds) in self._last.items()}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self) -> None:
        own = os.getpid()
        memory = dict.fromkeys(ROLES, 0)
        for pid, process in descendants(own).items():
            role = "driver" if pid == own else role_of(process.name)
            self._last[pid] = (role, process.cpu_seconds)
            memory[role] += anonymous_bytes(pid)
        self.samples.append(Sample(time.time(), memory))

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time by role since the block began."""
        total = dict.fromkeys(ROLES, 0.0)
        for pid, (role, seconds) in self._last.items():
            total[role] += seconds - self._first.get(pid, 0.0)
        return total

    def memory_bytes(self, share: float) -> dict[str, float]:
        """Mean anonymous memory by role over the samples around a share (0 to 1) of the block."""
        place = round(share * (len(self.samples) - 1))
        near = self.samples[max(0, place - 2) : place + 3]
        return {role: sum(sample.memory_bytes[role] for sample in near) / len(near) for role in ROLES}
