"""A fit from rows in memory against the trainer on the same rows as a store; the tables that are made of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.crosscoder import CrosscoderSection, TrainingSection
from pipeline.config.resources import TrainingResources
from pipeline.errors import InputError
from pipeline.library import plot
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.fitting import fit
from pipeline.library.loading import load_pair
from pipeline.library.pair import Pair
from pipeline.library.rows import Rows
from pipeline.library.tables import latents
from pipeline.numerics.crosscoder import Crosscoder as PlainCrosscoder
from pipeline.numerics.trainer import CrosscoderTrainer
from pipeline.schema import LATENT_COLUMNS, Verdict, latent_corpus_columns
from pipeline.stages.crosscoder_spec import normalisation_of, spec_of
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.row_order import TrainingRows

SHORT: dict[str, Any] = {"k": 4, "expansion": 2, "num_steps": 12, "batch_rows": 128, "lr": 3e-3, "device": "cpu"}


def is_same(a: PlainCrosscoder, b: PlainCrosscoder) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def in_shards(rows: Rows, size: int) -> Rows:
    whole, rest = divmod(len(rows), size)
    return Rows(rows.data, rows.corpora, rows.origin, (size,) * whole + (rest,), rows.dialogue_corpora)


@pytest.mark.parametrize(
    "sparsity",
    [{"kind": "batch_topk", "k": 4, "threshold_start_step": 3}, {"kind": "l1", "mu": 0.01}],
    ids=lambda one: str(one["kind"]),
)
def test_a_fit_is_that_of_the_trainer_on_the_same_rows_in_a_store(
    rows: Rows, tmp_path: Path, sparsity: dict[str, Any]
) -> None:
    """As a run's rank reads and trains, from files, in several shards and over more than one epoch."""
    in_shards(rows, 300).save(tmp_path / "rows")
    store = ActivationStore(Storage(str(tmp_path)), "rows")
    section = CrosscoderSection(name="x", sparsity=sparsity, expansion=2, seed=5, lr=3e-3, lr_warmup_steps=4)
    training = TrainingSection(batch_rows=512, num_rows=512 * 12, shuffle_seed=3)
    shape = {"num_models": 2, "activation_dim": rows.activation_dim}
    trainer = CrosscoderTrainer(
        spec_of(section, training, TrainingResources(), **shape),
        normalisation=normalisation_of(section, store.manifest),
    )
    order = TrainingRows(store, seed=3, batch_rows=512)
    trainer.initialise(next(order.batches(0, 1)).float())
    for x_BMD in order.batches(0, 12):
        trainer.step(x_BMD.float())
    options = {"num_steps": 12, "batch_rows": 512, "shuffle_seed": 3, "lr": 3e-3, "lr_warmup_steps": 4, "device": "cpu"}
    for mine in (in_shards(rows, 300), Rows.load(tmp_path / "rows")):
        assert is_same(fit(mine, sparsity=sparsity, expansion=2, seed=5, **options), trainer.crosscoder())


def test_further_seeds_are_fitted_beside_the_first(rows: Rows) -> None:
    both = fit(rows, **SHORT, seed=3, seeds=2)
    alone = fit(rows, **SHORT, seed=4)
    assert len(both.replicas) == 1 and is_same(both.replicas[0], alone) and not is_same(both, alone)


def test_a_fit_may_begin_with_the_weights_of_another(rows: Rows, tmp_path: Path) -> None:
    about = {**SHORT, "log_every_steps": 1}
    first = fit(rows, **about)
    first.save_pretrained(tmp_path)
    again = fit(rows, **about, init_from=str(tmp_path), seed=9)
    assert first.curve is not None and again.curve is not None
    # Its first step goes on where the other fit ended, on the same rows in the same order.
    assert again.curve["loss"][0] < first.curve["loss"][0]
    assert is_same(again, fit(rows, **about, init_from=str(tmp_path))), "no seed changes what it begins with"
    for changes in ({"expansion": 3}, {"sparsity": "topk"}):
        with pytest.raises(InputError, match=f"init_from: {tmp_path}: expected a crosscoder"):
            fit(rows, **{**about, **changes}, init_from=str(tmp_path))
    with pytest.raises(InputError, match="init_from"):
        fit(rows, **about, init_from=str(tmp_path / "nothing"))


def test_a_stopped_fit_goes_on_where_it_was(rows: Rows, tmp_path: Path) -> None:
    class Stops:
        """A reporter that loses patience."""

        def message(self, text: str) -> None: ...
        def step(self, number: int, total: int) -> None: ...
        def progress(self, progress: Any) -> None:
            raise KeyboardInterrupt

    about = {**SHORT, "log_every_steps": 5}
    with pytest.raises(KeyboardInterrupt):
        fit(rows, **about, checkpoint=tmp_path, progress=Stops())
    resumed, whole = fit(rows, **about, checkpoint=tmp_path), fit(rows, **about)
    assert is_same(resumed, whole)
    assert resumed.curve is not None and resumed.curve.equals(whole.curve)
    assert list(resumed.curve["step"]) == [5, 10, 12]
    assert is_same(fit(rows, **about, checkpoint=tmp_path), whole)  # finished: nothing is done again
    with pytest.raises(InputError, match="checkpoint"):
        fit(rows, **{**about, "lr": 1e-3}, checkpoint=tmp_path)
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(InputError, match=r"state\.pt"):
        fit(rows, **about, checkpoint=tmp_path)


def test_rows_come_back_from_disk_with_their_origin(rows: Rows, tmp_path: Path) -> None:
    in_shards(rows, 500).save(tmp_path / "rows")
    found = Rows.load(tmp_path / "rows")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows.data, found.data, strict=True))
    assert (found.corpora, found.origin, found.shard_sizes[0]) == (rows.corpora, rows.origin, 500)
    with pytest.raises(InputError, match="rows"):
        rows.save(tmp_path / "rows")
    with pytest.raises(InputError, match="train"):
        Rows.load(tmp_path / "rows", split="validation")
    with pytest.raises(InputError, match=r"manifest\.json"):
        Rows.load(tmp_path)


def test_a_split_divides_documents(rows: Rows) -> None:
    train, validation = rows.split(0.3)
    assert len(train) + len(validation) == len(rows)
    assert not set(train.data.doc_id_B.tolist()) & set(validation.data.doc_id_B.tolist())
    for frac in (0, 1, 1e-9):
        with pytest.raises(InputError):
            rows.split(frac)


def test_a_crosscoder_keeps_its_origin_on_disk(fitted: Crosscoder, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path)
    found = Crosscoder.from_pretrained(tmp_path)
    assert found.origin == fitted.origin is not None
    assert is_same(found, fitted)
    assert is_same(PlainCrosscoder.from_pretrained(tmp_path), fitted)
    half = Crosscoder.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.W_dec_FMD.dtype == torch.float16 and half.threshold.dtype == torch.float64


def test_the_latent_table_has_the_columns_of_a_run(fitted: Crosscoder, rows: Rows) -> None:
    table = latents(fitted, rows, num_resamples=100)
    columns = [column.name for column in (*LATENT_COLUMNS, *latent_corpus_columns(rows.corpora))]
    assert set(table.columns) == set(columns) and len(table) == fitted.num_latents
    assert table.attrs["model_order"] == "base,chat" and table.attrs["fidelity"]["num_rows"] == len(rows)
    counts = torch.bincount(fitted.encode(rows.x.float()).latents_P, minlength=fitted.num_latents)
    assert torch.allclose(torch.tensor(table["frequency"].to_numpy()) * len(rows), counts.double())


def test_what_cannot_be_told_apart_has_nothing_new(make_pair: Any, tokenizers: Any, rows: Rows) -> None:
    """One model as both: the difference says so, and a crosscoder that calls latents new is not believed."""
    model = make_pair("llama").chat
    null = load_pair(model, model, layer=1, tokenizer=tokenizers["gemma"])
    texts = ["hello world, hello again", "What is the capital of Norland?"] * 3
    difference = null.difference(texts)
    assert not difference.is_distinguishable
    null_rows = null.activations([f"{text} {number}" for number, text in enumerate(texts * 10)])
    crosscoder = fit(null_rows, **SHORT)
    crosscoder.W_dec_FMD[:8, 0] = 0  # as if they were the chat model's alone
    called = latents(crosscoder, null_rows, num_resamples=100, rule="paper", min_documents=1)
    held = latents(crosscoder, null_rows, num_resamples=100, rule="paper", min_documents=1, difference=difference)
    is_called = called["verdict"] == Verdict.CHAT_SPECIFIC
    assert not (held["verdict"] == Verdict.CHAT_SPECIFIC).any()
    assert (held["verdict"][is_called] == Verdict.WITHHELD).all()
    with pytest.raises(InputError, match="difference"):
        latents(fitted_on(rows), rows, difference=difference)


def fitted_on(rows: Rows) -> Crosscoder:
    return fit(rows, **SHORT)


def test_charts_of_the_tables_can_be_drawn(fitted: Crosscoder, rows: Rows, pair: Pair) -> None:
    table = latents(fitted, rows, num_resamples=100)
    assert fitted.curve is not None
    for chart in (plot.delta_norm(table), plot.curve(fitted.curve, "fve_chat")):
        assert "var(--" not in chart.to_json()
    chat_only = table.assign(verdict=Verdict.CHAT_SPECIFIC, nu_eps=0.1, nu_r=0.2)
    assert "nu_eps" in plot.nu(chat_only).to_json()
    with pytest.raises(InputError, match="nu_eps"):
        plot.nu(table.drop(columns="nu_eps"))
