import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipeline.analyses.examples import STRONGEST_COLUMNS, Examples, contexts
from pipeline.analyses.rows import RowBatch, analyse
from pipeline.errors import InputError
from pipeline.numerics.codes import SparseCodes
from pipeline.schema import EXAMPLE_COLUMNS

CORPORA = ("web", "chat")


def _texts(ids: list[int]) -> list[str]:
    return [f"t{token}" for token in ids]


def test_the_strongest_contexts_equal_a_loop_over_documents(make_world: Callable) -> None:
    world = make_world(num_documents=60)
    analysis = Examples(num_latents=12, num_contexts=4, corpora=CORPORA)
    table = analysis.table(analyse({"e": analysis}, world.batches(11))["e"])
    assert tuple(table.columns) == STRONGEST_COLUMNS
    code, rows = world.batch().codes.to_dense(), world.rows
    for latent in range(12):
        best: dict[int, tuple[float, int]] = {}
        for row, value in enumerate(code[:, latent].tolist()):
            document = int(rows["doc_id"][row])
            if value > best.get(document, (0.0, -1))[0]:
                best[document] = (value, row)
        expected = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))[:4]
        mine = table[table["latent"] == latent]
        assert mine["rank"].tolist() == list(range(len(expected)))
        assert mine["doc_id"].tolist() == [document for document, _ in expected]
        assert mine["activation"].tolist() == pytest.approx([value for _, (value, _) in expected])
        assert mine["position"].tolist() == [int(rows["position"][row]) for _, (_, row) in expected]
        assert mine["corpus"].tolist() == [CORPORA[int(rows["corpus"][row])] for _, (_, row) in expected]
    assert not (table["latent"] == 0).any()
    assert (table["latent"] == 1).sum() == 4


def test_equal_activations_are_ordered_by_document_whatever_the_order_of_batches(batch_of: Callable) -> None:
    analysis = Examples(num_latents=1, num_contexts=2, corpora=("web",))
    batches = [batch_of(torch.ones(2, 1), torch.tensor([doc, doc]), position=torch.tensor([3, 4])) for doc in (9, 2, 5)]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        table = analysis.table(analyse({"e": analysis}, [batches[index] for index in order])["e"])
        assert table["doc_id"].tolist() == [2, 5]
        assert table["position"].tolist() == [3, 3]


def test_a_document_that_comes_twice_is_shown_once(batch_of: Callable) -> None:
    analysis = Examples(num_latents=1, num_contexts=3, corpora=("web",))
    batches = [batch_of(torch.tensor([[value]]), torch.tensor([7])) for value in (1.0, 3.0, 2.0)]
    table = analysis.table(analyse({"e": analysis}, batches)["e"])
    assert table["activation"].tolist() == [3.0]


def test_memory_does_not_grow_with_rows(make_world: Callable) -> None:
    world = make_world(num_documents=200)
    analysis = Examples(num_latents=12, num_contexts=4, corpora=CORPORA)
    sums = analyse({"e": analysis}, world.batches(50))["e"]
    assert {tuple(value.shape) for value in sums.values()} == {(12, 4)}


NUM_MANY, NUM_PAIRS = 65_536, 4


def _sparse_batches(num_rows: int, rows_per_document: int = 5) -> list[RowBatch]:
    """Rows of a dictionary of 65,536 latents of which only some fire, a few per row, without a dense code anywhere."""
    generator = np.random.default_rng(0)
    batches = []
    for start in range(0, num_rows, 500):
        drawn = [np.sort(generator.choice(NUM_MANY // 8, NUM_PAIRS, replace=False)) * 8 + 3 for _ in range(500)]
        values_P = torch.from_numpy(generator.integers(1, 40, 500 * NUM_PAIRS).astype(np.float32))
        codes = SparseCodes(
            values_P, torch.from_numpy(np.concatenate(drawn)), torch.arange(501) * NUM_PAIRS, num_latents=NUM_MANY
        )
        row_B = torch.arange(start, start + 500)
        x_BMD, zero_B = torch.zeros(500, 2, 1), torch.zeros(500, dtype=torch.int32)
        doc_id_B, position_B = row_B // rows_per_document, (row_B % rows_per_document).int()
        batches.append(RowBatch(x_BMD, codes, x_BMD, zero_B, doc_id_B, position_B, zero_B, zero_B))
    return batches


def test_65536_latents_equal_brute_force_in_memory_that_rows_do_not_change() -> None:
    analysis = Examples(num_latents=NUM_MANY, num_contexts=2, num_sampled=1, corpora=("web",))
    peaks, sizes = [], []
    for num_rows in (2_000, 10_000):
        batches = _sparse_batches(num_rows)
        tracemalloc.start()
        sums = analyse({"e": analysis}, batches)["e"]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(sum(value.nbytes for value in sums.values()))
    bytes_per_context = 4 + 3 * 8
    assert sizes == [NUM_MANY * (2 + 1) * bytes_per_context] * 2
    assert peaks[1] < 1.5 * peaks[0] + (1 << 20)
    best: dict[int, dict[int, tuple[float, int]]] = {}
    for batch in batches:
        rows_P = batch.codes.rows_P().tolist()
        pairs = zip(rows_P, batch.codes.latents_P.tolist(), batch.codes.values_P.tolist(), strict=True)
        for row, latent, value in pairs:
            document, position = int(batch.doc_id_B[row]), int(batch.position_B[row])
            own = best.setdefault(latent, {})
            if value > own.get(document, (0.0, -1))[0]:
                own[document] = (value, position)
    expected = [
        (latent, document, position, value)
        for latent in sorted(best)
        for document, (value, position) in sorted(best[latent].items(), key=lambda item: (-item[1][0], item[0]))[:2]
    ]
    table = Examples(num_latents=NUM_MANY, num_contexts=2, corpora=("web",)).table(
        {name: value for name, value in sums.items() if name.startswith("strongest")}
    )
    names = ["latent", "doc_id", "position", "activation"]
    assert list(table[names].itertuples(index=False, name=None)) == expected
    assert len(analysis.table_of(sums, [0, 1, 2])) == 0  # these never fire


def test_sampled_contexts_lie_at_falling_shares_of_the_maximum(batch_of: Callable) -> None:
    """500 documents with activations spread evenly over (0, 1]: a sample of 100 reaches every share closely."""
    value = (torch.randperm(500, generator=torch.Generator().manual_seed(0)) + 1)[:, None] / 500
    batches = [
        batch_of(part, doc_id) for part, doc_id in zip(value.split(60), torch.arange(500).split(60), strict=True)
    ]
    analysis = Examples(num_latents=1, num_contexts=2, num_sampled=100, corpora=("web",))
    table = analysis.table(analyse({"e": analysis}, batches)["e"])
    assert table["rank"].tolist() == [0, 1, 2, 3, 4, 5]
    assert table["activation"].tolist() == pytest.approx([1.0, 0.998, 0.95, 0.75, 0.5, 0.25], abs=0.05)
    assert table["doc_id"].is_unique
    again = analysis.table(analyse({"e": analysis}, batches[::-1])["e"])
    assert again.equals(table)  # the sample is drawn by hash: neither order nor shards matter
    few = analysis.table(analyse({"e": analysis}, [batch_of(value[:3], torch.arange(3))])["e"])
    assert few["rank"].tolist() == [0, 1, 2]


def test_contexts_show_the_window_and_the_activation_at_each_token(make_world: Callable) -> None:
    world = make_world(num_documents=60)
    analysis = Examples(num_latents=12, num_contexts=3, corpora=CORPORA)
    strongest = analysis.table_of(analyse({"e": analysis}, world.batches())["e"], [5, 0, 2])
    assert strongest["latent"].tolist() == [5, 5, 5, 2, 2, 2]
    table = contexts(strongest, world.batches(), window_tokens=2, token_texts=_texts)
    assert list(table.columns) == [column.name for column in EXAMPLE_COLUMNS]
    code, rows = world.batch().codes.to_dense().numpy(), world.rows
    for _, row in table.iterrows():
        inside = (rows["doc_id"] == row["doc_id"]) & ((rows["position"] - row["position"]).abs() <= 2)
        assert row["tokens"] == [f"t{int(token)}" for token in rows["token_id"][inside]]
        np.testing.assert_allclose(row["activations"], code[inside.numpy(), row["latent"]], rtol=1e-6)
        assert max(row["activations"]) == pytest.approx(row["activation"])


def test_no_latent_gives_no_context_and_wrong_ones_are_refused(make_world: Callable) -> None:
    world = make_world()
    analysis = Examples(num_latents=12, num_contexts=3, corpora=CORPORA)
    sums = analyse({"e": analysis}, world.batches())["e"]
    nothing = contexts(analysis.table_of(sums, []), world.batches(), window_tokens=2, token_texts=_texts)
    assert len(nothing) == 0
    assert list(nothing.columns) == [column.name for column in EXAMPLE_COLUMNS]
    with pytest.raises(InputError, match=r"got \[12\]"):
        analysis.table_of(sums, [3, 12])
    with pytest.raises(InputError, match="did not come"):
        contexts(analysis.table_of(sums, [1]), [], window_tokens=2, token_texts=_texts)
    with pytest.raises(InputError, match="got 0"):
        Examples(num_latents=12, num_contexts=0, corpora=CORPORA)
