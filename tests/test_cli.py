"""The command line beside its commands: what the terminal gets when its reader leaves early."""

import logging
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


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_help_imports_nothing_that_takes_time() -> None:
    heavy = ("torch", "ray", "mlflow", "transformers", "pydantic", "yaml", "fsspec", "rich", "tenacity", "openai")
    code = (
        "import sys; from pipeline.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: sys.exit(' '.join(set(sys.modules) & set({heavy!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.stderr.strip() == ""
    assert "COMMAND" in done.stdout


def test_a_warning_of_ours_reaches_the_user_and_only_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(_parsed: object) -> int:
        for _ in range(2):
            logging.getLogger("pipeline.storage").warning("the store\nis slow")
        return 0

    monkeypatch.setitem(cli._COMMANDS, "plan", warn)
    assert cli.main(["plan", "any.yaml"]) == 0
    assert capsys.readouterr().err == "warning: the store is slow\n"
