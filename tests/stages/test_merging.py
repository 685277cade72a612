"""Sums of workers are put together in one order, whatever order they come in and however many workers there are."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Finished, assert_same, copied, make, run_file

from pipeline.config.run_file import load
from pipeline.stages.merging import MergeTree


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 6])
def test_every_order_of_arrival_gives_one_order_of_merging(num_parts: int) -> None:
    found = set()
    for order in itertools.permutations(range(num_parts)):
        tree = MergeTree[str](num_parts, lambda a, b: f"({a}{b})")
        for number in order:
            tree.add(number, str(number))
        found.add(tree.total())
    (text,) = found
    assert text.replace("(", "").replace(")", "") == "".join(map(str, range(num_parts)))


def test_sums_are_the_same_to_the_last_bit_where_a_sum_by_arrival_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, generator=generator, dtype=torch.float64) * 10.0 ** (i % 7) for i in range(37)]
    by_tree, by_arrival = set(), set()
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(parts)).tolist()
        tree = MergeTree[torch.Tensor](len(parts), torch.add)
        for number in order:
            tree.add(number, parts[number])
        by_tree.add(tree.total().numpy().tobytes())
        by_arrival.add(sum(parts[number] for number in order).numpy().tobytes())  # type: ignore[union-attr]
    assert len(by_tree) == 1 < len(by_arrival)
    torch.testing.assert_close(tree.total(), torch.stack(parts).sum(0), rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize("late", [0, 31, 63])
def test_a_late_part_keeps_few_others_waiting(late: int) -> None:
    tree = MergeTree[int](64, lambda a, b: a + b)
    for number in range(64):
        if number != late:
            tree.add(number, number)
            assert len(tree) <= 2 * 6  # the late one and the next one, six levels
    tree.add(late, late)
    assert (len(tree), tree.total()) == (1, sum(range(64)))


def test_a_total_before_its_time_is_refused() -> None:
    tree = MergeTree[int](3, lambda a, b: a + b)
    tree.add(0, 0)
    tree.add(2, 2)
    with pytest.raises(ValueError):
        tree.total()


@pytest.mark.ray
@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_bit_of_the_tables(finished: Finished, tmp_path: Path) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens", "activations", "evidence", "crosscoder")
    config = load(run_file(tmp_path, str(root), resources={"analyses": {"workers": 1}}, tracking={"kind": "none"}))
    make(config, "latents", "causality")
    assert_same(root, finished.root, "latents", "examples", "planted", "controls", "causality")
