"""Same function means no difference: models in other units against themselves, and models that differ."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compared_pairs import WIDTH, changed, documents, fine_tuned, model, pair_of, rescaled, shifted

from pipeline.analyses.evidence import STREAM_COLUMNS, Evidence, EvidenceTables
from pipeline.analyses.next_tokens import next_token_batches, rows_without_sinks
from pipeline.analyses.rows import Sums, sums_from_bytes, sums_to_bytes
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.schema import Flag

CORPORA = ("web", "chat")
OPTIONS = RowOptions(tokens_per_batch=150, drop_bos=True)
RESCALED = [
    (architecture, factor, dtype)
    for architecture in ("llama", "gemma2")
    for factor in (0.1, 2, 8, 10, 100)
    for dtype in (torch.float32, torch.bfloat16)
    # Gemma's post-norm weight of 0.1 is stored as -0.9, of which bfloat16 keeps two digits: another function.
    if (architecture, factor, dtype) != ("gemma2", 0.1, torch.bfloat16)
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def originals() -> dict[str, Any]:
    return {architecture: model(architecture) for architecture in ("llama", "gemma2", "gpt2")}


def _evidence() -> Evidence:
    return Evidence(corpora=CORPORA, activation_dim=WIDTH)


def _sums(base: Any, chat: Any, columns: dict[str, list[Any]] | None = None) -> Sums:
    evidence = _evidence()
    sums = evidence.start()
    for batch in next_token_batches(pair_of(base, chat), columns or documents(), OPTIONS):
        evidence.update(sums, batch)
    return sums


def _tables(base: Any, chat: Any) -> EvidenceTables:
    dtype = str(chat.dtype).removeprefix("torch.")
    return _evidence().tables(_sums(base, chat), dtype=dtype)


def _values(tables: EvidenceTables) -> dict[str, float]:
    return dict(zip(tables.streams["measure"], tables.streams["value"], strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_model_against_itself_differs_by_exactly_nothing(originals: dict[str, Any], architecture: str) -> None:
    own = originals[architecture]
    for twin in (own, copy.deepcopy(own)):
        tables = _tables(own, twin)
        assert not tables.distance.is_distinguishable
        assert (tables.distance.table[["kl", "kl_high", "disagreement", "largest_margin"]] == 0).all(axis=None)
        values = _values(tables)
        assert values["raw_difference"] == values["difference"] == 0
        assert values["scale_ratio"] == 1
        assert np.isnan(values["effective_rank"])


@pytest.mark.parametrize(("architecture", "factor", "dtype"), RESCALED)
def test_a_rescaled_model_cannot_be_told_from_itself(
    originals: dict[str, Any], architecture: str, factor: float, dtype: torch.dtype
) -> None:
    base = originals[architecture]
    chat = rescaled(base, factor)
    tables = _tables(copy.deepcopy(base).to(dtype), chat.to(dtype))
    assert not tables.distance.is_distinguishable, tables.distance.reason
    assert "cannot be told apart" in tables.distance.reason
    values = _values(tables)
    precision = 1e-5 if dtype == torch.float32 else 0.1
    assert values["scale_ratio"] == pytest.approx(factor, rel=precision)
    assert values["difference"] < precision
    assert values["cosine"] > 1 - precision
    assert values["raw_difference"] == pytest.approx(abs(factor - 1) / factor, rel=precision, abs=precision)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_norms_epsilon_is_a_difference_of_function_where_the_stream_is_as_small(
    originals: dict[str, Any], architecture: str
) -> None:
    """Epsilon is 1e-6; a stream ten times larger hides it, one a hundred times smaller (squares of 1e-5) does not."""
    base = originals[architecture]
    assert not _tables(base, rescaled(base, 10, with_eps=False)).distance.is_distinguishable
    assert _tables(base, rescaled(base, 0.01, with_eps=False)).distance.is_distinguishable


@pytest.mark.parametrize("offset", [0.5, 50])
def test_a_constant_in_the_stream_that_layer_norm_subtracts_is_no_difference(
    originals: dict[str, Any], offset: float
) -> None:
    tables = _tables(originals["gpt2"], shifted(originals["gpt2"], offset))
    assert not tables.distance.is_distinguishable
    values = _values(tables)
    assert values["difference"] < 1e-4 < 0.3 < values["raw_difference"]
    assert values["scale_ratio"] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tuned_model_can_be_told_from_its_base(
    originals: dict[str, Any], architecture: str, dtype: torch.dtype
) -> None:
    base, chat = (
        own.to(dtype) for own in (copy.deepcopy(originals[architecture]), fine_tuned(originals[architecture]))
    )
    tables = _tables(base, chat)
    assert tables.distance.is_distinguishable
    everywhere = tables.distance.table.iloc[0]
    assert everywhere["kl_low"] > everywhere["kl_floor"]
    assert everywhere["disagreement_low"] > 0.1
    streams = tables.streams.set_index("measure")
    assert tuple(tables.streams.columns) == tuple(column.name for column in STREAM_COLUMNS)
    assert streams.loc["difference", "low"] > 0.1
    assert 1 <= streams.loc["effective_rank", "low"] < streams.loc["effective_rank", "high"] < WIDTH


def test_a_slight_fine_tune_is_seen_in_float32_and_also_when_the_stream_is_rescaled(originals: dict[str, Any]) -> None:
    """One matrix of size 0.1 moved by 0.003."""
    base = originals["llama"]
    chat = changed(base, "layers.3.mlp.down_proj", size=3e-3)
    plain, scaled = _tables(base, chat), _tables(rescaled(base, 8), chat)
    assert plain.distance.is_distinguishable and scaled.distance.is_distinguishable
    assert scaled.distance.table["kl"][0] == pytest.approx(plain.distance.table["kl"][0], rel=1e-3)


def _brute_force(base: Any, chat: Any, columns: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    """Summed KL, disagreements and tokens of every set, each document alone through the library's own forward."""
    result = {name: np.zeros(3) for name in ("all", "assistant", "corpus web", "corpus chat")}
    for corpus, ids, flags in zip(columns["corpus"], columns["input_ids"], columns["flags"], strict=True):
        with torch.no_grad():
            logs = [
                own(torch.tensor(ids[None].astype(np.int64))).logits[0].double().log_softmax(-1) for own in (base, chat)
            ]
        kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)[:-1].numpy()
        differs = (logs[0].argmax(-1) != logs[1].argmax(-1))[:-1].numpy()
        is_assistant = (flags[1:] & int(Flag.ASSISTANT)) != 0
        for name, chosen in (("all", kl == kl), ("assistant", is_assistant), (f"corpus {corpus}", kl == kl)):
            result[name] += [kl[chosen].sum(), differs[chosen].sum(), chosen.sum()]
    return result


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_next_tokens_equal_brute_force_over_plain_forwards(originals: dict[str, Any], architecture: str) -> None:
    base = originals[architecture]
    chat = changed(base, "mlp", size=0.1)
    table = _tables(base, chat).distance.table.set_index("tokens")
    for name, (kl, differs, tokens) in _brute_force(base, chat, documents()).items():
        assert table.loc[name, "num_tokens"] == tokens
        assert table.loc[name, "kl"] == pytest.approx(kl / tokens, rel=1e-4)
        assert table.loc[name, "disagreement"] == pytest.approx(differs / tokens)
    assert table.loc["corpus web", "num_documents"] == 6


def test_parts_travel_as_bytes_and_merge_to_the_whole_in_any_order(originals: dict[str, Any]) -> None:
    base, chat = originals["llama"], changed(originals["llama"], "mlp", size=0.1)
    columns, evidence = documents(), _evidence()
    whole = evidence.tables(_sums(base, chat), dtype="float32")
    parts = [
        _sums(base, chat, {name: column[here] for name, column in columns.items()})
        for here in (slice(0, 3), slice(3, 4), slice(4, 12))
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = evidence.start()
        for index in order:
            merged = evidence.merge(merged, sums_from_bytes(sums_to_bytes(parts[index])))
        tables = evidence.tables(merged, dtype="float32")
        for ours, expected in ((tables.streams, whole.streams), (tables.distance.table, whole.distance.table)):
            numbers = expected.select_dtypes("number").columns.difference(["margin_floor"])
            np.testing.assert_allclose(ours[numbers], expected[numbers], rtol=1e-4, atol=1e-8)


def test_judged_positions_can_be_bounded_and_do_not_depend_on_the_batch(originals: dict[str, Any]) -> None:
    pair, columns = pair_of(originals["llama"], originals["llama"]), documents()
    places = []
    for tokens_per_batch in (40, 4000):
        batches = next_token_batches(pair, columns, RowOptions(tokens_per_batch), max_positions=4)
        own = {
            (int(batch.doc_id_B[b]), int(place) % batch.ids_BT.shape[1])
            for batch in batches
            for b, place in zip(batch.document_P.tolist(), batch.place_P, strict=True)
        }
        places.append(own)
    assert places[0] == places[1]
    assert len(places[0]) == 4 * len(columns["doc_id"])
    with pytest.raises(InputError, match="got 0"):
        next(next_token_batches(pair, columns, OPTIONS, max_positions=0))


def test_sinks_of_a_hundred_times_the_norm_are_left_out_and_counted(originals: dict[str, Any]) -> None:
    (batch,) = next_token_batches(pair_of(originals["llama"], originals["llama"]), documents(), RowOptions(10_000))
    h_BTMD = torch.randn(*batch.ids_BT.shape, 2, WIDTH)
    h_BTMD[:, 2, 1] *= 100
    h_BTMD[3, 4, 0] *= 100
    rows = rows_without_sinks(batch, h_BTMD)
    assert rows.num_sinks == len(batch.doc_id_B) + 1
    assert len(rows.x_NMD) == len(batch.place_N) - rows.num_sinks
    assert float(rows.x_NMD.norm(dim=2).max()) < 20
    assert not ((rows.document_N == 3) & (rows.position_N == 4)).any()


def test_documents_of_one_token_predict_nothing(originals: dict[str, Any]) -> None:
    own = originals["llama"]
    columns = {"doc_id": [1], "corpus": ["web"], "input_ids": [np.array([3])], "flags": [np.array([0])]}
    with pytest.raises(InputError, match="got none"):
        _evidence().tables(_sums(own, own, columns), dtype="float32")
