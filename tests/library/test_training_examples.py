"""From a latent to the documents of a fine-tuning set: a planted direction in some texts, found with their contexts."""

import dataclasses

import pytest
import torch

from pipeline.errors import InputError
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.rows import Rows
from pipeline.library.training_examples import COLUMNS, training_examples

LATENT = 2


def planted(rows: Rows) -> tuple[Crosscoder, Rows, list[int]]:
    """A crosscoder whose latent 2 reads a direction of the chat model, rows with it in every third document."""
    ids = list(dict.fromkeys(rows.data.doc_id_B.tolist()))
    taught = ids[1::3]
    x_BMD = 0.01 * torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(0))
    is_taught_B = torch.isin(rows.data.doc_id_B, torch.tensor(taught))
    x_BMD[is_taught_B, 1, 0] = 1.0
    x_BMD[(rows.data.doc_id_B == ids[0]).nonzero()[0], 1, 0] = 3.0  # one strong token elsewhere
    crosscoder = Crosscoder(8, 2, rows.activation_dim)
    crosscoder.W_enc_FMD[LATENT, 1, 0] = 1.0
    crosscoder.W_dec_FMD[LATENT, 1, 0] = 1.0
    crosscoder.b_enc_F[:] = -0.5
    crosscoder.origin = rows.origin
    changed = dataclasses.replace(rows, data=rows.data._replace(x_BMD=x_BMD.bfloat16()), known_moments=None)
    return crosscoder, changed, [ids.index(doc_id) for doc_id in taught]


def test_documents_that_were_taught_come_first_with_their_contexts(rows: Rows) -> None:
    crosscoder, made, taught = planted(rows)
    table = training_examples(crosscoder, made, LATENT, by="mean", num_documents=len(taught), window_tokens=2)
    assert list(table.columns) == list(COLUMNS) and set(table["document"]) == set(taught)
    assert table["score"].tolist() == pytest.approx([0.5] * len(taught))
    assert (table["num_active"] == table["num_rows"]).all()
    for row in table.itertuples():
        assert len(row.tokens) == len(row.activations) <= 5 and set(row.activations) == {0.5}
    (strongest,) = training_examples(crosscoder, made, LATENT, by="max", num_documents=1).itertuples()
    assert strongest.document == 0 and strongest.max == pytest.approx(2.5)


def test_latents_come_in_the_order_asked_and_silent_ones_have_no_row(rows: Rows) -> None:
    crosscoder, made, _ = planted(rows)
    crosscoder.W_enc_FMD[5, 1, 0] = 2.0
    table = training_examples(crosscoder, made, [5, LATENT, 0], num_documents=2)
    assert table["latent"].tolist() == [5, 5, LATENT, LATENT]
    assert training_examples(crosscoder, made, 0).empty


def test_what_does_not_fit_is_refused(rows: Rows) -> None:
    crosscoder, made, _ = planted(rows)
    for latent, message in ((8, "8"), ([0, -1], "-1")):
        with pytest.raises(InputError, match=message):
            training_examples(crosscoder, made, latent)
    with pytest.raises(InputError, match=r"by: .*'most'"):
        training_examples(crosscoder, made, LATENT, by="most")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokenizer="):
        training_examples(crosscoder, dataclasses.replace(made, tokenizer=None), LATENT)
    with pytest.raises(InputError, match="width 3"):
        training_examples(Crosscoder(8, 2, 3), made, LATENT)
