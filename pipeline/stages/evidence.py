"""How different the two models are at all, measured on held-out text before any crosscoder is fitted.

Both models run whole on validation documents and dialogues; analyses/evidence.py sums and judges. The latent tables
read the record: where the models cannot be told apart, no latent is called chat-specific (stages/latents.py).

A worker call is a fixed slice of the chosen documents, and the calls' sums are merged along a tree over their numbers
(merging.py): the numbers are the same to the last bit with any number of workers.
"""

import time
from collections.abc import Sequence, Set
from typing import NamedTuple

import pandas as pd
import pyarrow as pa

from pipeline.analyses.distance import DISTANCE_COLUMNS
from pipeline.analyses.evidence import STREAM_COLUMNS, Evidence, EvidenceTables
from pipeline.analyses.next_tokens import next_token_batches
from pipeline.analyses.rows import Sums, sums_from_bytes, sums_to_bytes
from pipeline.cluster.pools import Pool, run_pool
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.schema import Split
from pipeline.stages.catalogue import EvidenceInputs
from pipeline.stages.extractor import read_rejected, read_token_rows, row_options
from pipeline.stages.locations import Loading
from pipeline.stages.merging import MergeTree
from pipeline.stages.models import load_pair
from pipeline.stages.step import StageContext, Step
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, numbers_of, read_table, write_frame
from pipeline.terminal import Progress

DISTANCE_NAME = "distance.parquet"
STREAMS_NAME = "streams.parquet"
DISTANCE_SCHEMA = arrow_schema(DISTANCE_COLUMNS)
STREAMS_SCHEMA = arrow_schema(STREAM_COLUMNS)

_DOCUMENTS_PER_CALL = 16
"""The same on any cluster: the last digits of a KL depend on the other documents of its batch."""


class Judgement(NamedTuple):
    """What the record says about the pair."""

    is_distinguishable: bool
    reason: str


class _Documents(NamedTuple):
    """One worker call."""

    number: int
    index: pa.Table


class _CallSums(NamedTuple):
    """What one call has summed."""

    number: int
    num_documents: int
    packed: bytes


def run(steps: Sequence[Step[EvidenceInputs]], context: StageContext) -> None:
    """Publish both tables and the judgement, and say it."""
    (step,) = steps
    started = time.monotonic()
    inputs, storage = step.inputs, context.storage
    index = _documents(inputs, context)
    evidence = Evidence(
        corpora=tuple(inputs.tokens.inputs.weights),
        activation_dim=context.record_of(inputs.activations).counts["activation_dim"],
    )
    options = row_options(inputs.activations.inputs.section, inputs.section.tokens_per_batch)
    about = (inputs.loading, options, inputs.section.max_positions)
    calls = [
        _Documents(number, index.slice(start, _DOCUMENTS_PER_CALL))
        for number, start in enumerate(range(0, index.num_rows, _DOCUMENTS_PER_CALL))
    ]
    pool = Pool("analyses", context.resources.analyses, CompareModels, (storage, inputs.tokens.folder, about, evidence))
    tree: MergeTree[Sums] = MergeTree(len(calls), evidence.merge)
    progress = Progress(EvidenceInputs.NAME, index.num_rows, "documents")
    for result in context.follow(progress, run_pool(pool, calls), lambda result: result.num_documents):
        tree.add(result.number, sums_from_bytes(result.packed))
    tables = evidence.tables(tree.total(), dtype=inputs.loading.dtype)
    write_frame(storage, f"{step.folder}/{DISTANCE_NAME}", tables.distance.table, DISTANCE_SCHEMA)
    write_frame(storage, f"{step.folder}/{STREAMS_NAME}", tables.streams, STREAMS_SCHEMA)
    context.reporter.message(f"{step.name}: {tables.distance.reason}")
    context.finish(step, _counts(tables, index.num_rows), time.monotonic() - started)


def judgement_of(step: Step[EvidenceInputs], context: StageContext) -> Judgement:
    """The judgement of a finished step."""
    counts = context.record_of(step).counts
    return Judgement(counts["is_distinguishable"], counts["reason"])


def _counts(tables: EvidenceTables, num_documents: int) -> dict[str, object]:
    distance = tables.distance.table
    return {
        "is_distinguishable": tables.distance.is_distinguishable,
        "reason": tables.distance.reason,
        "num_documents": num_documents,
        "kl": numbers_of(distance, "kl", by=("tokens",)),
        "disagreement": numbers_of(distance, "disagreement", by=("tokens",)),
        "streams": numbers_of(tables.streams, "value", by=("measure",)),
    }


def _documents(inputs: EvidenceInputs, context: StageContext) -> pa.Table:
    """Index rows of the documents that are compared."""
    folders = inputs.tokens.folder, inputs.activations.folder
    return choose_documents(
        read_table(context.storage, f"{folders[0]}/{INDEX_NAME}"),
        context.record_of(inputs.tokens).counts["dialogue_corpora"],
        read_rejected(context.storage, folders[1]),
        inputs.section.num_documents,
    )


def choose_documents(
    index: pa.Table, dialogue_corpora: Sequence[str], rejected: Set[int], num_documents: int
) -> pa.Table:
    """Up to num_documents dialogues and as many plain documents of the validation part, in order of their hash.

    Documents that extraction has quarantined are left out. InputError where nothing is left.
    """
    frame = index.to_pandas()
    held_out = frame[(frame["split"] == Split.VALIDATION) & ~frame["doc_id"].isin(rejected)]
    is_dialogue = held_out["corpus"].isin(dialogue_corpora)
    kinds = [held_out[own].sort_values("doc_id").head(num_documents) for own in (is_dialogue, ~is_dialogue)]
    chosen = pd.concat(kinds)
    if chosen.empty:
        raise InputError(
            "analyses.evidence: expected validation documents, got none; raise corpus.validation_frac or set "
            "analyses.evidence to null"
        )
    return index.take(chosen.index.to_numpy())


class CompareModels:
    """Worker: both models whole. An item is a slice of the chosen documents."""

    def __init__(
        self, storage: Storage, tokens_folder: str, about: tuple[Loading, RowOptions, int], evidence: Evidence
    ) -> None:
        loading, self.options, self.max_positions = about
        self.storage, self.tokens_folder, self.evidence = storage, tokens_folder, evidence
        self.pair = load_pair(storage, loading)

    def __call__(self, call: _Documents) -> _CallSums:
        """Sums over some documents."""
        documents = read_token_rows(self.storage, self.tokens_folder, call.index)
        sums = self.evidence.start()
        for batch in next_token_batches(self.pair, documents, self.options, max_positions=self.max_positions):
            self.evidence.update(sums, batch)
        return _CallSums(call.number, call.index.num_rows, sums_to_bytes(sums))
