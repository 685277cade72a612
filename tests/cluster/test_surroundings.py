"""The driver's own surroundings: Ctrl-C beside Ray Train's handler, systems that do not say which cores may be used."""

import os
import signal
import sys

import pytest

from pipeline.cluster.connect import interruptible, local_cpus


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
