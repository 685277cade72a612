import pickle
from collections.abc import Callable

import pandas as pd
import pytest
import torch

from pipeline.analyses.activation_statistics import ActivationStatistics
from pipeline.analyses.examples import Examples
from pipeline.analyses.fidelity import Fidelity
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.planted import MeanDifference, Planted
from pipeline.analyses.rows import (
    RowAnalysis,
    analyse,
    document_index,
    document_slices,
    document_starts,
    merge_all,
    merge_sums,
    row_batch,
    sums_from_bytes,
    sums_to_bytes,
)
from pipeline.analyses.twins import Twins
from pipeline.errors import InputError


def _all_analyses(crosscoder: object) -> dict[str, RowAnalysis]:
    W_dec_FMD = crosscoder.W_dec_FMD  # type: ignore[attr-defined]
    num_latents, _, activation_dim = W_dec_FMD.shape
    corpora = ("web", "chat")
    return {
        "fidelity": Fidelity(activation_dim=activation_dim, num_latents=num_latents),
        "scaling": LatentScaling(crosscoder, num_resamples=50),  # type: ignore[arg-type]
        "templates": ActivationStatistics(num_latents=num_latents, corpora=corpora),
        "examples": Examples(num_latents=num_latents, num_contexts=3, num_sampled=4, corpora=corpora),
        "planted": Planted(
            activation_dim=activation_dim,
            num_latents=num_latents,
            labels=("a", "b"),
            chat_corpora=(1,),
            mean_difference_D=torch.ones(activation_dim),
            num_resamples=50,
        ),
        "mean_difference": MeanDifference(activation_dim=activation_dim, chat_corpora=(1,), first_tokens=2),
        "twins": Twins(W_dec_FMD=W_dec_FMD, min_cosine=-1.0),
    }


def _assert_same(a: object, b: object) -> None:
    if isinstance(a, pd.DataFrame):
        assert isinstance(b, pd.DataFrame)
        pd.testing.assert_frame_equal(a, b, rtol=1e-9, atol=1e-12)
    else:
        assert a == pytest.approx(b)


def test_batches_workers_and_bytes_give_the_table_of_one_pass(make_world: Callable) -> None:
    world = make_world()
    with torch.no_grad():  # twins need chat-only and base-only latents
        world.crosscoder.W_dec_FMD[1:4, 0] *= 0.01
        world.crosscoder.W_dec_FMD[4:7, 1] *= 0.01
    analyses = _all_analyses(world.crosscoder)
    whole = analyse(analyses, [world.batch()])
    restored: dict[str, RowAnalysis] = pickle.loads(pickle.dumps(analyses))  # what a worker receives
    parts = []
    for batches in (world.batches(20)[:3], world.batches(20)[3:], []):
        sums = analyse(restored, batches)
        parts.append({name: sums_from_bytes(sums_to_bytes(value)) for name, value in sums.items()})
    for order in (parts, parts[::-1]):
        merged = merge_all(analyses, order)
        for name, analysis in analyses.items():
            _assert_same(analysis.table(whole[name]), analysis.table(merged[name]))


def test_merging_leaves_its_inputs_alone(make_world: Callable) -> None:
    world = make_world()
    analyses = _all_analyses(world.crosscoder)
    first, second = (analyse(analyses, [batch]) for batch in world.batches(80)[:2])
    before = {name: sums_to_bytes(sums) for name, sums in first.items()}
    merge_all(analyses, [first, second])
    assert before == {name: sums_to_bytes(sums) for name, sums in first.items()}


def test_no_rows_is_an_error_for_what_cannot_be_answered_and_an_empty_table_otherwise(make_world: Callable) -> None:
    for name, analysis in _all_analyses(make_world().crosscoder).items():
        if name in ("examples", "twins"):
            assert len(analysis.table(analysis.start())) == 0
        else:
            with pytest.raises(InputError, match="got 0"):
                analysis.table(analysis.start())


def test_an_empty_batch_changes_nothing(make_world: Callable) -> None:
    world = make_world()
    empty = row_batch(world.crosscoder, {name: part[:0] for name, part in world.rows.items()})
    analyses = _all_analyses(world.crosscoder)
    with_it, without = analyse(analyses, [world.batch(), empty]), analyse(analyses, [world.batch()])
    for name, analysis in analyses.items():
        _assert_same(analysis.table(with_it[name]), analysis.table(without[name]))


def test_a_crosscoder_of_another_size_is_refused(make_world: Callable) -> None:
    world, other = make_world(), make_world(num_latents=7, activation_dim=5)
    with pytest.raises(InputError, match="another layer"):
        row_batch(other.crosscoder, world.rows)
    with pytest.raises(InputError, match="expected rows with x, token_id"):
        row_batch(world.crosscoder, {"x": world.rows["x"]})
    for name, analysis in _all_analyses(other.crosscoder).items():
        if name != "mean_difference" and not (name == "twins" and len(analysis.pairs.cosine) == 0):  # type: ignore[attr-defined]
            with pytest.raises(InputError, match="7"):
                analysis.update(analysis.start(), world.batch())


def test_document_slices_never_split_a_document() -> None:
    doc_id = torch.tensor([5, 5, 5, 7, 7, 9, 1, 1, 1, 1, 1, 1, 3])
    assert document_slices(doc_id, max_rows=5) == [slice(0, 5), slice(5, 6), slice(6, 12), slice(12, 13)]
    assert document_slices(doc_id, max_rows=100) == [slice(0, 13)]
    assert document_slices(doc_id[:0], max_rows=5) == []
    assert document_starts(doc_id).tolist() == [0, 3, 5, 6, 12]
    assert document_index(doc_id).tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4]
    with pytest.raises(InputError, match="got 0"):
        document_slices(doc_id, max_rows=0)


def test_sums_of_different_crosscoders_do_not_merge() -> None:
    with pytest.raises(InputError, match="same crosscoder"):
        merge_sums({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
