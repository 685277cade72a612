"""The command line beside its commands: what the terminal gets when its reader leaves early."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import run_file

from pipeline import cli


def test_output_that_nobody_reads_any_more_is_no_traceback(tmp_path: Path) -> None:
    """As with `crossray plan FILE | head -1`."""
    path = run_file(tmp_path, str(tmp_path / "runs"))
    command = [sys.executable, "-m", "pipeline", "plan", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_connection_that_breaks_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_parsed: object) -> int:
        raise BrokenPipeError(32, "connection of a server")

    monkeypatch.setitem(cli._COMMANDS, "plan", broken)
    with pytest.raises(BrokenPipeError, match="connection of a server"):
        cli.main(["plan", "any.yaml"])
