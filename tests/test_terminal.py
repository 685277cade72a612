"""Rate, time left and lines of progress."""

import pytest

from pipeline.terminal import Console, Progress, format_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_rate_and_time_left_count_from_the_first_update(clock: list[float]) -> None:
    progress = Progress("activations", 300, "rows").update(100)
    assert progress.per_second is None
    assert progress.seconds_left is None
    clock[0] += 10
    progress.update(200)
    assert progress.per_second == 10.0
    assert progress.seconds_left == 10.0
    assert progress.line() == "activations   200/300 rows  67%  10 rows/s  10 s left"


def test_an_empty_stage_is_complete() -> None:
    assert "100%" in Progress("x", 0, "rows").update(0).line()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_terminal_line_is_overwritten_and_messages_stay(clock: list[float]) -> None:
    written: list[str] = []
    console = Console(written.append, is_terminal=True)
    progress = Progress("x", 10, "rows")
    console.progress(progress.update(1))
    clock[0] += 1
    console.progress(progress.update(5))
    console.message("done")
    assert written[0].startswith("\rx")
    assert written[1].startswith("\rx")
    assert written[2:] == ["\n", "done\n"]


def test_a_log_gets_few_lines_but_always_the_last(clock: list[float]) -> None:
    written: list[str] = []
    console = Console(written.append, is_terminal=False)
    progress = Progress("x", 100, "rows")
    for done in range(101):
        console.progress(progress.update(done))
        clock[0] += 0.5
    assert len(written) == 6
    assert "100/100" in written[-1]
    assert all(line.endswith("\n") for line in written)
