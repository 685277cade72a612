"""The table for a finished run with planted labels: read from its artifacts, against scores taken by hand."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from pipeline.config.run_file import load
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.planted import pair
from pipeline.planted.score import RULES, SCORE_COLUMNS
from pipeline.schema import PLANTED_SHIFT, Flag, Ownership
from pipeline.storage.activation_store import ActivationStore
from tests.runs import Finished, copied, run_file


@pytest.mark.ray
def test_a_finished_run_is_scored_by_the_labels_of_its_answers(finished: Finished, tmp_path: Path) -> None:
    root = copied(finished, tmp_path, "organism", "activations", "crosscoder", "latents")
    text = pair.run(load(run_file(tmp_path, str(root))))
    table = pd.read_parquet(root / "planted_results" / "tiny" / "scores.parquet")
    assert list(table.columns) == [column.name for column in SCORE_COLUMNS]
    assert (
        table["recipe"].tolist() == [name for name in ("l1", "batch_topk") for _ in list(RULES)[:-1]]
        and "batch_topk" in text
    )
    latents = finished.table("latents l1", "latents.parquet")
    is_called = (latents["ownership"] == Ownership.CHAT_ONLY) & (latents["frequency"] > 0)
    assert table["num_called"][0] == is_called.sum()
    assert table["recall"].between(0, 1).all() and (table["num_trials"] == 1).all()


@pytest.mark.ray
def test_the_auroc_of_a_label_counts_ordered_pairs(finished: Finished) -> None:
    step = finished.states["latents l1"].step
    store = ActivationStore(finished.storage, step.inputs.activations.folder)
    crosscoder = Crosscoder.from_pretrained(finished.root / step.inputs.crosscoder.folder)
    auroc_FL = pair.label_auroc(crosscoder, store)
    rows = [store.read(shard) for shard in store.manifest.of_split("validation")]
    is_chat = torch.cat([r.corpus_B for r in rows]) == store.manifest.dialogue_corpora[0]
    x_BMD, flags_B, doc_id_B = (
        torch.cat([getattr(r, name) for r in rows])[is_chat] for name in ("x_BMD", "flags_B", "doc_id_B")
    )
    code_BF = crosscoder.encode(x_BMD.float()).to_dense()
    latent = int((code_BF > 0).sum(0).argmax())
    answers = _answers(doc_id_B.tolist(), (flags_B & int(Flag.ASSISTANT) != 0).tolist())
    largest_T = torch.stack([code_BF[rows, latent].max() for rows in answers])
    for label in range(len(store.manifest.labels)):
        is_labelled_B = (flags_B >> (PLANTED_SHIFT + label)) & 1 == 1
        positive_T = torch.stack([is_labelled_B[rows].any() for rows in answers])
        ours, theirs = largest_T[positive_T][:, None], largest_T[~positive_T][None]
        wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
        torch.testing.assert_close(auroc_FL[latent, label], wins.mean(), rtol=1e-6, atol=1e-6)


def _answers(doc_id: list[int], is_answer: list[bool]) -> list[list[int]]:
    """Rows of every answer, with the row of the same document that stands before it."""
    answers: list[list[int]] = []
    for row, answered in enumerate(is_answer):
        follows = row > 0 and doc_id[row - 1] == doc_id[row]
        if answered and follows and is_answer[row - 1]:
            answers[-1].append(row)
        elif answered:
            answers.append([row - 1, row] if follows else [row])
    return answers


def test_a_run_that_is_not_finished_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"latents l1 of tiny"):
        pair.run(load(run_file(tmp_path, str(tmp_path / "runs"))))
