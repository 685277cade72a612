from collections.abc import Callable

import pandas as pd
import pytest
import torch

from pipeline.analyses.activation_statistics import ActivationStatistics, control_token_counts
from pipeline.analyses.rows import analyse
from pipeline.errors import InputError
from pipeline.schema import Flag, Verdict, latent_corpus_columns


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


def test_control_tokens_are_told_apart_by_their_id_in_any_order_of_the_parts(make_world: Callable) -> None:
    world = make_world()
    is_control_B = (world.rows["flags"] & int(Flag.TEMPLATE)) != 0
    world.rows["flags"][is_control_B & (world.rows["token_id"] % 2 == 0)] |= int(Flag.SPECIAL)
    world.rows["token_id"] %= 6
    analysis = ActivationStatistics(num_latents=12, corpora=("web", "chat"))
    parts = [analyse({"t": analysis}, [batch])["t"] for batch in world.batches(17)]
    code, flags = world.batch().codes.to_dense(), world.rows["flags"]
    control = int(Flag.TEMPLATE | Flag.SPECIAL)
    for order in (parts, parts[::-1]):
        merged = analysis.start()
        for part in order:
            merged = analysis.merge(merged, part)
        table = analysis.table(merged)
        for latent in range(1, 12):
            is_active_B = code[:, latent] > 0
            is_own_B = is_active_B & (flags & control == control)
            on = torch.bincount(world.rows["token_id"][is_own_B], minlength=6).tolist()
            assert table["control_token_frac"][latent] == pytest.approx(max(on) / int(is_active_B.sum()))
            token = table["control_token"][latent]
            assert token == "" if not max(on) else on[int(token)] == max(on)
    assert (table["control_token"] != "").sum() > 3 and table["control_token"][0] == ""


def test_latents_are_counted_at_the_control_token_that_they_mark() -> None:
    table = pd.DataFrame(
        {
            "verdict": [Verdict.CHAT_SPECIFIC] * 4 + [Verdict.SHARED],
            "control_token": ["<a>", "<a>", "<b>", "<b>", "<a>"],
            "control_token_frac": [0.9, 0.51, 0.6, 0.5, 1.0],
        }
    )
    assert control_token_counts(table) == {"<a>": 2, "<b>": 1}


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
