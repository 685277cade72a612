"""Shared by the tests that make whole runs: the tiny run file, a finished run, and processes to disturb."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from pipeline.config.run_file import RunConfig, load
from pipeline.run import runner
from pipeline.run.flow import build_flow
from pipeline.stages.step import StageContext
from pipeline.storage.artifacts import Record
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter
from pipeline.tracking.tracker import RecordingTracker
from workloads.benchmarks import processes

TINY: dict[str, Any] = {
    "name": "tiny",
    "organism": {"size": "tiny", "marked": True},
    "models": {
        "base": {"kind": "organism", "member": "base"},
        "chat": {"kind": "organism", "member": "chat"},
        "dtype": "float32",
    },
    "corpus": {
        "sources": [
            {"name": "documents", "kind": "organism", "part": "documents"},
            {"name": "dialogues", "kind": "organism", "part": "dialogues"},
        ],
        "validation_frac": 0.2,
    },
    "activations": {"layer": 1, "rows_per_shard": 2000},
    "training": {"batch_rows": 256, "num_rows": 25_600},
    "crosscoders": [
        {"name": "l1", "num_latents": 128, "lr": 1e-3, "lr_warmup_steps": 10, "sparsity": {"kind": "l1", "mu": 0.01}},
        {
            "name": "batch_topk",
            "num_latents": 128,
            "lr": 1e-3,
            "lr_warmup_steps": 10,
            "sparsity": {"kind": "batch_topk", "k": 8, "threshold_start_step": 10, "threshold_decay": 0.9},
        },
    ],
    "analyses": {
        "latent_scaling": {"num_resamples": 100},
        "examples": {"num_contexts": 3, "latents": [3, 1, 2, 0]},
        "logit_lens": {"latents": [3, 1, 2, 0]},
        "causality": {"num_conversations": 12, "num_resamples": 100},
        "planted": {"num_resamples": 100},
        "steering": {"num_prompts": 2, "num_random": 1, "scales": [2.0], "max_new_tokens": 4},
    },
    "resources": {"cluster": {"num_cpus": 2}, "training": {"checkpoint_every_steps": 20}},
    "tracking": {"log_every_steps": 10},
}


def run_file(folder: Path, root: str, **changes: Any) -> Path:
    """A run file for the tiny pair with its artifacts under `root`."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "storage": {"root": root}, **changes}))
    return path


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, cwd=cwd, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


class Finished:
    """A finished run and all that was said about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracker = RecordingTracker()
        self.reporter = SilentReporter()
        config = load(run_file(folder, str(folder / "runs")))
        self.outcome = runner.run(config, self.reporter, self.tracker)
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """For another process: what was said. The rest is on the disk."""
        return {name: getattr(self, name) for name in ("folder", "tracker", "reporter", "outcome")}

    def __setstate__(self, said: dict[str, Any]) -> None:
        self.__dict__.update(said)
        self._open()

    def _open(self) -> None:
        self.root = self.folder / "runs"
        self.path = self.folder / "run.yaml"
        self.config = load(self.path)
        self.storage = Storage(str(self.root))
        self.states = {state.step.name: state for state in runner.inspect(self.config, self.storage)}

    def counts(self, name: str) -> dict[str, Any]:
        record = self.states[name].record
        assert record is not None
        return record.counts

    def table(self, step: str, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.root / self.states[step].step.key.folder / name)


def make(config: RunConfig, *stages: str) -> dict[str, Record]:
    """Run some stages of a run file in this process, on the cluster that it has joined; their records by stage."""
    storage = Storage(config.storage.root)
    context = StageContext(storage, config.resources, SilentReporter(), runner.Unlogged(), config.name, 10)
    records = {}
    for group in build_flow(config).groups:
        if group.steps[0].key.stage in stages:
            group.run(group.steps, context)
            records[group.steps[0].key.stage] = context.record_of(group.steps[0])
    return records


def copied(finished: Finished, folder: Path, *stages: str) -> Path:
    """A fresh root that holds only the artifacts of some stages."""
    root = folder / "runs"
    for stage in stages:
        shutil.copytree(finished.root / stage, root / stage)
    return root


def checksums(root: Path, stage: str) -> dict[str, Any]:
    """Everything that was computed for a stage: checksums and, for tables, their bytes' checksums."""
    return {
        path.parent.name: json.loads(path.read_text())["checksums"]
        for path in sorted(root.glob(f"{stage}/*/record.json"))
    }


def assert_same(root: Path, reference: Path, *stages: str) -> None:
    """What was made for these stages has the reference's bytes; the reference may hold more, of other runs."""
    for stage in stages:
        ours = checksums(root, stage)
        assert ours and ours.items() <= checksums(reference, stage).items(), stage


def has_checkpoint(root: Path) -> bool:
    """Whether Ray Train has noted a checkpoint of the fit under this root, so that a later start continues from it."""
    return any("step-" in path.read_text() for path in root.glob("training/*/checkpoint_manager_snapshot.json"))


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of some size at `folder`, for the length of the block; skips where nothing can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def start(path: Path, **variables: str) -> subprocess.Popen[str]:
    """The driver of a run, with further environment variables."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=path.parent,
        env=environment() | variables,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the run ended or hung before it could be disturbed: {process.communicate()[1][-2000:]}")
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """Process ids below a process, from /proc."""
    return [own for own in processes.descendants(pid) if own != pid]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def workers(name: str) -> set[int]:
    """Processes below this one, so of the cluster that it started, whose title holds `name`."""
    return {pid for pid in descendants(os.getpid()) if name in command_line(pid)}


@contextmanager
def killing(name: str, when: Callable[[], bool]) -> Iterator[None]:
    """SIGKILL one worker process that began within the block and has this title, as soon as `when` holds.

    On the cluster that this process has joined, so that no driver has to start. Fails where none was killed.
    """
    former, killed, is_over = workers(name), list[int](), threading.Event()

    def kill_one() -> None:
        while not killed and not is_over.wait(0.01):
            victims = sorted(workers(name) - former) if when() else []
            if victims:
                os.kill(victims[0], signal.SIGKILL)
                killed.append(victims[0])

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert killed, f"the work ended before a {name} could be killed"
