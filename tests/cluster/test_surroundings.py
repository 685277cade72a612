"""What surrounds the driver: addresses where nobody listens, folders and limits that Ray cannot work with, Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from runs import environment

from pipeline.cluster.connect import _stderr_to, interruptible, local_cpus
from pipeline.cluster.surroundings import check_address, object_folder, ray_folder
from pipeline.errors import InputError


def test_ctrl_c_during_a_fit_is_an_interruption_and_the_handler_goes() -> None:
    """Ray Train's handler, word for word: it aborts the controller, then exits the process."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fit_that_ends_well_leaves_no_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    assert signal.getsignal(signal.SIGINT) is before


def test_cores_are_counted_where_the_system_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert local_cpus() == os.cpu_count()


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:9", "127.0.0.1:99999", "127.0.0.1:x", "nowhere", "", ":6379", "ray://127.0.0.1:9", "a..b:1"],
)
@pytest.mark.parametrize("is_in_the_environment", [False, True])
def test_an_address_where_nobody_listens_is_refused_at_once(
    address: str, is_in_the_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_in_the_environment and address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"resources\.cluster\.address") as caught:
        check_address("auto" if is_in_the_environment and address else address)
    assert repr(address) in str(caught.value) and time.monotonic() - started < 8


def test_the_address_of_a_cluster_that_has_ended_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9"):
        check_address("auto")


def test_an_address_where_somebody_listens_is_left_to_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("kind", ["long", "missing", "a file"])
def test_ray_starts_beside_a_folder_that_it_cannot_use(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"long": tmp_path / ("d" * 60), "missing": Path("/nowhere"), "a file": Path("/dev/null")}[kind]
    if kind == "long":
        folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    assert ray_folder() == "/tmp/ray"


def test_a_short_folder_of_the_user_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        assert ray_folder() == f"{folder}/ray"


@pytest.mark.parametrize(("soft", "hard", "is_enough"), [(64, 64, False), (64, 4096, True), (1024, 1024, True)])
def test_a_low_limit_of_open_files_is_raised_or_refused(soft: int, hard: int, is_enough: bool) -> None:
    code = (
        "import resource, sys; from pipeline.cluster.surroundings import allow_files; from pipeline.errors import "
        f"InputError; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "try: allow_files(); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "except InputError as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode == 0) == is_enough
    assert done.stdout.strip() == str(hard) if is_enough else "ulimit -n" in done.stderr


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with _stderr_to(tmp_path / "logs" / "ray.log"):
        sys.stderr.write("a message of Ray\n")


def test_objects_go_elsewhere_where_shared_memory_cannot_be_written_to(tmp_path: Path) -> None:
    assert object_folder("/elsewhere", tmp_path) is None
    assert object_folder("/elsewhere", tmp_path / "absent") is None
    assert object_folder("/elsewhere", Path("/proc/self")) == "/elsewhere"
