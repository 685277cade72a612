"""Where latents fire, against brute force over dense codes."""

import numpy as np
import pytest
import torch

from pipeline.analyses.rows import RowBatch
from pipeline.explorer.sample import Sampled
from pipeline.numerics.codes import SparseCodes

NUM_LATENTS = 12


def dense(seed: int, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    code_BF = torch.rand(num_rows, NUM_LATENTS, generator=generator)
    code_BF[torch.rand(num_rows, NUM_LATENTS, generator=generator) < 0.7] = 0
    code_BF[:, 5] = 0
    return code_BF


@pytest.fixture
def codes() -> list[torch.Tensor]:
    return [dense(0, 40), dense(1, 25)]


@pytest.fixture
def sampled(codes: list[torch.Tensor]) -> Sampled:
    batches, first = [], 0
    for code_BF in codes:
        rows = torch.arange(first, first + len(code_BF))
        nothing = torch.empty(len(code_BF), 0)
        batches.append(
            RowBatch(
                *(nothing, SparseCodes.from_dense(code_BF), nothing),
                token_id_B=(rows % 7).int(),
                doc_id_B=rows // 10,
                position_B=(rows % 10).int(),
                flags_B=torch.zeros_like(rows),
                corpus_B=(rows % 2).int(),
            )
        )
        first += len(code_BF)
    return Sampled(tuple(batches), ("a", "b"), is_complete=True)


def test_a_latents_rows_are_those_of_the_dense_codes(sampled: Sampled, codes: list[torch.Tensor]) -> None:
    code_BF = torch.cat(codes).numpy()
    assert sampled.num_rows == len(code_BF)
    for latent in range(NUM_LATENTS):
        fired = sampled.of(latent)
        assert sorted(fired.row_N) == np.flatnonzero(code_BF[:, latent]).tolist()
        assert (np.diff(fired.value_N) <= 0).all()
        np.testing.assert_array_equal(fired.value_N, code_BF[fired.row_N, latent])


def test_cofiring_is_jaccards_index(sampled: Sampled, codes: list[torch.Tensor]) -> None:
    fires_BF = torch.cat(codes).numpy() > 0
    found = {one.latent: one for one in sampled.cofiring(2, NUM_LATENTS)}
    for latent in set(range(NUM_LATENTS)) - {2}:
        both = int((fires_BF[:, 2] & fires_BF[:, latent]).sum())
        either = int((fires_BF[:, 2] | fires_BF[:, latent]).sum())
        assert (both == 0) == (latent not in found)
        if both:
            assert found[latent].num_both == both
            assert found[latent].jaccard == pytest.approx(both / either)
    jaccards = [one.jaccard for one in sampled.cofiring(2, 4)]
    assert len(jaccards) == 4 and jaccards == sorted(jaccards, reverse=True)
    assert sampled.cofiring(5, 4) == []


def test_the_share_on_a_token_is_of_the_summed_activation(sampled: Sampled, codes: list[torch.Tensor]) -> None:
    code_BF = torch.cat(codes).double().numpy()
    is_token_B = np.isin(np.arange(len(code_BF)) % 7, [1, 3])
    share_F = sampled.on_tokens(np.array([1, 3]))
    sums_F = code_BF.sum(0)
    expected_F = np.divide(code_BF[is_token_B].sum(0), sums_F, out=np.zeros_like(sums_F), where=sums_F > 0)
    np.testing.assert_allclose(share_F, expected_F, rtol=1e-6)


def test_nothing_is_there_before_the_first_batch() -> None:
    empty = Sampled((), ("a",), is_complete=False)
    assert empty.num_rows == 0 and len(empty.of(3).row_N) == 0 and empty.cofiring(3, 5) == []
