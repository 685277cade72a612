"""Rate, time left, the lines of a log, the redrawn line of a terminal, and tables; time is injected."""

import io
import os
import re

import pytest

from pipeline.terminal import Console, Progress, format_seconds, text_table


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_rate_and_time_left_count_from_the_first_update(clock: Clock) -> None:
    progress = Progress("activations", 300, "rows", clock=clock).update(100)
    assert progress.per_second is None
    assert progress.seconds_left is None
    clock.seconds += 10
    progress.update(200)
    assert progress.per_second == 10.0
    assert progress.seconds_left == 10.0
    assert progress.line() == "activations   200/300 rows  67%  10 rows/s  10 s left"


def test_a_slow_start_spoils_no_time_left(clock: Clock) -> None:
    progress = Progress("x", 1200, "rows", clock=clock).update(0)
    left = []
    for done in range(10, 200, 10):  # workers load models for 20 s, then each second gives 10 rows
        clock.seconds += 20 if done == 10 else 1
        left.append(progress.update(done).seconds_left)
    assert left[:5] == [None] * 5
    assert left[6:] == [pytest.approx((1200 - done) / 10) for done in range(70, 200, 10)]


def test_the_rate_forgets_what_is_older_than_half_a_minute(clock: Clock) -> None:
    progress = Progress("x", 10_000, "rows", clock=clock)
    for second in range(100):
        progress.update(second if second < 50 else 50 + 20 * (second - 50))
        clock.seconds += 1
    assert progress.per_second == 20.0


def test_many_updates_in_one_moment_are_one_point_of_the_window(clock: Clock) -> None:
    progress = Progress("x", 10_000, "rows", clock=clock)
    for done in range(5000):
        progress.update(done)
        clock.seconds += 0.001
    assert progress.per_second == pytest.approx(1000.0)


def test_an_empty_stage_is_complete() -> None:
    assert "100%" in Progress("x", 0, "rows").update(0).line()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_log_gets_few_lines_but_always_the_last(clock: Clock) -> None:
    file = io.StringIO()
    console = Console(file, is_terminal=False, clock=clock)
    progress = Progress("x", 100, "rows", clock=clock)
    console.step(5, 19)
    for done in range(101):
        console.progress(progress.update(done))
        clock.seconds += 0.5
    console.message("done")
    console.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 7
    assert all(line.startswith("step 5 of 19  x ") for line in lines[:-1])
    assert "100/100" in lines[-2] and lines[-1] == "done"
    assert file.getvalue().isascii() and "\x1b" not in file.getvalue()


def drawn(file: io.StringIO) -> list[str]:
    """What was drawn, line by line and state by state, without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("width", [20, 50, 80, 200])
def test_a_terminal_line_is_redrawn_and_never_wider_than_the_terminal(
    clock: Clock, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    file = io.StringIO()
    console = Console(file, is_terminal=True, clock=clock)
    console.step(12, 19)
    progress = Progress("activations", 1_000_000, "rows", clock=clock)
    for done in range(0, 900_001, 100_000):
        console.progress(progress.update(done, "loss 9.741  5.063"))
        clock.seconds += 1
    console.message("a message that stays")
    console.close()
    lines = drawn(file)
    assert max(len(line) for line in lines) <= width
    assert lines.count("a message that stays") == 1
    states = [line for line in lines if line.startswith("step 12 of 19")]
    assert len(states) >= 10 and file.getvalue().count("\n") == 2  # the message's line, and the last state's
    assert ("loss 9.741  5.063" in states[-1]) == (width == 200)


def test_a_terminal_is_left_with_its_cursor(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = io.StringIO()
    console = Console(file, is_terminal=True, clock=clock)
    console.progress(Progress("x", 10, "rows", clock=clock).update(1))
    assert file.getvalue().count("\x1b[?25h") == 0
    console.close()
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_reader_that_leaves_ends_no_run(clock: Clock, is_terminal: bool) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        console = Console(file, is_terminal=is_terminal, clock=clock)
        progress = Progress("x", 10, "rows", clock=clock)
        console.progress(progress.update(1))
        os.close(reading)
        for done in range(2, 11):
            clock.seconds += 20
            console.progress(progress.update(done))
            console.message("a message")
        console.close()


def test_what_is_shown_moves_no_cursor(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = io.StringIO()
    console = Console(file, is_terminal=True, clock=clock)
    console.progress(Progress("stage\x1b]0;a", 10, "rows", clock=clock).update(1, "note\x1b[2J"))
    console.message("label \x1b[31m \x9b2J")
    console.close()
    assert not re.search(r"\x1b\]0;a|\x1b\[2J|\x1b\[31m|\x9b", file.getvalue())
    assert all(text in file.getvalue() for text in (r"stage\x1b]0;a", r"note\x1b[2J", r"label \x1b[31m \x9b2J"))


def test_a_table_is_plain_text_with_numbers_to_the_right() -> None:
    rows = [["l1", "[bold]a", "1,024"], ["batch_topk", "", "-"]]
    assert text_table(["", "word", "latents"], rows).splitlines() == [
        "            word     latents",
        "----------  -------  -------",
        "l1          [bold]a    1,024",
        "batch_topk                 -",
    ]
    left = text_table(["", "word", "latents"], rows, align_numbers=False).splitlines()
    assert left[2:] == ["l1          [bold]a  1,024", "batch_topk           -"]


def test_a_table_may_be_wider_than_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    header, rule, row = text_table(["a", "b"], [["x" * 300, "y" * 300]]).splitlines()
    assert row == f"{'x' * 300}  {'y' * 300}" and rule == f"{'-' * 300}  {'-' * 300}"
    assert header == f"a{' ' * 301}b"
