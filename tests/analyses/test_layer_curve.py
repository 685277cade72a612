"""The curve over layers on pairs that differ at known layers, and by brute force over forwards with hooks."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compared_pairs import NUM_LAYERS, WIDTH, changed, documents, fine_tuned, model, pair_of, rescaled

from pipeline.analyses.layer_curve import LAYER_COLUMNS, LayerCurve, choose_layers, splice_scales
from pipeline.analyses.layer_recommendation import recommend, text_table
from pipeline.analyses.next_tokens import next_token_batches
from pipeline.analyses.rows import Sums, sums_from_bytes, sums_to_bytes
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.schema import Flag

LAYERS = tuple(range(NUM_LAYERS))
OPTIONS = RowOptions(tokens_per_batch=150, drop_bos=True)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def originals() -> dict[str, Any]:
    return {architecture: model(architecture) for architecture in ("llama", "gemma2", "qwen3")}


def _curve(layers: tuple[int, ...] = LAYERS, scales: tuple[float, ...] | None = None) -> LayerCurve:
    return LayerCurve(layers, num_layers=NUM_LAYERS, activation_dim=WIDTH, scales=scales)


def _sums(curve: LayerCurve, base: Any, chat: Any, columns: dict[str, list[Any]] | None = None) -> Sums:
    sums = curve.start()
    for batch in next_token_batches(pair_of(base, chat), columns or documents(), OPTIONS):
        curve.update(sums, batch)
    return sums


def _table(base: Any, chat: Any, layers: tuple[int, ...] = LAYERS, scales: tuple[float, ...] | None = None) -> Any:
    curve = _curve(layers, scales)
    return curve.table(_sums(curve, base, chat), dtype="float32")


def _shares(table: Any, tokens: str = "all") -> list[float]:
    return table[table["tokens"] == tokens]["share"].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("where", [0, 2, 5])
def test_one_changed_layer_is_a_step_at_that_layer(originals: dict[str, Any], architecture: str, where: int) -> None:
    table = _table(originals[architecture], changed(originals[architecture], f"layers.{where}.mlp"))
    assert tuple(table.columns) == tuple(column.name for column in LAYER_COLUMNS)
    for tokens in ("all", "assistant"):
        curve = table[table["tokens"] == tokens]
        assert curve["layer"].tolist() == list(LAYERS)
        for end in ("", "_low", "_high"):
            assert (curve[f"share{end}"][:where] == 0).all()
            assert curve[f"share{end}"][where:].tolist() == pytest.approx([1] * (NUM_LAYERS - where), abs=1e-5)
        assert (curve["difference"][:where] == 0).all() and (curve["difference_low"][where:] > 0.1).all()
        assert curve["kl_total"].nunique() == 1
    choice = recommend(table)
    assert choice.layer == where
    assert ("last" in choice.reason) == (where == 5)


def test_two_changed_layers_are_two_steps(originals: dict[str, Any]) -> None:
    base = originals["llama"]
    table = _table(base, changed(changed(base, "layers.1.mlp", size=0.1), "layers.4.mlp"))
    shares = _shares(table)
    assert shares[0] == 0
    assert 0.1 < shares[1] < 0.9
    assert shares[1:4] == pytest.approx([shares[1]] * 3, abs=1e-5)
    assert shares[4:] == pytest.approx([1, 1], abs=1e-5)
    row = table[table["tokens"] == "all"].iloc[1]
    assert row["share_low"] < row["share"] < row["share_high"]


def test_a_changed_head_lies_in_no_layer(originals: dict[str, Any]) -> None:
    table = _table(originals["qwen3"], changed(originals["qwen3"], "lm_head"))
    assert _shares(table) == [0] * NUM_LAYERS
    choice = recommend(table)
    assert choice.layer is None and "head" in choice.reason


@pytest.mark.parametrize("twin", ["same object", "same weights", "rescaled by 8", "rescaled by 0.1"])
def test_nothing_is_recommended_where_the_models_cannot_be_told_apart(originals: dict[str, Any], twin: str) -> None:
    base = originals["gemma2"]
    chat = {
        "same object": lambda: base,
        "same weights": lambda: copy.deepcopy(base),
        "rescaled by 8": lambda: rescaled(base, 8),
        "rescaled by 0.1": lambda: rescaled(base, 0.1),
    }[twin]()
    table = _table(base, chat)
    assert not table["is_distinguishable"].any()
    assert table["share"].isna().all()
    assert (table["difference"] < 1e-5).all()
    choice = recommend(table)
    assert choice.layer is None and "cannot be told apart" in choice.reason
    assert "nan" not in text_table(table)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_in_the_chat_models_units_a_rescaled_base_gives_the_same_curve(
    originals: dict[str, Any], architecture: str
) -> None:
    base = originals[architecture]
    chat = fine_tuned(base, num_steps=2, lr=1e-3)
    plain = _table(base, chat)
    for factor in (0.1, 10):
        own = rescaled(base, factor)
        scales = splice_scales(pair_of(own, chat), documents(6, seed=5), LAYERS, OPTIONS)
        assert scales == pytest.approx([1 / factor] * NUM_LAYERS, rel=0.2)
        table = _table(own, chat, scales=scales)
        assert _shares(table) == pytest.approx(_shares(plain), abs=0.05)
        assert table["difference"].tolist() == pytest.approx(plain["difference"].tolist(), rel=1e-3)
        assert recommend(table).layer == recommend(plain).layer
    assert splice_scales(pair_of(base, chat), documents(6, seed=5), (1, 4), OPTIONS) == (1, 1)


def _brute_force(base: Any, chat: Any, columns: dict[str, list[Any]]) -> np.ndarray:
    """KL summed over [layer, or the total at the end; all or assistant], every document alone, with forward hooks."""
    result = np.zeros((NUM_LAYERS + 1, 2))
    for ids, flags in zip(columns["input_ids"], columns["flags"], strict=True):
        inputs = torch.tensor(ids[None].astype(np.int64))
        streams: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _module, _args, output, kept=streams: kept.append(output))
            for layer in base.model.layers
        ]
        with torch.no_grad():
            logs = [own(inputs).logits[0].double().log_softmax(-1) for own in (base, chat)]
        for handle in handles:
            handle.remove()
        is_assistant = (flags[1:] & int(Flag.ASSISTANT)) != 0
        for layer in range(NUM_LAYERS + 1):
            spliced = logs[0]
            if layer < NUM_LAYERS:
                handle = chat.model.layers[layer].register_forward_hook(
                    lambda _module, _args, _output, put_in=streams[layer]: put_in
                )
                with torch.no_grad():
                    spliced = chat(inputs).logits[0].double().log_softmax(-1)
                handle.remove()
            kl = (logs[1].exp() * (logs[1] - spliced)).sum(-1)[:-1].numpy()
            result[layer] += [kl.sum(), kl[is_assistant].sum()]
    return result


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_every_splice_equals_brute_force_over_plain_forwards(originals: dict[str, Any], architecture: str) -> None:
    base = originals[architecture]
    chat = changed(base, "weight", size=0.03)  # every layer, the embedding, the last norm and the head
    table, expected = _table(base, chat), _brute_force(base, chat, documents())
    for place, tokens in enumerate(("all", "assistant")):
        curve = table[table["tokens"] == tokens]
        summed = curve["kl"].to_numpy() * curve["num_tokens"].to_numpy()
        np.testing.assert_allclose(summed, expected[:-1, place], rtol=1e-3)
        np.testing.assert_allclose(curve["share"], expected[:-1, place] / expected[-1, place], rtol=1e-3)
        assert 0 < abs(curve["share"].iloc[-1] - 1) < 0.9  # the last stream meets another norm and head than base's


def test_the_splice_after_the_last_layer_is_bases_stream_under_chats_norm_and_head(originals: dict[str, Any]) -> None:
    base = originals["llama"]
    chat = changed(base, "weight", size=0.03)
    hybrid = copy.deepcopy(base)
    hybrid.model.norm, hybrid.lm_head = chat.model.norm, chat.lm_head
    last = _table(base, chat, layers=(NUM_LAYERS - 1,))
    total = _table(hybrid, chat, layers=(0,))
    assert last["kl"].tolist() == pytest.approx(total["kl_total"].tolist(), rel=1e-4)


def test_parts_merge_to_the_whole_in_any_order_and_a_subset_of_layers_is_part_of_all(originals: dict[str, Any]) -> None:
    base, chat, columns = originals["llama"], changed(originals["llama"], "mlp", size=0.05), documents()
    curve = _curve((1, 4))
    whole = curve.table(_sums(curve, base, chat), dtype="float32")
    parts = [
        _sums(curve, base, chat, {name: column[here] for name, column in columns.items()})
        for here in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    everything = _table(base, chat)
    subset = everything[everything["layer"].isin((1, 4))]
    numbers = whole.select_dtypes("number").columns
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = curve.start()
        for index in order:
            merged = curve.merge(merged, sums_from_bytes(sums_to_bytes(parts[index])))
        for other in (curve.table(merged, dtype="float32"), subset):
            np.testing.assert_allclose(other[numbers], whole[numbers], rtol=1e-4, atol=1e-8)


def test_layers_are_spread_evenly_with_the_last_among_them() -> None:
    assert choose_layers(6) == choose_layers(6, 9) == LAYERS
    assert choose_layers(30, 10) == (2, 5, 8, 11, 14, 17, 20, 23, 26, 29)
    assert choose_layers(5, 1) == (4,)
    for num_layers in range(1, 40):
        for most in range(1, 12):
            chosen = choose_layers(num_layers, most)
            assert len(chosen) == min(num_layers, most)
            assert chosen[-1] == num_layers - 1 and chosen[0] >= 0


@pytest.mark.parametrize(("layers", "value"), [((), "none"), ((0, 6), "6"), ((-1,), "-1")])
def test_layers_that_are_not_there_are_refused(layers: tuple[int, ...], value: str) -> None:
    with pytest.raises(InputError, match=f"got {value}"):
        _curve(layers)
    with pytest.raises(InputError, match="got 1"):
        _curve((0, 1), scales=(1.0,))
