import math

import pytest
import torch

from pipeline.analyses.ownership import delta_direction, delta_norm, ownership_table
from pipeline.analyses.units import JudgedDecoder
from pipeline.errors import InputError
from pipeline.schema import Ownership


def _decoder() -> torch.Tensor:
    """Latents: chat-only, base-only, shared and parallel, shared and orthogonal, in between, dead on both sides."""
    base = [[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [3.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    chat = [[0.0, 3.0], [0.0, 0.0], [1.0, 1.0], [0.0, 3.0], [0.0, 4.0], [0.0, 0.0]]
    return torch.tensor([base, chat]).transpose(0, 1).contiguous()


def _judged(W_dec_FMD: torch.Tensor, *, W_enc_FMD: torch.Tensor | None = None) -> JudgedDecoder:
    shape = W_dec_FMD.shape[1:]
    W_enc_FMD = W_dec_FMD if W_enc_FMD is None else W_enc_FMD
    return JudgedDecoder(
        W_enc_FMD, W_dec_FMD, torch.zeros(shape), torch.zeros(shape), torch.ones(shape[0]), W_dec_FMD.norm(dim=2)
    )


def test_delta_norm_is_one_for_chat_only_and_zero_for_base_only() -> None:
    values = delta_norm(_decoder()).tolist()
    assert values[:5] == pytest.approx([1, 0, 0.5, 0.5, 0.5 * (3 / 4 + 1)])
    assert math.isnan(values[5])


def test_classes_norms_and_cosines() -> None:
    table = ownership_table(_judged(_decoder(), W_enc_FMD=2 * _decoder()))
    assert table["ownership"].tolist() == [
        Ownership.CHAT_ONLY,
        Ownership.BASE_ONLY,
        Ownership.SHARED,
        Ownership.SHARED,
        Ownership.OTHER,
        Ownership.OTHER,
    ]
    assert table["decoder_norm_chat"].tolist() == pytest.approx([3, 0, 2**0.5, 3, 4, 0])
    assert table["encoder_norm_base"].tolist() == pytest.approx([0, 4, 2 * 2**0.5, 6, 2, 0])
    assert table["decoder_cosine"].tolist() == pytest.approx([math.nan, math.nan, 1, 0, 0, math.nan], nan_ok=True)


def test_directional_ownership_counts_the_base_row_along_the_chat_direction_only() -> None:
    """Rows: equal, orthogonal, half along, reversed, without base, without chat."""
    chat, base = (
        [[2.0, 0.0]] * 5 + [[0.0, 0.0]],
        [[2.0, 0.0], [0.0, 2.0], [1.0, 5.0], [-2.0, 0.0], [0.0, 0.0], [1.0, 0.0]],
    )
    values = delta_direction(torch.tensor([base, chat]).transpose(0, 1)).tolist()
    assert values == pytest.approx([0.5, 1, 0.75, 0.5, 1, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.199, "chat-only"), (0.21, "other"), (0.79, "other"), (0.81, "shared"), (1.0, "shared")]
)
def test_class_ends_lie_where_the_paper_puts_them(ratio: float, expected: str) -> None:
    """With |d^base| = ratio |d^chat|, Delta_norm = 1 - ratio / 2: the ends 0.9 and 0.6 are ratios 0.2 and 0.8."""
    decoder = torch.tensor([[[ratio], [1.0]], [[1.0], [ratio]]])
    mirrored = {"chat-only": "base-only"}.get(expected, expected)
    assert ownership_table(_judged(decoder))["ownership"].tolist() == [expected, mirrored]


def test_one_model_has_no_owner() -> None:
    with pytest.raises(InputError, match="one base with one chat"):
        ownership_table(_judged(torch.zeros(3, 1, 2)))
