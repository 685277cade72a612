"""Documents that cannot be run are found, and the others give the rows that they would have given without them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.extraction.activations import ActivationRows
from pipeline.extraction.quarantine import QuarantineResult, extract_with_quarantine

CRASHES, INFINITE = 90, 91


class Extraction:
    """One row per token, the token's id as its value; some ids break it, like those of a real model."""

    def __init__(self) -> None:
        self.num_documents: list[int] = []

    def __call__(self, documents: Mapping[str, Sequence[Any]]) -> ActivationRows:
        self.num_documents.append(len(documents["doc_id"]))
        ids = np.concatenate([*documents["input_ids"], np.zeros(0, np.int32)]).astype(np.int32)
        if CRASHES in ids:
            raise RuntimeError("a kernel refused this document\nand a second line")
        lengths = [len(row) for row in documents["input_ids"]]
        values = torch.from_numpy(ids).float().masked_fill(torch.from_numpy(ids == INFINITE), float("inf"))
        return ActivationRows(
            x_BMD=values.view(-1, 1, 1).expand(-1, 2, 3).to(torch.bfloat16),
            token_id_B=torch.from_numpy(ids),
            doc_id_B=torch.from_numpy(np.repeat(np.asarray(documents["doc_id"], dtype=np.int64), lengths)),
            position_B=torch.from_numpy(
                np.concatenate([np.arange(n) for n in lengths] + [np.zeros(0)]).astype(np.int32)
            ),
            flags_B=torch.zeros(len(ids), dtype=torch.int32),
            real_token_frac=1.0,
            num_capped=0,
        )


def documents(*poison: tuple[int, int]) -> dict[str, list[Any]]:
    """16 documents of 5 tokens; (place, id) puts an id into position 2."""
    ids = [np.full(5, place, dtype=np.int32) for place in range(16)]
    for place, token in poison:
        ids[place][2] = token
    return {"doc_id": [100 + p for p in range(16)], "input_ids": list(ids), "flags": [np.zeros(5, np.int32)] * 16}


def quarantine(columns: Mapping[str, Sequence[Any]], max_quarantined: int = 16) -> tuple[QuarantineResult, Extraction]:
    extraction = Extraction()
    return extract_with_quarantine(extraction, columns, vocab_size=100, max_quarantined=max_quarantined), extraction


def test_good_documents_are_run_once() -> None:
    result, extraction = quarantine(documents())
    assert extraction.num_documents == [16]
    assert result.quarantined == ()


@pytest.mark.parametrize("poison", [CRASHES, INFINITE, 100, -1])
@pytest.mark.parametrize("places", [(0,), (15,), (3, 4), (0, 7, 8, 15), tuple(range(16))])
def test_exactly_the_poisonous_documents_are_quarantined(poison: int, places: tuple[int, ...]) -> None:
    columns = documents(*((place, poison) for place in places))
    result, _ = quarantine(columns)
    assert [item.doc_id for item in result.quarantined] == [100 + place for place in places]
    rest = [place for place in range(16) if place not in places]
    alone = Extraction()({name: [column[place] for place in rest] for name, column in columns.items()})
    assert all(torch.equal(ours, one) for ours, one in zip(result.rows[:5], alone[:5], strict=True))


def test_one_failing_document_costs_about_two_more_runs() -> None:
    _, extraction = quarantine(documents((5, CRASHES)))
    assert sum(extraction.num_documents) <= 4 * 16


def test_the_reasons_say_what_happened() -> None:
    columns = documents((1, CRASHES), (2, INFINITE), (3, 100))
    columns["input_ids"][4] = None
    reasons = {item.doc_id: item.reason for item in quarantine(columns)[0].quarantined}
    assert reasons == {
        101: "the forward pass failed: RuntimeError: a kernel refused this document",
        102: "NaN or Inf in 1 of 5 rows, first at position 2",
        103: "cannot be read: token id 100 is outside the vocabulary of 100",
        104: "cannot be read: 0 token ids and 5 flags",
    }


def test_more_than_allowed_are_refused_and_named() -> None:
    columns = documents((1, CRASHES), (2, INFINITE), (3, 100), (4, CRASHES))
    assert len(quarantine(columns, max_quarantined=4)[0].quarantined) == 4
    with pytest.raises(InputError, match=r"expected at most 3 documents .* got 4 so far \(document 101: the forward"):
        quarantine(columns, max_quarantined=3)


def test_a_fault_of_the_batch_is_no_documents_fault() -> None:
    def extract(columns: Mapping[str, Sequence[Any]]) -> ActivationRows:
        if len(columns["doc_id"]) > 8:
            raise RuntimeError("too many at once")
        return Extraction()(columns)

    with pytest.raises(InputError, match="each alone, or in smaller batches, is fine"):
        extract_with_quarantine(extract, documents(), vocab_size=100, max_quarantined=16)


@pytest.mark.parametrize("error", [InputError("asked for"), MemoryError(), torch.OutOfMemoryError()])
def test_what_is_not_a_documents_fault_goes_through(error: Exception) -> None:
    def extract(_: Mapping[str, Sequence[Any]]) -> ActivationRows:
        raise error

    with pytest.raises(type(error)):
        extract_with_quarantine(extract, documents(), vocab_size=100, max_quarantined=16)
