"""The command line beside its commands: what the terminal gets, and what happens when it is gone."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment, run_file

from pipeline import cli
from pipeline.arguments import SHELLS, completion
from pipeline.errors import InputError


def test_output_that_nobody_reads_any_more_is_no_traceback(tmp_path: Path) -> None:
    """As with `crossray plan FILE | head -1`."""
    path = run_file(tmp_path, str(tmp_path / "runs"))
    command = [sys.executable, "-m", "pipeline", "plan", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("streams", "code", "told"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 1, "crossray: standard output: cannot be written to: No space left on device"),
        (">/dev/full 2>&1", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full_are_no_traceback(streams: str, code: int, told: str) -> None:
    command = ["sh", "-c", f"{sys.executable} -m pipeline {streams}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert (done.returncode, done.stderr.strip()) == (code, told)


def test_an_error_is_told_by_its_code_where_nobody_can_read_it() -> None:
    command = ["sh", "-c", f"{sys.executable} -m pipeline plan /nowhere.yaml 2>&- >&-"]
    assert subprocess.run(command, env=environment()).returncode == 2


def test_control_characters_and_foreign_letters_are_spelled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(_parsed: object) -> int:
        sys.stdout.write("label \x1b]0;owned\x07 \x9b31m \u202egnp.exe \ud800 caf\u00e9\n")
        raise InputError("models.chat: got '\x1b[2J'")

    monkeypatch.setitem(cli._COMMANDS, "plan", show)
    assert cli.main(["plan", "any.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "label \\x1b]0;owned\\x07 \\x9b31m \\u202egnp.exe \\ud800 caf\u00e9\n"
    assert "\x1b" not in err and "models.chat" in err


def test_letters_that_the_locale_lacks_are_spelled() -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = (
        "import sys; from pipeline import cli; "
        "cli._COMMANDS['plan'] = lambda _: sys.stdout.write('caf\\u00e9') and 0; sys.exit(cli.main(['plan', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment() | plain)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\\xe9", b"")


def test_an_interpreter_without_docstrings_is_refused_in_one_line() -> None:
    command = [sys.executable, "-OO", "-m", "pipeline", "plan", "/nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "-OO" in done.stderr


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_parsed: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "plan", interrupted)
    assert cli.main(["plan", "any.yaml"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


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


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_learns_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in cli._COMMANDS)
    assert "checkpoint" in script and "older" in script and "benchmark" in script


def test_bash_completes_what_was_begun(tmp_path: Path) -> None:
    (tmp_path / "pair.yaml").touch()
    words = {"crossray ru": {"run", "runs"}, "crossray show --js": {"--json"}, "crossray plan pai": {"pair.yaml"}}
    asked = "".join(
        f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; COMPREPLY=(); _shtab_crossray; "
        'echo "${COMPREPLY[@]}"\n'
        for line in words
    )
    script = completion("bash") + "\n" + asked
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(words.values()), done.stderr
