"""Histograms and nearest decoder rows, against loops over dense codes and all pairs."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipeline.analyses.activation_bins import EDGES
from pipeline.analyses.activation_histogram import ActivationHistogram
from pipeline.analyses.example_columns import HISTOGRAM_COLUMNS, NEIGHBOUR_COLUMNS
from pipeline.analyses.neighbours import neighbour_table
from pipeline.analyses.rows import analyse
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.report.histograms import histograms
from pipeline.schema import BASE, CHAT

CORPORA = ("web", "chat")


def test_every_row_is_counted_once_in_the_bin_of_its_activation(make_world: Callable) -> None:
    world = make_world(num_documents=60)
    analysis = ActivationHistogram(num_latents=12, corpora=CORPORA)
    sums = analyse({"h": analysis}, world.batches(11))["h"]
    latents = (7, 3, 0, 11)
    table = analysis.table_of(sums, latents)
    assert list(table.columns) == [column.name for column in HISTOGRAM_COLUMNS]
    code_BF, corpus_B = world.batch().codes.to_dense(), world.rows["corpus"].tolist()
    expected: Counter[tuple[int, str, float]] = Counter()
    for latent in latents:
        for row, value in enumerate(code_BF[:, latent].tolist()):
            if value > 0:
                low = max(edge for edge in EDGES[:-1] if edge <= max(value, EDGES[0]))
                expected[latent, CORPORA[corpus_B[row]], low] += 1
    found = {(row.latent, row.corpus, row.low): row.num_rows for row in table.itertuples()}
    assert found == dict(expected) and len(expected) > 10
    assert table["latent"].drop_duplicates().tolist() == [latent for latent in latents if code_BF[:, latent].any()]
    np.testing.assert_allclose(table["high"] / table["low"], 2**0.25)
    halves = [analyse({"h": analysis}, batches)["h"] for batches in (world.batches(11)[:3], world.batches(11)[3:])]
    assert torch.equal(analysis.merge(*halves)["counts"], sums["counts"])


def test_activations_beyond_the_bins_are_in_the_outermost(batch_of: Callable) -> None:
    analysis = ActivationHistogram(num_latents=1, corpora=("web",))
    code_BF = torch.tensor([[1e-9], [1e9], [0.0], [1.0]])
    table = analysis.table_of(analyse({"h": analysis}, [batch_of(code_BF, torch.arange(4))])["h"], [0])
    assert table["low"].tolist() == [EDGES[0], 1.0, EDGES[-2]] and table["num_rows"].tolist() == [1, 1, 1]


def test_bars_of_all_corpora_share_their_bins_and_one_scale(make_world: Callable) -> None:
    world = make_world(num_documents=60)
    analysis = ActivationHistogram(num_latents=12, corpora=CORPORA)
    table = analysis.table_of(analyse({"h": analysis}, world.batches(11))["h"], [7])
    web, chat = histograms(table, CORPORA)
    assert [(bar.low, bar.high) for bar in web.bars] == [(bar.low, bar.high) for bar in chat.bars]
    assert sum(bar.num_rows for own in (web, chat) for bar in own.bars) == table["num_rows"].sum()
    tallest = max((*web.bars, *chat.bars), key=lambda bar: bar.height)
    assert tallest.height == 1 and tallest.num_rows == table["num_rows"].max()
    assert histograms(table.iloc[:0], CORPORA) == []


@pytest.mark.parametrize("asked", [[7], [3, 7, 0, 5]])
def test_neighbours_are_the_largest_cosines(asked: list[int]) -> None:
    torch.manual_seed(0)
    crosscoder = Crosscoder(20, 2, 6)
    with torch.no_grad():
        crosscoder.W_dec_FMD.normal_()
        crosscoder.W_dec_FMD[3, CHAT] = 0  # its neighbours are those of d^base
        crosscoder.W_dec_FMD[0] = 0  # it has none, and is nobody's
    table = neighbour_table(crosscoder, asked, 5)
    assert list(table.columns) == [column.name for column in NEIGHBOUR_COLUMNS]
    assert table["latent"].drop_duplicates().tolist() == [latent for latent in asked if latent]
    unit_FMD = torch.nn.functional.normalize(crosscoder.W_dec_FMD.detach(), dim=-1)
    for latent, own in table.groupby("latent"):
        model, column = (BASE, "cosine_base") if latent == 3 else (CHAT, "cosine_chat")
        cosine_F = unit_FMD[:, model] @ unit_FMD[latent, model]
        cosine_F[[latent, 0]] = -2
        best = cosine_F.topk(5)
        assert own["neighbour"].tolist() == best.indices.tolist() and own["rank"].tolist() == [0, 1, 2, 3, 4]
        assert own[column].tolist() == pytest.approx(best.values.tolist(), abs=1e-6)
