"""The benchmark's table for a finished run with planted labels (the demo), scored by the labels of its answers.

A latent that a rule calls chat-only is right if its maximum over an answer ranks the answers that show one behaviour
above all others of the held-out dialogues with an AUROC of at least MIN_AUROC; recall is the share of behaviours that
some called latent finds so. Whatever else the chat training changed has no label and counts as wrong, so precision is a
lower bound. Reads artifacts only; nothing is fitted.
"""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.latent_tables import limits_of
from pipeline.analyses.planted import Planted
from pipeline.analyses.planted_columns import Scoring
from pipeline.analyses.rows import analyse, encoded_batches
from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError
from pipeline.planted.benchmark import RESULTS, SCORES_JSON, SCORES_NAME, SCORES_TEXT
from pipeline.planted.score import MISTAKES, NOTHING, RULES, SCORE_COLUMNS, TrialScore, score_row, score_text
from pipeline.planted.trial import called
from pipeline.run.flow import build_flow
from pipeline.schema import Split
from pipeline.stages.catalogue import LatentsInputs
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.latents import read_latents
from pipeline.stages.row_pass import shard_rows
from pipeline.stages.step import Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.artifacts import read_record
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, write_frame

MIN_AUROC = 0.9


def run(config: RunConfig) -> str:
    """The table as text; its files go beside those of the benchmark. InputError unless the run is finished."""
    storage = Storage(config.storage.root)
    steps = [own.latents for own in build_flow(config).crosscoders]
    rows = [row for step in steps for row in _rows_of(config.name, storage, step)]
    table = pd.DataFrame(rows, columns=[column.name for column in SCORE_COLUMNS])
    folder, text = f"{RESULTS}/{config.name}", score_text(table)
    write_frame(storage, f"{folder}/{SCORES_NAME}", table, arrow_schema(SCORE_COLUMNS))
    storage.write_json(f"{folder}/{SCORES_JSON}", {"scores": table.to_dict("records")})
    storage.write_bytes(f"{folder}/{SCORES_TEXT}", f"{text}\n".encode())
    return text


def _rows_of(run_name: str, storage: Storage, step: Step[LatentsInputs]) -> list[dict[str, Any]]:
    """Every rule on one crosscoder."""
    record = read_record(storage, step.key)
    if record is None:
        raise InputError(
            f"{storage.url(step.folder)}: expected the finished {step.name} of {run_name}, got none; run it first"
        )
    store = ActivationStore(storage, step.inputs.activations.folder)
    if not store.manifest.labels or not store.manifest.dialogue_corpora:
        raise InputError(
            f"{run_name}: expected a run with planted labels or a benchmark file, got labels "
            f"{list(store.manifest.labels)}; only generated pairs have a truth to score"
        )
    latents = read_latents(storage, step)
    with open_crosscoder(storage, step.inputs.crosscoder.folder) as crosscoder:
        auroc_FL = label_auroc(crosscoder, store)
    calls = called(latents, limits_of(step.inputs.section))
    return [
        score_row(
            [label_score(auroc_FL, torch.from_numpy(calls[rule].to_numpy(copy=True)))],
            [record.counts["fidelity"]],
            data=run_name,
            recipe=step.crosscoder_name,
            rule=rule,
        )
        for rule in RULES
        if rule in calls
    ]


def label_auroc(crosscoder: Any, store: ActivationStore) -> Tensor:
    """AUROC of every latent's maximum over an answer for every planted label, held-out dialogues, float64 [F, L]."""
    planted = Planted(
        activation_dim=crosscoder.activation_dim,
        num_latents=crosscoder.num_latents,
        labels=store.manifest.labels,
        chat_corpora=store.manifest.dialogue_corpora,
    )
    shards = store.manifest.of_split(Split.VALIDATION)
    batches = (batch for shard in shards for batch in encoded_batches(crosscoder, shard_rows(store, shard)))
    return planted.auroc_by_latent(analyse({"planted": planted}, batches)["planted"], Scoring.TURN)


def label_score(auroc_FL: Tensor, is_called_F: Tensor) -> TrialScore:
    """Precision and recall of the called latents; a label that no row carries (NaN) cannot be found."""
    best = auroc_FL[is_called_F].nan_to_num(0.0).max(1)
    is_right = best.values >= MIN_AUROC
    num_called, num_wrong = len(is_right), int((~is_right).sum())
    precision = float(is_right.double().mean()) if num_called else float("nan")
    found = torch.unique(best.indices[is_right])
    wrong = dict.fromkeys(MISTAKES, 0) | {NOTHING: num_wrong}
    num_labels = auroc_FL.shape[1]
    return TrialScore(precision, len(found) / num_labels, num_called, num_labels, wrong)
