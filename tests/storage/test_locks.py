"""One writer at a time: held, left behind by a killed process, renewed or stale on an object store."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import environment, run_file

from pipeline.config.run_file import load
from pipeline.run.execution import _make
from pipeline.run.flow import build_flow
from pipeline.run.runner import Unlogged
from pipeline.stages.step import StageContext
from pipeline.storage.filesystem import Storage
from pipeline.storage.locks import FOLDER, STALE_SECONDS, HeldError, locked
from pipeline.terminal import SilentReporter

NAME = "corpus/0123456789abcdef"
HOLD = (
    "import sys, time; from pipeline.storage.filesystem import Storage; from pipeline.storage.locks import locked\n"
    "with locked(Storage(sys.argv[1]), sys.argv[2:], 'theirs'): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture(params=["local", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A local root, and one whose files cannot be locked, as on an object store."""
    if request.param == "object store":
        monkeypatch.setattr(Storage, "local_path", lambda *_: None)
    return Storage(str(tmp_path / "root"))


def test_the_second_is_told_who_holds_the_lock(storage: Storage) -> None:
    with locked(storage, [NAME, "tokens/ab"], "first"):
        with pytest.raises(HeldError) as caught, locked(storage, ["x/y", NAME], "second"):
            pytest.fail("held twice")
        told = str(caught.value)
        assert all(word in told for word in (storage.url(NAME), "'first'", str(os.getpid()), socket.gethostname()))
        with locked(storage, ["x/y"], "third"):
            pass
    with locked(storage, [NAME], "second"):
        pass
    assert not storage.files(FOLDER)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "root"), NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_killed_process_holds_no_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "root"))
    with pytest.raises(HeldError, match=f"'theirs', process {holder.pid}"), locked(storage, [NAME], "mine"):
        pytest.fail("held twice")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(storage, [NAME], "mine"):
        pass
    assert not storage.files(FOLDER)


def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("holder", "is_held"),
    [
        ({"host": "elsewhere", "pid": 1, "age": 5.0}, True),
        ({"host": "elsewhere", "pid": 1, "age": STALE_SECONDS + 1}, False),
        ({"host": socket.gethostname(), "pid": os.getpid(), "age": 5.0}, True),
        ({"host": socket.gethostname(), "pid": None, "age": 5.0}, False),
        ({}, False),
        ("garbage", False),
    ],
)
def test_a_lease_that_nobody_renews_is_stale(
    holder: Any, is_held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "local_path", lambda *_: None)
    storage = Storage(str(tmp_path))
    if isinstance(holder, dict) and holder:
        pid = holder["pid"] if holder["pid"] is not None else _dead_pid()
        holder = {"host": holder["host"], "pid": pid, "renewed": time.time() - holder["age"]}
    storage.write_json(f"{FOLDER}/{NAME.replace('/', '-')}.lock", holder)
    if is_held:
        with pytest.raises(HeldError), locked(storage, [NAME], "mine"):
            pytest.fail("held twice")
        assert storage.files(FOLDER)
    else:
        with locked(storage, [NAME], "mine"):
            pass
        assert not storage.files(FOLDER)


def test_a_run_makes_no_artifact_that_another_one_is_making(tmp_path: Path) -> None:
    config = load(run_file(tmp_path, str(tmp_path / "runs")))
    storage, group = Storage(config.storage.root), build_flow(config).groups[0]
    context = StageContext(storage, config.resources, SilentReporter(), Unlogged(), "second", 10)
    with locked(storage, [group.steps[0].folder], "first"), pytest.raises(HeldError, match="'first'"):
        _make(group, group.steps, context)
    assert not storage.files("")
