"""What stages decide before anything runs: which documents are used, and which shard each goes to."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.stages.activations import plan_shards
from pipeline.stages.causality import choose_dialogues
from pipeline.stages.evidence import choose_documents
from pipeline.stages.tokens import INDEX_SCHEMA, count_tokens, describe_mix, select
from pipeline.text.conversations import turn_id


def index(lengths: dict[str, list[int]], *, split: str = "train") -> pa.Table:
    rows = [(name, length) for name, own in lengths.items() for length in own]
    rng = np.random.default_rng(0)
    columns = {
        "doc_id": rng.permutation(len(rows)),
        "corpus": [name for name, _ in rows],
        "split": [split] * (len(rows) - 1) + ["validation"],
        "num_tokens": [length for _, length in rows],
        "num_history": [0] * len(rows),
        "part": ["p"] * len(rows),
        "row": list(range(len(rows))),
    }
    return pa.table(columns).cast(INDEX_SCHEMA)


def tokens_of(table: pa.Table, name: str) -> int:
    frame = table.to_pandas()
    return int(frame.loc[frame["corpus"] == name, "num_tokens"].sum())


def test_a_budget_is_shared_by_weight() -> None:
    table = index({"web": [10] * 300, "chat": [30] * 100})
    even = select(table, {"web": 1.0, "chat": 1.0}, 2400)
    assert (tokens_of(even, "web"), tokens_of(even, "chat")) == (1200, 1200)
    uneven = select(table, {"web": 3.0, "chat": 1.0}, 2400)
    assert (tokens_of(uneven, "web"), tokens_of(uneven, "chat")) == (1800, 600)


@pytest.mark.parametrize("num_tokens", [None, 10_000, 4000])
def test_the_shares_hold_when_a_corpus_runs_out(num_tokens: int | None) -> None:
    rng = np.random.default_rng(3)
    table = index({"web": rng.integers(5, 40, 300).tolist(), "chat": rng.integers(20, 60, 20).tolist()})
    weights = {"web": 3.0, "chat": 1.0}
    used = select(table, weights, num_tokens)
    assert tokens_of(used, "chat") == tokens_of(table, "chat")  # all of the short one
    assert 0 <= 3 * tokens_of(used, "chat") - tokens_of(used, "web") < 40  # within one document
    mix = describe_mix(table, used, weights)
    assert mix["ran_out"] == ["chat"]
    assert mix["unused_tokens"] == {"web": tokens_of(table, "web") - tokens_of(used, "web"), "chat": 0}
    assert mix["share"]["web"] == pytest.approx(0.75, abs=0.02)
    assert not mix["is_off_weight"]


def test_mixing_everything_leaves_out_nothing_and_says_how_far_it_is_from_the_weights() -> None:
    table = index({"web": [10] * 30, "chat": [20] * 10})
    weights = {"web": 1.0, "chat": 1.0}
    used = select(table, weights, None, mixing="everything")
    assert used.num_rows == 40
    assert describe_mix(table, used, weights) == {
        "share": {"web": 0.6, "chat": 0.4},
        "is_off_weight": True,
        "unused_tokens": {"web": 0, "chat": 0},
        "ran_out": [],
    }
    budgeted = select(table, weights, 480, mixing="everything")
    assert (tokens_of(budgeted, "web"), tokens_of(budgeted, "chat")) == (240, 200)
    assert describe_mix(table, budgeted, weights)["ran_out"] == ["chat"]


def test_nobody_ran_out_where_the_budget_was_met() -> None:
    table = index({"web": [10] * 300, "chat": [30] * 100})
    mix = describe_mix(table, select(table, {"web": 1.0, "chat": 1.0}, 2400), {"web": 1.0, "chat": 1.0})
    assert mix["ran_out"] == []
    assert mix["unused_tokens"] == {"web": 1800, "chat": 1800}


def test_the_corpora_are_mixed_evenly_in_the_order_of_their_hashes() -> None:
    table = select(index({"web": [10] * 200, "chat": [10] * 50}), {"web": 4.0, "chat": 1.0}, None).to_pandas()
    for start in range(0, 250, 50):
        assert 8 <= (table["corpus"].iloc[start : start + 50] == "chat").sum() <= 12
    for _, own in table.groupby("corpus"):
        assert own["doc_id"].is_monotonic_increasing


def test_a_corpus_of_which_nothing_is_left_is_named() -> None:
    with pytest.raises(InputError, match="corpus 'absent'"):
        select(index({"web": [10] * 3}), {"web": 1.0, "absent": 1.0}, None)


def test_counts_add_up() -> None:
    counts = count_tokens(index({"web": [10] * 3, "chat": [7]}))
    assert counts["num_tokens"] == 37
    assert counts["tokens"] == {"chat/validation": 7, "web/train": 30}
    assert counts["longest_document_tokens"] == 10


def test_each_document_is_in_one_shard_of_about_the_asked_size() -> None:
    table = index({"web": list(np.random.default_rng(1).integers(1, 90, 500))})
    plan = plan_shards(table, 1000)
    members = np.concatenate([shard.documents for shard in plan])
    assert sorted(members.tolist()) == list(range(500))
    assert sum(shard.num_tokens for shard in plan) == tokens_of(table, "web")
    assert all(shard.num_tokens < 1000 + 90 for shard in plan)
    assert {shard.split for shard in plan} == {"train", "validation"}
    assert len({shard.name for shard in plan}) == len(plan)


def test_a_split_without_documents_is_named() -> None:
    with pytest.raises(InputError, match=r"train document.* 1"):
        plan_shards(index({"web": [5]}), 10)


def test_the_answers_of_a_dialogue_stay_together_and_count_as_one_conversation() -> None:
    answers = [turn_id(dialogue << 20, turn) for dialogue in (7, 3, 5) for turn in (1, 0, 2)]
    columns = {
        "doc_id": [*answers, 4 << 20],
        "corpus": ["chat"] * 10,
        "split": ["validation"] * 10,
        "num_tokens": [30, 10, 50] * 3 + [10],
        "num_history": [20, 0, 40] * 3 + [0],
        "part": ["p"] * 10,
        "row": list(range(10)),
    }
    table = pa.table(columns).cast(INDEX_SCHEMA)
    expected = [turn_id(3 << 20, 0), turn_id(3 << 20, 1), turn_id(3 << 20, 2), 4 << 20, turn_id(5 << 20, 0)]
    assert select(table, {"chat": 1.0}, 50)["doc_id"].to_pylist() == expected  # earlier turns are not counted
    chosen = choose_dialogues(table, ["chat"], set(), 3)["doc_id"].to_pylist()
    assert set(chosen) == {4 << 20, *(turn_id(dialogue << 20, turn) for dialogue in (3, 5) for turn in range(3))}


def test_causality_measures_other_dialogues_in_place_of_those_that_extraction_set_aside() -> None:
    table = index({"web": [5] * 20, "chat": [5] * 30}, split="validation")
    frame = table.to_pandas()
    first = sorted(frame.loc[frame["corpus"] == "chat", "doc_id"])
    assert choose_dialogues(table, ["chat"], set(), 4)["doc_id"].to_pylist() == first[:4]
    rejected = {first[0], first[2], -7}
    chosen = choose_dialogues(table, ["chat"], rejected, 4)
    assert chosen["doc_id"].to_pylist() == [first[1], first[3], first[4], first[5]]
    with pytest.raises(InputError, match=r"analyses.causality: expected validation dialogues, got none"):
        choose_dialogues(table, ["chat"], set(first), 4)


def test_the_evidence_reads_as_many_documents_of_each_kind_in_the_order_of_their_hash() -> None:
    table = index({"web": [5] * 20, "chat": [5] * 30}, split="validation")
    frame = table.to_pandas()
    first = {name: sorted(frame.loc[frame["corpus"] == name, "doc_id"]) for name in ("web", "chat")}
    chosen = choose_documents(table, ["chat"], {first["web"][0]}, 3)["doc_id"].to_pylist()
    assert chosen == [*first["chat"][:3], *first["web"][1:4]]
    assert choose_documents(table, ["chat"], set(), 25).num_rows == 45
    with pytest.raises(InputError, match=r"analyses.evidence: expected validation documents, got none"):
        choose_documents(table, ["chat"], set(frame["doc_id"]), 3)
