"""What a verdict would have found: concepts with a latent of their own, a merged one, and none."""

import pandas as pd
import pytest
import torch

from pipeline.analyses.power import POWER_COLUMNS, power_rows, power_table, strengths_of
from pipeline.schema import CONTROL_COLUMNS, Verdict


def test_a_concept_is_found_by_a_chat_specific_latent_along_it():
    d_chat_FD = torch.tensor([[2.0, 0, 0], [0, 0.1, 0.1], [0, 0, 5.0], [0, 0, 0]])
    direction_CD = torch.tensor([[0.3, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 0.6, -0.8]])
    verdicts = [Verdict.CHAT_SPECIFIC, Verdict.CHAT_SPECIFIC, Verdict.SHARED, Verdict.DEAD]
    latents = pd.DataFrame({"latent": range(4), "verdict": verdicts})
    table = power_table(d_chat_FD, latents, direction_CD, strengths_of(4, [0.1, 0.4]))
    assert list(table.columns) == [column.name for column in POWER_COLUMNS]
    assert table["latent"].tolist()[:3] == [0, 1, 2]
    assert table["cosine"].tolist()[:3] == pytest.approx([1, 0.5**0.5, 1])
    assert table["strength"].tolist() == [0.1, 0.4, 0.1, 0.4]
    # The second has half of its direction, just above the limit; the third is there but called shared.
    assert table["is_found"].tolist() == [True, True, False, False]
    rows = pd.DataFrame(power_rows(table, frequency=0.01))
    assert list(rows.columns) == [column.name for column in CONTROL_COLUMNS]
    assert rows["value"].tolist() == [0.5, 0.5] and rows["num_latents"].tolist() == [2, 2]
    assert rows["value_low"].tolist() == pytest.approx([0.0945, 0.0945], abs=1e-4)  # Wilson's, 1 of 2
