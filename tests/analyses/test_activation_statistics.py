from collections.abc import Callable

import pytest
import torch

from pipeline.analyses.activation_statistics import ActivationStatistics
from pipeline.analyses.rows import analyse
from pipeline.errors import InputError
from pipeline.schema import Flag, latent_corpus_columns


def test_every_column_equals_a_loop_over_dense_codes(make_world: Callable) -> None:
    world = make_world()
    analysis = ActivationStatistics(num_latents=12, corpora=("web", "chat"))
    sums = analyse({"t": analysis}, world.batches(17))["t"]
    table = analysis.table(sums)
    code = world.batch().codes.to_dense().double()
    rows = world.rows
    roles = {"template": Flag.TEMPLATE, "user": Flag.USER, "assistant": Flag.ASSISTANT, "bos": Flag.BOS}
    for latent in range(12):
        f, row = code[:, latent], table.iloc[latent]
        assert row["frequency"] == pytest.approx(float((f > 0).double().mean()))
        assert row["num_documents"] == len({int(d) for d, v in zip(rows["doc_id"], f, strict=True) if v > 0})
        assert row["max_activation"] == pytest.approx(float(f.max()))
        assert row["mean_activation"] == pytest.approx(float(f[f > 0].mean()), nan_ok=True)
        for name, flag in roles.items():
            share = float(f[rows["flags"] & int(flag) != 0].sum() / f.sum())
            assert row[f"{name}_frac"] == pytest.approx(share, nan_ok=True)
        for corpus, name in enumerate(("web", "chat")):
            part = f[rows["corpus"] == corpus]
            assert row[f"frequency_{name}"] == pytest.approx(float((part > 0).double().mean()))
            assert row[f"max_activation_{name}"] == pytest.approx(float(part.max()))
    assert table["frequency"][0] == 0
    assert table["frequency"].max() > 0.1
    assert table["mean_activation"].isna()[0]
    assert list(table.columns)[-4:] == [column.name for column in latent_corpus_columns(("web", "chat"))]


def test_a_latent_that_fires_twice_in_a_document_counts_it_once(batch_of: Callable) -> None:
    code = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
    analysis = ActivationStatistics(num_latents=2, corpora=("web",))
    sums = analyse({"t": analysis}, [batch_of(code, torch.tensor([7, 7, 7, 8]))])["t"]
    assert analysis.table(sums)["num_documents"].tolist() == [2, 1]


def test_an_unknown_corpus_is_refused(make_world: Callable) -> None:
    analysis = ActivationStatistics(num_latents=12, corpora=("web",))
    with pytest.raises(InputError, match="got up to 1"):
        analysis.update(analysis.start(), make_world().batch())
    with pytest.raises(InputError, match="at least one"):
        ActivationStatistics(num_latents=12, corpora=())
