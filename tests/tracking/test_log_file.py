"""The log file of a run: what goes there, what the terminal shows of it, and when there is none."""

import logging
import warnings
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Console, SilentReporter
from pipeline.tracking.log_file import FOLDER, run_logging, terminal_logging

ours = logging.getLogger("pipeline.numerics.trainer")
theirs = logging.getLogger("library")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


@pytest.fixture(autouse=True)
def _warnings_are_no_errors() -> None:
    warnings.simplefilter("default")  # undone by pytest after each test


def read(storage: Storage) -> str:
    (name,) = storage.files(FOLDER)
    assert name.startswith("demo-") and name.endswith(".log")
    return storage.read_bytes(f"{FOLDER}/{name}").decode()


def test_the_file_has_everything_and_the_terminal_our_warnings_once(storage: Storage, tmp_path: Path) -> None:
    shown: list[str] = []
    with (tmp_path / "terminal").open("w") as terminal, run_logging(storage, "demo", shown.append) as log:
        Console(terminal, is_terminal=False).message("tracking: here")
        assert not log.is_written
        ours.info("reference kernels")
        assert log.is_written
        for _ in range(2):
            ours.warning("the store\ndoes not answer")
        theirs.warning("a library's record")
        theirs.info("a library's chatter")
        warnings.warn("a library's warning", UserWarning, stacklevel=1)
    text = read(storage)
    assert log.url == storage.url(f"{FOLDER}/{storage.files(FOLDER)[0]}")
    for part in ("run demo on", "tracking: here", "reference kernels", "a library's record", "UserWarning: a"):
        assert text.count(part) == 1, part
    assert text.count("does not answer") == 2
    assert "chatter" not in text
    assert shown == ["warning: the store does not answer"]
    assert (tmp_path / "terminal").read_text() == "tracking: here\n"


def test_a_run_that_has_nothing_to_do_writes_nothing(storage: Storage, tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("w") as terminal, run_logging(storage, "demo", lambda _: None) as log:
        Console(terminal, is_terminal=False).message("all 19 steps are done, nothing was written")
    assert not log.is_written
    assert not storage.exists("")


def test_how_a_run_failed_is_in_its_file_and_logging_is_as_before(storage: Storage) -> None:
    before = (list(logging.getLogger().handlers), list(logging.getLogger("pipeline").handlers), warnings.showwarning)
    with pytest.raises(ZeroDivisionError), run_logging(storage, "demo", lambda _: None):
        ours.info("begun")
        raise ZeroDivisionError
    assert "Traceback" in read(storage) and "ended by ZeroDivisionError" in read(storage)
    after = (list(logging.getLogger().handlers), list(logging.getLogger("pipeline").handlers), warnings.showwarning)
    assert after == before


def test_a_root_that_takes_no_file_changes_no_error(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file, no folder")
    with (
        pytest.raises(InputError, match="the run's own"),
        run_logging(Storage(str(tmp_path / "root")), "demo", lambda _: None),
    ):
        ours.info("begun")
        raise InputError("the run's own")


@pytest.mark.s3
def test_the_file_of_an_object_store_is_uploaded_at_the_end(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage(f"{s3_root}/{tmp_path.name}")
    with run_logging(storage, "demo", lambda _: None) as log:
        ours.info("begun")
        assert log.local.is_relative_to(tmp_path / "runs" / FOLDER) and not storage.exists(FOLDER)
    assert "begun" in read(storage) and log.url.startswith("s3://")


def test_without_a_file_the_terminal_shows_the_libraries_warnings_too(storage: Storage) -> None:
    shown: list[str] = []
    with terminal_logging(shown.append):
        for _ in range(2):
            theirs.warning("a library's record")
        warnings.warn("a library's\nwarning", UserWarning, stacklevel=1)
        with run_logging(storage, "demo", lambda _: None):
            theirs.warning("goes to the file")
        ours.error("ours")
    assert shown[0] == "warning: a library's record" and shown[2:] == ["error: ours"]
    assert "UserWarning: a library's warning" in shown[1] and "\n" not in shown[1]


def test_a_silent_reporter_keeps_the_messages() -> None:
    reporter = SilentReporter()
    reporter.step(1, 2)
    reporter.message("kept")
    assert reporter.messages == ["kept"]
