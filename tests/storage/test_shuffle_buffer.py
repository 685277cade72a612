"""Every row that goes in comes out once, in an order that is the seed's and as random as the buffer is large."""

import pytest
import torch

from pipeline.storage.shuffle_buffer import ShuffleBuffer


def rows(block: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose values say where they come from."""
    origin_B2 = torch.stack([torch.full((num_rows,), block), torch.arange(num_rows)], dim=1)
    return origin_B2[:, None, :].repeat(1, 2, 1).to(torch.float32), origin_B2


def drained(seed: int) -> list[list[float]]:
    buffer = ShuffleBuffer(50, seed=seed)
    out: list[list[float]] = []
    for block in range(20):
        buffer.add(*rows(block, 10 + block))
        while buffer.is_full:
            out += buffer.draw(7)[:, 0].tolist()
    while len(buffer):
        out += buffer.draw(min(7, len(buffer)))[:, 0].tolist()
    return out


def test_every_row_comes_out_once() -> None:
    expected = {(float(block), float(row)) for block in range(20) for row in range(10 + block)}
    found = [(block, row) for block, row in drained(0)]
    assert len(found) == len(expected)
    assert set(found) == expected


def test_the_order_is_the_seeds() -> None:
    assert drained(3) == drained(3)
    assert drained(3) != drained(4)


def test_what_is_held_is_what_was_not_drawn() -> None:
    buffer = ShuffleBuffer(100, seed=0)
    buffer.add(*rows(0, 60))
    buffer.add(*rows(1, 60))
    drawn = {tuple(map(int, row)) for row in buffer.draw(33)[:, 0].tolist()}
    held = {tuple(origin) for origin in buffer.origins().tolist()}
    assert len(buffer) == len(held) == 87
    assert held.isdisjoint(drawn)
    assert held | drawn == {(block, row) for block in (0, 1) for row in range(60)}


def test_values_stay_with_their_origin() -> None:
    buffer = ShuffleBuffer(10, seed=0)
    for block in range(6):
        buffer.add(*rows(block, 20))
        buffer.draw(15)
    origins = buffer.origins()
    assert torch.equal(buffer.draw(len(buffer))[:, 0].sum(dim=0), origins.sum(dim=0).float())


def test_blocks_are_mixed() -> None:
    buffer = ShuffleBuffer(1000, seed=0)
    for block in range(10):
        buffer.add(*rows(block, 100))
    counts = torch.bincount(buffer.draw(300)[:, 0, 0].long(), minlength=10)
    assert counts.tolist() == pytest.approx([30] * 10, abs=18)  # hypergeometric, 3.5 standard deviations
