"""Documents ranked by a latent: against dense codes, and on planted documents of a behaviour."""

import numpy as np
import pytest
import torch

from pipeline.analyses.documents import document_activity, ranked_documents
from pipeline.analyses.rows import RowBatch
from pipeline.errors import InputError
from pipeline.numerics.codes import SparseCodes

NUM_DOCUMENTS, NUM_LATENTS, PLANTED = 20, 6, 4
IS_BEHAVIOUR = np.arange(NUM_DOCUMENTS) % 5 == 2


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """code_BF, doc_id_B and position_B: latent 4 runs through the documents of a behaviour, and flares up elsewhere."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 12, (NUM_DOCUMENTS,), generator=generator)
    document_B = torch.arange(NUM_DOCUMENTS).repeat_interleave(sizes)
    position_B = torch.cat([torch.arange(int(size)) + 2 for size in sizes])
    code_BF = torch.rand(len(document_B), NUM_LATENTS, generator=generator)
    code_BF *= torch.rand(code_BF.shape, generator=generator) < 0.3
    code_BF[:, PLANTED] = torch.from_numpy(IS_BEHAVIOUR)[document_B] * (1 + code_BF[:, 0])
    flares = [int((document_B == document).nonzero()[0]) for document in (0, 6)]
    code_BF[flares, PLANTED] = 2.5
    return code_BF, 1000 - document_B, position_B


def batches(code_BF: torch.Tensor, doc_id_B: torch.Tensor, position_B: torch.Tensor) -> list[RowBatch]:
    cut = int((doc_id_B > 990).sum())
    made = []
    for part in (slice(0, cut), slice(cut, None)):
        zeros_B = torch.zeros_like(doc_id_B[part])
        x_BMD = torch.zeros(len(zeros_B), 2, 3)
        codes = SparseCodes.from_dense(code_BF[part])
        made.append(RowBatch(x_BMD, codes, x_BMD, zeros_B, doc_id_B[part], position_B[part], zeros_B, zeros_B))
    return made


def test_sums_are_those_of_the_dense_codes() -> None:
    code_BF, doc_id_B, position_B = planted()
    table = document_activity(batches(code_BF, doc_id_B, position_B), [PLANTED, 1, 1])
    assert set(table["latent"]) == {1, PLANTED}
    found = 0
    for latent in (1, PLANTED):
        for doc_id in doc_id_B.unique().tolist():
            own_B = code_BF[doc_id_B == doc_id, latent]
            rows = table[(table["latent"] == latent) & (table["doc_id"] == doc_id)]
            assert len(rows) == int(own_B.any())
            for row in rows.itertuples():
                found += 1
                assert (row.num_rows, row.num_active) == (len(own_B), int((own_B > 0).sum()))
                expected = [float(own_B.sum()), float(own_B.mean()), float(own_B.max())]
                assert [row.sum, row.mean, row.max] == pytest.approx(expected)
                assert row.position == int(position_B[doc_id_B == doc_id][own_B.argmax()])
    assert found == len(table)


@pytest.mark.parametrize("by", ["sum", "mean"])
def test_documents_of_the_behaviour_come_first(by: str) -> None:
    activity = document_activity(batches(*planted()), [PLANTED])
    table = ranked_documents(activity, by=by, num_documents=10)  # type: ignore[arg-type]
    first = 1000 - table["doc_id"].to_numpy()[: IS_BEHAVIOUR.sum()]
    assert IS_BEHAVIOUR[first].all() and len(table) == IS_BEHAVIOUR.sum() + 2
    assert table["share"].is_monotonic_increasing and table["share"].iloc[-1] == pytest.approx(1)
    flared = ranked_documents(activity, by="max", num_documents=2)
    assert set(1000 - flared["doc_id"]) == {0, 6}, "a single strong token leads by the largest code alone"


def test_ranks_are_cut_per_latent_and_ties_go_to_the_smaller_id() -> None:
    activity = document_activity(batches(*planted()), [0, PLANTED])
    activity["sum"] = 1.0
    table = ranked_documents(activity, by="sum", num_documents=3)
    assert table["rank"].tolist() == [0, 1, 2, 0, 1, 2]
    for latent, own in table.groupby("latent"):
        assert own["doc_id"].tolist() == sorted(activity.loc[activity["latent"] == latent, "doc_id"])[:3]


def test_what_makes_no_sense_is_refused() -> None:
    activity = document_activity(batches(*planted()), [0])
    with pytest.raises(InputError, match=r"by: .*'median'"):
        ranked_documents(activity, by="median", num_documents=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"num_documents: .*0"):
        ranked_documents(activity, by="sum", num_documents=0)
