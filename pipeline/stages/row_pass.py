"""One pass over the validation rows that answers the questions of many steps, each shard read and encoded once.

How the shards are shared out among worker calls depends on the shards alone, never on the workers, and sums are merged
along a tree over the calls (merging.py): tables are the same to the last bit on any cluster.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from pipeline.analyses.rows import (
    RowAnalysis,
    Sums,
    analyse,
    encoded_batches,
    merge_all,
    sums_from_bytes,
    sums_to_bytes,
)
from pipeline.cluster.pools import Pool, run_pool
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import SHARD_TENSORS, Split
from pipeline.stages.finished_crosscoder import open_crosscoder, read_injection
from pipeline.stages.merging import MergeTree
from pipeline.stages.step import StageContext
from pipeline.storage.activation_store import ActivationStore, Shard
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Progress

_MOST_CALLS = 64
"""More workers than this have nothing to do. The sums of each call are sent to the driver: 3 kB per latent."""

Questions = Mapping[str, Mapping[str, RowAnalysis]]
"""Row analyses: by the crosscoder's folder, then by name."""
Answers = Mapping[str, Mapping[str, Sums]]
"""Their sums, by the same keys."""


class Measured(NamedTuple):
    """What is measured, and where."""

    crosscoder: Crosscoder
    """In the driver's memory; what a step keeps of it stays there during the pass."""
    store: ActivationStore
    context: StageContext


class ShardsCall(NamedTuple):
    """The validation shards that one worker call reads."""

    number: int
    shards: tuple[Shard, ...]


class _CallSums(NamedTuple):
    """What one call has summed."""

    number: int
    num_rows: int
    packed: dict[str, dict[str, bytes]]
    """Sums as bytes, by folder and name."""


def validation_calls(store: ActivationStore) -> list[ShardsCall]:
    """The worker calls that read the validation rows, each shard once."""
    shards = store.manifest.of_split(Split.VALIDATION)
    num_calls = min(len(shards), _MOST_CALLS)
    return [ShardsCall(number, shards[number::num_calls]) for number in range(num_calls)]


def shard_rows(store: ActivationStore, shard: Shard) -> dict[str, torch.Tensor]:
    """The rows of a shard by the names of schema.SHARD_TENSORS."""
    return dict(zip((column.name for column in SHARD_TENSORS), store.read(shard), strict=True))


def answer(title: str, questions: Questions, store: ActivationStore, context: StageContext) -> Answers:
    """Sums of every question over all validation rows. Nothing is read where nothing is asked."""
    asked = {folder: own for folder, own in questions.items() if own}
    if not asked:
        return {}
    calls = validation_calls(store)
    merged = {folder: MergeTree(len(calls), partial(_merge, own)) for folder, own in asked.items()}
    pool = Pool("analyses", context.resources.analyses, AnalyseShards, (context.storage, store.folder, asked))
    progress = Progress(title, store.manifest.num_rows(Split.VALIDATION), "rows")
    for result in context.follow(progress, run_pool(pool, calls), lambda result: result.num_rows):
        for folder, packed in result.packed.items():
            merged[folder].add(result.number, {name: sums_from_bytes(data) for name, data in packed.items()})
    return {folder: tree.total() for folder, tree in merged.items()}


def _merge(analyses: Mapping[str, RowAnalysis], a: dict[str, Sums], b: dict[str, Sums]) -> dict[str, Sums]:
    return merge_all(analyses, [a, b])


class AnalyseShards:
    """Worker: every crosscoder on some shards, each shard read once."""

    def __init__(self, storage: Storage, activations_folder: str, questions: Questions) -> None:
        self.store = ActivationStore(storage, activations_folder)
        self.questions = questions
        self.crosscoders = {}
        self.injections = {folder: read_injection(storage, folder) for folder in questions}
        for folder in questions:
            with open_crosscoder(storage, folder) as crosscoder:
                self.crosscoders[folder] = crosscoder

    def __call__(self, call: ShardsCall) -> _CallSums:
        """Sums of every analysis."""
        num_rows = 0
        merged: dict[str, dict[str, Sums]] = {}
        for shard in call.shards:
            rows = shard_rows(self.store, shard)
            num_rows += shard.num_rows
            for folder, analyses in self.questions.items():
                injection = self.injections[folder]
                own = rows if injection is None else rows | {"x": injection(rows["x"].float())}
                part = analyse(analyses, encoded_batches(self.crosscoders[folder], own))
                merged[folder] = merge_all(analyses, [merged[folder], part]) if folder in merged else part
        packed = {folder: {name: sums_to_bytes(sums) for name, sums in own.items()} for folder, own in merged.items()}
        return _CallSums(call.number, num_rows, packed)
