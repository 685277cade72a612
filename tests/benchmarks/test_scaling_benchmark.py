"""The benchmark of Latent Scaling measures what it says: active latents, all parts, and a ratio."""

import pytest

from workloads.benchmarks import scaling

CASE = scaling.Case(dim=8, latents=64, k=6, rows=2 * scaling.BATCH_ROWS, groups=20, resamples=100, threads=1)


def test_every_part_is_timed_and_about_k_latents_are_active(capsys: pytest.CaptureFixture[str]) -> None:
    reading = scaling.measure(CASE)
    assert set(reading.seconds) == set(reading.cpu_seconds) == {"encode", "decode", "sums", "intervals"}
    assert all(seconds > 0 for seconds in reading.seconds.values())
    assert 4 < reading.active < 9
    scaling.print_reading(CASE, reading)
    assert "Latent Scaling / encoding" in capsys.readouterr().out
