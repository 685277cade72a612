"""Which layer is named, from tables written by hand."""

from typing import Any

import pandas as pd
import pytest

from pipeline.analyses.layer_curve import LAYER_COLUMNS
from pipeline.analyses.layer_recommendation import recommend, text_table


def _table(
    shares: dict[int, float], *, num_layers: int = 30, tokens: str = "assistant", **columns: Any
) -> pd.DataFrame:
    rows = [
        {
            **{column.name: 0.0 for column in LAYER_COLUMNS},
            "layer": layer,
            "num_layers_above": num_layers - 1 - layer,
            "tokens": tokens,
            "share": share,
            "share_low": share - 0.05,
            "share_high": share + 0.05,
            "kl": share * 0.89,
            "kl_total": 0.89,
            "is_distinguishable": True,
            "reason": "KL is 0.89",
            **columns,
        }
        for layer, share in shares.items()
    ]
    return pd.DataFrame(rows, columns=[column.name for column in LAYER_COLUMNS])


REAL = {15: 0.01, 20: 0.12, 24: 0.36, 27: 0.58, 29: 0.75}
"""As read on a chat model of 30 layers and its fine-tune."""


def test_the_earliest_layer_with_enough_is_named_with_its_numbers() -> None:
    choice = recommend(_table(REAL))
    assert choice.layer == 27
    for number in ("58%", "53%", "63%", "0.516", "0.89", "5 measured layers of 30", "layer 24", "36%"):
        assert number in choice.reason
    assert recommend(_table(REAL), min_share=0.3).layer == 24
    assert recommend(_table(dict(reversed(REAL.items())))).layer == 27


@pytest.mark.parametrize(
    ("shares", "layer", "word"),
    [
        ({10: 0.1, 28: 0.6, 29: 0.9}, 28, "last 2"),
        ({10: 0.55, 28: 0.6, 29: 0.9}, 10, "first"),
        ({10: 0.2, 20: 0.4, 29: 0.3}, 20, "none carries 50%"),
        ({10: 0.0, 29: 0.02}, None, "head"),
    ],
)
def test_the_last_layers_are_a_last_resort(shares: dict[int, float], layer: int | None, word: str) -> None:
    choice = recommend(_table(shares))
    assert choice.layer == layer
    assert word in choice.reason


def test_the_assistants_tokens_decide_where_there_are_any() -> None:
    both = pd.concat([_table({5: 0.9, 9: 1.0}, tokens="all"), _table({5: 0.1, 9: 0.8}, tokens="assistant")])
    assert recommend(both).layer == 9
    assert recommend(both, tokens="all").layer == 5
    assert recommend(_table({5: 0.9, 9: 1.0}, tokens="all")).layer == 5


def test_models_that_cannot_be_told_apart_have_no_layer() -> None:
    table = _table(REAL, is_distinguishable=False, reason="The two models cannot be told apart.", share=float("nan"))
    choice = recommend(table)
    assert choice.layer is None
    assert "cannot be told apart" in choice.reason
    assert "nan" not in text_table(table)


def test_the_text_has_a_line_per_layer_in_order() -> None:
    lines = text_table(_table(dict(reversed(REAL.items())))).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["15", "20", "24", "27", "29"]
    assert "58% [53%, 63%]" in lines[4]
    assert len({len(line) for line in lines}) == 1
