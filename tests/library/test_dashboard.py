"""Examples and the page of one latent, against brute force over all rows."""

from pathlib import Path

import pytest
import torch

import crossray
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.pair import Pair
from pipeline.library.rows import Rows
from pipeline.text.tokenizers import token_texts


def strongest(crosscoder: Crosscoder, rows: Rows) -> tuple[int, torch.Tensor]:
    """The latent that is active most, and its activation at every row."""
    f_BF = crosscoder.encode(rows.x.float()).to_dense()
    latent = int(f_BF.sum(0).argmax())
    return latent, f_BF[:, latent]


def test_examples_are_the_strongest_place_of_the_strongest_documents(fitted: Crosscoder, rows: Rows) -> None:
    latent, f_B = strongest(fitted, rows)
    table = fitted.examples(rows, latent, num_contexts=4, window_tokens=3)
    doc_id_B = rows.data.doc_id_B
    best = {int(doc): float(f_B[doc_id_B == doc].max()) for doc in doc_id_B.unique()}
    expected = sorted(best.values(), reverse=True)[:4]
    assert list(table["activation"]) == pytest.approx(expected, rel=1e-5)
    for row in table.to_dict("records"):
        assert best[row["doc_id"]] == pytest.approx(row["activation"], rel=1e-5)
        own = (doc_id_B == row["doc_id"]) & ((rows.data.position_B - row["position"]).abs() <= 3)
        torch.testing.assert_close(torch.tensor(row["activations"]), f_B[own], rtol=1e-4, atol=1e-5)
        assert list(row["tokens"]) == token_texts(rows.tokenizer, rows.data.token_id_B[own].tolist())


def test_several_latents_keep_their_order_and_silent_ones_have_none(fitted: Crosscoder, rows: Rows) -> None:
    latent, _ = strongest(fitted, rows)
    silent = Crosscoder.from_checkpoint(fitted.to_checkpoint())
    with torch.no_grad():
        silent.b_enc_F[0 if latent else 1] = -1e6
    table = silent.examples(rows, [latent, 0 if latent else 1])
    assert set(table["latent"]) == {latent} and list(table["rank"]) == list(range(len(table)))
    assert silent.examples(rows, [0 if latent else 1]).empty


def test_a_page_holds_the_tables_numbers_and_escapes_its_texts(fitted: Crosscoder, pair: Pair, tmp_path: Path) -> None:
    rows = pair.activations(["hello world <b>user</b> & the model", *(f"The user asked {n}." for n in range(30))])
    table = crossray.latents(fitted, rows)
    latent = int(fitted.examples(rows, list(range(fitted.num_latents)))["latent"].iloc[0])
    page = fitted.dashboard(latent, rows, latents=table)
    row = table.iloc[latent]
    assert f"Latent {latent}" in page.html and str(row["verdict"]) in page.html
    assert f"{row['delta_norm']:.3f}" in page.html and "<mark" in page.html
    assert "<b>user" not in page.html and "<script" not in page.html and "http" not in page.html.split("</style>")[1]
    page.save(tmp_path / "latent.html")
    assert (tmp_path / "latent.html").read_text() == page.html
    shown = page._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and shown.count('"') == 6


def test_what_cannot_be_shown_is_refused(fitted: Crosscoder, rows: Rows, tmp_path: Path) -> None:
    rows.save(tmp_path / "rows")
    loaded = Rows.load(tmp_path / "rows")
    with pytest.raises(crossray.InputError, match="tokenizer"):
        fitted.examples(loaded, 0)
    assert len(fitted.examples(loaded, 0, tokenizer=rows.tokenizer)) == len(fitted.examples(rows, 0))
    for call, what in (
        (lambda: fitted.examples(rows, fitted.num_latents), str(fitted.num_latents)),
        (lambda: fitted.dashboard(-1, rows), "-1"),
        (lambda: fitted.examples(rows, 0, num_contexts=0), "num_contexts"),
        (lambda: Crosscoder(8, 2, 5).examples(rows, 0), "width 32"),
        (lambda: fitted.dashboard(0, rows, latents=crossray.latents(fitted, rows).head(3)), "table"),
    ):
        with pytest.raises(crossray.InputError, match=what):
            call()
