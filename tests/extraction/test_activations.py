from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.extraction.activations import (
    ExtractRows,
    RowOptions,
    check_options,
    count_left_out,
    kept_positions,
    num_leading,
    plan_batches,
)
from pipeline.models.failures import is_out_of_memory
from pipeline.models.loading import LoadOptions, ModelSpec
from pipeline.models.memory import automatic_tokens_per_batch, tokens_that_fit
from pipeline.models.pair import ModelPair
from pipeline.schema import MODEL_NAMES, Flag

ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3", "gpt_neox", "mistral", "gpt2")


def _load(saved_pairs: Callable[[str], tuple[str, str]], architecture: str) -> ModelPair:
    base, chat = saved_pairs(architecture)
    return ModelPair.load(ModelSpec(base), ModelSpec(chat), LoadOptions(layer=1, dtype="float32"))


def _token_rows(lengths: list[int]) -> dict[str, list[Any]]:
    generator = np.random.default_rng(0)
    flags = [np.array([Flag.BOS | Flag.SPECIAL, *[Flag.USER] * (length - 1)][:length], np.int32) for length in lengths]
    return {
        "doc_id": [1000 + i for i in range(len(lengths))],
        "corpus": ["c"] * len(lengths),
        "split": ["train"] * len(lengths),
        "input_ids": [generator.integers(0, 97, length).astype(np.int32) for length in lengths],
        "flags": flags,
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_equal_a_plain_forward_of_each_document_alone(
    saved_pairs: Callable[[str], tuple[str, str]], architecture: str
) -> None:
    pair = _load(saved_pairs, architecture)
    documents = _token_rows([5, 30, 1, 12, 13, 2])
    rows = ExtractRows(pair, RowOptions(tokens_per_batch=64))(documents)
    start = 0
    for doc_id, ids, flags in zip(documents["doc_id"], documents["input_ids"], documents["flags"], strict=True):
        here = slice(start, start + len(ids))
        assert torch.equal(rows.token_id_B[here], torch.from_numpy(ids))
        assert torch.equal(rows.flags_B[here], torch.from_numpy(flags))
        assert rows.position_B[here].tolist() == list(range(len(ids)))
        assert set(rows.doc_id_B[here].tolist()) == {doc_id}
        for index in range(len(MODEL_NAMES)):
            with torch.no_grad():
                output = pair.decoders[index].model(torch.from_numpy(ids).long()[None], output_hidden_states=True)
            plain = output.hidden_states[2][0]
            torch.testing.assert_close(rows.x_BMD[here, index].float(), plain, rtol=2**-7, atol=1e-3)
        start += len(ids)
    assert start == len(rows.x_BMD)


def test_same_documents_give_the_same_bytes_and_other_batches_only_rounding(
    saved_pairs: Callable[[str], tuple[str, str]],
) -> None:
    pair = _load(saved_pairs, "gemma2")
    documents = _token_rows([9, 40, 3, 17, 25])
    first, second = (ExtractRows(pair, RowOptions(tokens_per_batch=50))(documents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:5], second[:5], strict=True))
    other = ExtractRows(pair, RowOptions(tokens_per_batch=1000))(documents)
    torch.testing.assert_close(other.x_BMD, first.x_BMD, rtol=2**-7, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(other[1:5], first[1:5], strict=True))


def test_dropped_tokens_leave_the_other_rows_unchanged(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    pair = _load(saved_pairs, "llama")
    documents = _token_rows([5, 2, 8, 1])
    everything = ExtractRows(pair, RowOptions(64))(documents)
    without_bos = ExtractRows(pair, RowOptions(64, drop_bos=True))(documents)
    is_bos = (everything.flags_B & Flag.BOS) != 0
    assert int(is_bos.sum()) == 4
    for kept, all_rows in zip(without_bos[:5], everything[:5], strict=True):
        assert torch.equal(kept, all_rows[~is_bos])
    without_three = ExtractRows(pair, RowOptions(64, drop_first_tokens=3))(documents)
    assert without_three.position_B.tolist() == [3, 4, 3, 4, 5, 6, 7]
    assert torch.equal(without_three.x_BMD, everything.x_BMD[everything.position_B >= 3])


def test_norm_cap_compares_each_token_with_its_own_document_alone(
    saved_pairs: Callable[[str], tuple[str, str]],
) -> None:
    pair = _load(saved_pairs, "gpt2")
    documents = _token_rows([5, 2, 30, 1, 11])
    everything = ExtractRows(pair, RowOptions(1000))(documents)
    cap = 1.15
    is_kept = torch.ones(len(everything.x_BMD), dtype=torch.bool)
    for doc_id in documents["doc_id"]:
        norms = everything.x_BMD[everything.doc_id_B == doc_id].float().norm(dim=-1)
        lower_median = norms.sort(dim=0).values[(len(norms) - 1) // 2]
        is_kept[everything.doc_id_B == doc_id] = (norms <= cap * lower_median).all(dim=1)
    assert 0 < int(is_kept.sum()) < len(is_kept)
    for tokens_per_batch in (1000, 12):
        capped = ExtractRows(pair, RowOptions(tokens_per_batch, norm_cap=cap))(documents)
        assert capped.num_capped == int((~is_kept).sum())
        assert torch.equal(capped.position_B, everything.position_B[is_kept])
        assert torch.equal(capped.doc_id_B, everything.doc_id_B[is_kept])
        torch.testing.assert_close(capped.x_BMD, everything.x_BMD[is_kept], rtol=2**-7, atol=1e-3)
    # Dropped BOS rows still count for the median, but not as capped.
    without_bos = ExtractRows(pair, RowOptions(1000, drop_bos=True, norm_cap=cap))(documents)
    is_bos = (everything.flags_B & Flag.BOS) != 0
    assert torch.equal(without_bos.x_BMD, everything.x_BMD[is_kept & ~is_bos])
    assert without_bos.num_capped == int((~is_kept & ~is_bos).sum())
    with pytest.raises(InputError, match="above 0, got 0"):
        ExtractRows(pair, RowOptions(64, norm_cap=0))


def _no_room(_tokens: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _no_room_on_the_cpu(tokens: int) -> None:
    torch.empty(tokens << 50, dtype=torch.uint8)  # what the allocator says of it is its own


@pytest.mark.parametrize("fail", [_no_room, _no_room_on_the_cpu])
def test_running_out_of_memory_halves_the_batches_and_loses_no_row(
    saved_pairs: Callable[[str], tuple[str, str]], fail: Callable[[int], None]
) -> None:
    pair = _load(saved_pairs, "gemma2")
    documents = _token_rows([5, 30, 1, 12, 0, 13, 2, 28, 29, 9])
    undisturbed = ExtractRows(pair, RowOptions(1000))(documents)
    sizes: list[int] = []

    def limited(_layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        sizes.append(args[0].shape[0] * args[0].shape[1])
        if sizes[-1] > 40:
            fail(sizes[-1])

    handle = pair.decoders[1].layers[1].register_forward_pre_hook(limited)
    try:
        extract = ExtractRows(pair, RowOptions(1000))
        halved = extract(documents)
        assert halved.num_out_of_memory > 0
        num_failed = sum(size > 40 for size in sizes)
        assert halved.num_out_of_memory == num_failed
        again = extract(documents)
        assert again.num_out_of_memory == 0
        assert sum(size > 40 for size in sizes) == num_failed
        with pytest.raises(InputError, match="one document of 41 tokens, it ran out"):
            extract(_token_rows([3, 41]))
    finally:
        handle.remove()
    for rows in (halved, again):
        torch.testing.assert_close(rows.x_BMD, undisturbed.x_BMD, rtol=2**-7, atol=1e-3)
        assert all(torch.equal(a, b) for a, b in zip(rows[1:5], undisturbed[1:5], strict=True))


def test_other_failures_are_not_taken_for_a_lack_of_memory(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    pair = _load(saved_pairs, "llama")
    documents = _token_rows([5, 6])
    documents["input_ids"][0][2] = 400
    with pytest.raises(IndexError):
        ExtractRows(pair, RowOptions(64))(documents)
    assert not is_out_of_memory(RuntimeError("expected scalar type Float but found Half"))


def test_automatic_budget_is_a_power_of_two_that_fits(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    assert automatic_tokens_per_batch(_load(saved_pairs, "llama")) == 16_384
    gigabyte = 1 << 30
    assert tokens_that_fit(40 * gigabyte, 500_000) == 32_768  # 51,539 tokens at 0.6 of the memory
    assert tokens_that_fit(80 * gigabyte, 500_000) == 65_536
    assert tokens_that_fit(gigabyte // 100, 500_000) == 1024
    assert tokens_that_fit(1000 * gigabyte, 0) == 131_072


def test_no_documents_give_no_rows(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    rows = ExtractRows(_load(saved_pairs, "llama"), RowOptions(64))(_token_rows([]))
    assert rows.x_BMD.shape == (0, 2, 32)
    assert rows.real_token_frac == 1.0


def test_batches_hold_every_document_once_within_the_budget() -> None:
    lengths = [0, 7, 300, 12, 12, 1, 90, 64, 0, 65]
    plan = plan_batches(lengths, 128, overhead_tokens=4)
    members = np.concatenate(plan.batches)
    assert sorted(members.tolist()) == [i for i, length in enumerate(lengths) if length]
    computed = [max(lengths[i] for i in batch) * len(batch) for batch in plan.batches]
    assert all(cost <= 128 or len(batch) == 1 for cost, batch in zip(computed, plan.batches, strict=True))
    assert plan.real_token_frac == sum(lengths) / sum(computed)


def test_plan_is_the_cheapest_of_all_divisions() -> None:
    generator = np.random.default_rng(1)
    for _ in range(20):
        lengths = generator.integers(1, 40, 9)
        ordered = sorted(lengths.tolist(), reverse=True)
        best = min(
            sum(ordered[a] * (b - a) + 10 for a, b in pairwise(cuts))
            for cuts in _divisions(len(ordered))
            if all(ordered[a] * (b - a) <= 100 or b - a == 1 for a, b in pairwise(cuts))
        )
        plan = plan_batches(lengths.tolist(), 100, overhead_tokens=10)
        assert sum(int(lengths[batch].max()) * len(batch) + 10 for batch in plan.batches) == best


def _divisions(size: int) -> list[list[int]]:
    inner = range(1, size)
    chosen = ([i for bit, i in enumerate(inner) if number >> bit & 1] for number in range(1 << (size - 1)))
    return [[0, *cuts, size] for cuts in chosen]


def test_mixed_lengths_run_with_little_padding() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(150), 0.8, 400), 4, 1024).astype(int).tolist()
    assert plan_batches(lengths, 8192).real_token_frac >= 0.95


def test_meaningless_options_are_input_errors(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    pair = _load(saved_pairs, "llama")
    with pytest.raises(InputError, match="at least 1, got 0"):
        ExtractRows(pair, RowOptions(0))
    with pytest.raises(InputError, match="at least 0, got -1"):
        ExtractRows(pair, RowOptions(64, drop_first_tokens=-1))


def _flags(text: str) -> np.ndarray:
    """B = BOS, e = control token of the template, t = template, u = user, a = assistant, r = its reasoning, c = closing
    tag, k = tool call, o = tool answer, p = plain, s = control token of a plain document."""
    bits = {
        "B": Flag.BOS | Flag.SPECIAL,
        "e": Flag.TEMPLATE | Flag.SPECIAL,
        "t": Flag.TEMPLATE,
        "u": Flag.USER,
        "a": Flag.ASSISTANT,
        "r": Flag.ASSISTANT | Flag.REASONING,
        "c": Flag.TEMPLATE | Flag.REASONING,
        "k": Flag.ASSISTANT | Flag.TOOL,
        "o": Flag.TOOL,
        "p": Flag(0),
        "s": Flag.SPECIAL,
    }
    return np.array([int(bits[letter]) for letter in text], np.int32)


@pytest.mark.parametrize(
    ("keep", "leave_out", "expected"),
    [
        ((), (), "etuarckopsB"),
        ((), ("template",), "uarkopsB"),
        ((), ("special",), "tuarckop"),
        (("assistant",), (), "ark"),
        (("assistant",), ("reasoning",), "ak"),
        (("assistant", "plain"), ("tool",), "arp"),
        (("reasoning",), (), "rc"),
        (("user", "tool"), (), "uko"),
    ],
)
def test_rows_are_chosen_by_the_kind_of_token(keep: tuple[str, ...], leave_out: tuple[str, ...], expected: str) -> None:
    letters = "etuarckopsB"
    kept = kept_positions(_flags(letters), RowOptions(1, keep=keep, leave_out=leave_out))
    assert "".join(letters[place] for place in kept) == expected


def test_tokens_left_out_are_counted_once_under_their_first_reason() -> None:
    flags = _flags("BettuuB" + "etaae")
    flags[:2] |= int(Flag.HISTORY)
    options = RowOptions(1, drop_first_tokens=3, drop_bos=True, keep=("assistant", "user"), leave_out=("special",))
    assert count_left_out(flags, options) == {
        "earlier turns": 2,
        "first tokens": 1,
        "BOS": 1,
        "special": 2,
        "not among activations.rows.keep": 2,
    }
    assert kept_positions(flags, options).tolist() == [4, 5, 9, 10]
    assert num_leading(flags, options) == 3
    assert num_leading(flags, RowOptions(1, drop_bos=True)) == 1
    assert num_leading(flags[1:], RowOptions(1, drop_bos=True)) == 0
    with pytest.raises(InputError, match="got nonsense"):
        check_options(RowOptions(1, keep=("nonsense",)))
