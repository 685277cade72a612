"""The retry policy: how often, how long, and what the user and the log hear of it; time is injected."""

import logging
from collections.abc import Callable, Iterator

import pytest

from pipeline.errors import RetryPolicy


class BusyError(Exception):
    """May pass."""


class Time:
    """A clock that only waiting moves, and what each attempt takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waits: list[float] = []

    def sleep(self, wait: float) -> None:
        self.waits.append(wait)
        self.seconds += wait


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def policy(time: Time) -> RetryPolicy:
    return RetryPolicy(
        first_wait_seconds=1.0,
        longest_wait_seconds=20.0,
        deadline_seconds=60.0,
        sleep=time.sleep,
        clock=lambda: time.seconds,
    )


def failing(times: int, error: Exception) -> Callable[[], str]:
    faults: Iterator[Exception] = iter([error] * times)

    def attempt() -> str:
        for fault in faults:
            raise fault
        return "answer"

    return attempt


def call(policy: RetryPolicy, attempt: Callable[[], str], **more: Callable[[BaseException], float]) -> str:
    return policy.call(attempt, server="the store", is_transient=lambda error: isinstance(error, BusyError), **more)


def test_waits_double_with_jitter_up_to_the_longest(policy: RetryPolicy, time: Time) -> None:
    assert call(policy._replace(deadline_seconds=1000.0), failing(7, BusyError())) == "answer"
    assert len(time.waits) == 7
    for number, wait in enumerate(time.waits):
        assert min(2.0**number, 20.0) <= wait <= min(2.0**number + 1.0, 20.0)


def test_the_deadline_ends_with_the_last_fault_as_it_came(policy: RetryPolicy, time: Time) -> None:
    fault = BusyError("slow down")
    with pytest.raises(BusyError) as caught:
        call(policy, failing(1000, fault))
    assert caught.value is fault
    assert 60.0 <= time.seconds <= 61.0  # the last wait ends at the deadline, or first_wait_seconds after it


def test_other_faults_are_raised_at_once(policy: RetryPolicy, time: Time) -> None:
    with pytest.raises(ValueError, match="wrong"):
        call(policy, failing(1, ValueError("wrong")))
    assert time.waits == []


@pytest.mark.parametrize(("attempts", "made"), [(1, 1), (4, 4)])
def test_a_number_of_attempts_ends_it_too(policy: RetryPolicy, time: Time, attempts: int, made: int) -> None:
    with pytest.raises(BusyError):
        call(policy._replace(deadline_seconds=None, max_attempts=attempts), failing(9, BusyError()))
    assert len(time.waits) == made - 1


def test_some_attempts_are_made_though_each_takes_longer_than_the_deadline(policy: RetryPolicy, time: Time) -> None:
    attempts = [0]

    def slow() -> str:
        attempts[0] += 1
        time.seconds += 100
        raise BusyError

    with pytest.raises(BusyError):
        call(policy._replace(min_attempts=3), slow)
    assert attempts == [3]


@pytest.mark.parametrize(("asked", "kept"), [(7.5, 7.5), (90.0, 20.0)])
def test_the_wait_that_the_fault_asks_for_is_kept_within_the_longest(
    policy: RetryPolicy, time: Time, asked: float, kept: float
) -> None:
    call(policy, failing(1, BusyError()), asked_wait=lambda _: asked)
    assert time.waits == [kept]


def test_the_user_hears_once_of_a_long_wait_and_not_of_a_short_one(
    policy: RetryPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    call(policy._replace(first_wait_seconds=0.1), failing(2, BusyError("slow down")))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    caplog.clear()
    call(policy, failing(5, BusyError("slow down")))
    (shown,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert shown == "the store does not answer (slow down): trying again for up to 60 s"
    assert caplog.records[-1].getMessage() == "the store answers again"
