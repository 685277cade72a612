"""The benchmark's contenders read the same rows, and the perfect batches hold as many tokens as ours."""

import pytest
import torch

from workloads.benchmarks import extraction

pytest.importorskip("peft")

CASE = extraction.Case(
    device="cpu",
    dtype="float32",
    dim=64,
    layers=4,
    layer=2,
    vocab=50,
    documents=20,
    tokens_per_batch=2048,
    repeats=1,
    padded_repeats=1,
    padded_documents=20,
    parts="loops,lora",
    threads=1,
)


def test_the_padded_loop_and_ours_read_the_same_rows() -> None:
    pair, documents = extraction.build_pair(CASE), extraction.build_documents(CASE)
    ours = extraction.run_ours(pair, CASE, documents)
    torch.testing.assert_close(ours.x_BMD, extraction.run_padded(pair, CASE, documents), rtol=2**-6, atol=1e-3)
    lengths = [len(row) for row in documents["input_ids"]]
    shapes = extraction.perfect_batches(lengths, CASE.tokens_per_batch)
    assert sum(count * length for count, length in shapes) == pytest.approx(sum(lengths), rel=0.01)


def test_every_contender_is_timed_and_the_lora_pairs_agree(capsys: pytest.CaptureFixture[str]) -> None:
    case = CASE._replace(documents=4)
    documents = extraction.build_documents(case)
    rows = [extraction.run_ours(pair, case, documents).x_BMD for pair in extraction.build_lora_pairs(case).values()]
    for other in rows[1:]:
        torch.testing.assert_close(other, rows[0], rtol=2**-6, atol=1e-3)
    for part in case.parts.split(","):
        extraction.PARTS[part](case)
    printed = capsys.readouterr().out
    assert "ours / padded" in printed
    assert "prefix / two copies" in printed
