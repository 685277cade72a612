"""The benchmark of the causality analysis measures what it says: every edit once, every part of the time."""

import pytest

from workloads.benchmarks import causality

CASE = causality.Case(
    dim=16,
    layers=3,
    layer=2,
    vocab=64,
    latents=64,
    k=4,
    chosen=8,
    dialogues=4,
    tokens=24,
    tokens_per_batch=64,
    repeats=1,
)


def test_the_analysis_is_read_beside_its_yardsticks(capsys: pytest.CaptureFixture[str]) -> None:
    reading = causality.read(CASE)
    assert min(reading.halves, reading.logits, reading.analysis) > 0
    assert set(reading.parts) == set(causality.PARTS)
    pair, dialogues = causality.make_pair(CASE), causality.make_dialogues(CASE)
    analysis = causality.make_analysis(CASE, pair, dialogues)
    kinds = [(item.kind, item.latents) for item in analysis.interventions if item.latents or item.kind != "replace"]
    assert reading.num_edits == len(set(kinds))
    causality.print_reading(CASE, reading)
    assert "analysis / halves" in capsys.readouterr().out
