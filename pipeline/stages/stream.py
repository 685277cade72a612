"""Training rows without a store: extraction workers feed the trainer's ranks (stages.training_rows) through Ray Data.

The stream is a plan of blocks of documents: epoch after epoch, each in its own order. A worker turns one block into
rows; the data ranks get the blocks in turn, in the order of the plan. Workers stay at most a few blocks ahead of
the slowest rank, so that neither memory nor forward passes are spent on rows that are not needed yet. A cursor, an
actor beside the driver, knows which blocks a run that continues from a checkpoint need not make again.

Trade-off against the store: every epoch costs a forward pass of both models, and the training rows are not kept.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray.data
import torch
from ray.train import DataConfig

from pipeline.cluster.connect import beside_driver, check_total, pool_size, request, total_cpus
from pipeline.cluster.pools import Pool, pool_dataset
from pipeline.config.crosscoder import TrainingSection
from pipeline.schema import Split
from pipeline.stages.catalogue import ActivationsInputs, FittedCrosscoderInputs
from pipeline.stages.extractor import Extractor, check_rejected, write_rejected
from pipeline.stages.step import StageContext, Step
from pipeline.stages.tokens import INDEX_NAME
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import read_table

_BYTES_PER_VALUE = 2
_BLOCK_BYTES = 128 << 20
"""Largest block: Ray Data's own target, so that its bounds on memory hold."""
_MARGIN = 2.0
"""Blocks planned per block needed; a planned block costs nothing until it is made."""
_BLOCKS_AHEAD = 2
"""Blocks that may be made before they are needed, per extraction worker and per data rank."""
_POLL_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 120.0
"""After so long a block is made early all the same. While it waits, an earlier block may stand behind it in the queue
of its worker: a lost worker's blocks can come back in another order."""
_BUSY_FRAC = 0.95
"""Share of the cluster's logical CPUs that trainers and extraction take together."""


class Slot(NamedTuple):
    """One block of the plan."""

    number: int
    """From 0 over all epochs."""
    epoch: int
    block: int
    """Within the epoch."""


class Block(NamedTuple):
    """What became of one slot."""

    slot: int
    x: np.ndarray | None
    """bfloat16 rows as int16 [B, M, D]; None where an earlier attempt has used them up."""


class StreamOrder(NamedTuple):
    """Which documents make up which block, for every epoch."""

    places: np.ndarray
    """Training documents: rows of the tokens' index, int64."""
    lengths: np.ndarray
    """Their tokens."""
    block_tokens: int
    seed: int

    def blocks(self, epoch: int) -> list[np.ndarray]:
        """Places of the documents of each block: all documents once, in the epoch's own order.

        Blocks are as equal as documents allow, so that all ranks, which get blocks in turn, need equally many.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.places))
        starts = np.cumsum(self.lengths[order]) - self.lengths[order]
        num_tokens = int(self.lengths.sum())
        num_blocks = -(-num_tokens // self.block_tokens)
        cuts = np.flatnonzero(np.diff(starts * num_blocks // num_tokens)) + 1
        return list(np.split(self.places[order], cuts))

    def slots(self, num_tokens: int) -> list[Slot]:
        """Slots of whole epochs, of at least num_tokens tokens."""
        slots: list[Slot] = []
        for epoch in range(-(-num_tokens // int(self.lengths.sum()))):
            first = len(slots)
            slots += [Slot(first + block, epoch, block) for block in range(len(self.blocks(epoch)))]
        return slots


class Stream(NamedTuple):
    """What a rank needs to read a stream."""

    cursor: "Cursor | RemoteCursor"
    num_slots: int
    buffer_rows: int
    """Rows of the shuffle buffers of all data ranks together."""
    seed: int
    row_shape: tuple[int, int]
    """(M, D)."""


class Cursor:
    """Where the present attempt began and how far the ranks are; which documents are quarantined. One per stream.

    Args of the constructor: `blocks_ahead`, how many blocks may be made before they are needed.
    """

    def __init__(self, blocks_ahead: int) -> None:
        self._blocks_ahead = blocks_ahead
        self._done: set[int] = set()
        self._taken: set[int] = set()
        self._first_wanted = 0
        self._rejected: dict[int, dict[str, Any]] = {}

    def start(self, done: set[int], rejected: Sequence[dict[str, Any]]) -> None:
        """Begin an attempt: these slots are not made again."""
        self._done, self._taken, self._first_wanted = done, set(done), 0
        self.take([])
        self.reject(rejected)

    def done(self) -> set[int]:
        """Slots that are not made again."""
        return self._done

    def take(self, slots: Sequence[int]) -> None:
        """A rank has put these blocks into its buffer."""
        self._taken.update(slots)
        while self._first_wanted in self._taken:
            self._taken.remove(self._first_wanted)
            self._first_wanted += 1

    def may_make(self, slot: int) -> bool:
        """Whether a block is near enough to what the slowest rank wants next."""
        return slot < self._first_wanted + self._blocks_ahead

    def reject(self, documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Quarantine documents; all of them so far, each once however often it was reported."""
        self._rejected.update({document["doc_id"]: document for document in documents})
        return list(self._rejected.values())


class RemoteCursor:
    """A Cursor that lives in an actor beside the driver."""

    def __init__(self, blocks_ahead: int) -> None:
        self._actor = beside_driver(Cursor, blocks_ahead)

    def start(self, done: set[int], rejected: Sequence[dict[str, Any]]) -> None:
        """As Cursor.start; returns when it has happened."""
        ray.get(self._actor.start.remote(done, rejected))

    def done(self) -> set[int]:
        """As Cursor.done."""
        found: set[int] = ray.get(self._actor.done.remote())
        return found

    def take(self, slots: Sequence[int]) -> None:
        """As Cursor.take; returns at once."""
        self._actor.take.remote(slots)

    def may_make(self, slot: int) -> bool:
        """As Cursor.may_make."""
        return bool(ray.get(self._actor.may_make.remote(slot)))

    def reject(self, documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """As Cursor.reject."""
        rejected: list[dict[str, Any]] = ray.get(self._actor.reject.remote(documents))
        return rejected


class ExtractBlock:
    """Worker: the rows of one block; none for a block that an earlier attempt has used up."""

    def __init__(self, extractor: Extractor, order: StreamOrder, cursor: "Cursor | RemoteCursor") -> None:
        self.extractor, self.order, self.cursor = extractor, order, cursor
        self._done = cursor.done()
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __call__(self, slot: Slot) -> Block:
        """Extract, once the ranks are near enough to this block."""
        if slot.number in self._done:
            return Block(slot.number, None)
        deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
        while not self.cursor.may_make(slot.number) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if self._epoch[0] != slot.epoch:
            self._epoch = (slot.epoch, self.order.blocks(slot.epoch))
        extracted = self.extractor(self._epoch[1][slot.block])
        if extracted.rejected:
            check_rejected(self.cursor.reject(extracted.rejected), self.extractor.max_rejected)
        return Block(slot.number, extracted.rows.x_BMD.view(torch.int16).numpy())


def open_stream(
    activations: Step[ActivationsInputs], context: StageContext, training: TrainingSection, placement: "Placement"
) -> tuple[ray.data.Dataset, Stream]:
    """The training rows of an activations artifact that holds validation rows only: their data set, how to read it.

    `result_of` opens a row of the data set, which holds a Block.
    """
    section = activations.inputs.section
    manifest = ActivationStore(context.storage, activations.folder).manifest
    tokens_folder = activations.inputs.tokens.folder
    index = read_table(context.storage, f"{tokens_folder}/{INDEX_NAME}")
    is_train = np.asarray(index["split"].to_pylist(), dtype=object) == Split.TRAIN
    lengths = index["num_tokens"].to_numpy()[is_train].astype(np.int64)
    row_bytes = manifest.num_models * manifest.activation_dim * _BYTES_PER_VALUE
    order = StreamOrder(
        places=np.flatnonzero(is_train).astype(np.int64),
        lengths=lengths,
        block_tokens=max(1, min(section.rows_per_shard, _BLOCK_BYTES // row_bytes)),
        seed=training.shuffle_seed,
    )
    kept_frac = context.record_of(activations).counts["kept_frac"]
    epoch_rows = int(lengths.sum() * kept_frac)
    num_ranks = context.resources.training.data
    num_tokens = int(training.num_rows / kept_frac * _MARGIN) + 8 * num_ranks * order.block_tokens
    slots = order.slots(num_tokens)
    cursor = RemoteCursor(_BLOCKS_AHEAD * (placement.num_extractors + num_ranks))
    extractor = Extractor(
        context.storage,
        tokens_folder,
        section=section,
        loading=activations.inputs.loading,
        corpora=manifest.corpora,
        max_rejected=int(section.max_rejected_frac * len(lengths)),
    )
    workers = context.resources.extraction
    pool = Pool(
        "extraction",
        workers.model_copy(update={"workers": placement.num_extractors}),
        ExtractBlock,
        (extractor, order, cursor),
        uses_actors=True,
        min_workers=workers.min_workers,
        logical_cpus=placement.per_extractor,
    )
    dataset = pool_dataset(pool, slots)
    dataset.context.execution_no_progress_timeout_s = -1  # a trainer that takes its time is no stall
    stream = Stream(
        cursor,
        num_slots=len(slots),
        buffer_rows=min(training.shuffle_buffer_rows, epoch_rows),
        seed=training.shuffle_seed,
        row_shape=(manifest.num_models, manifest.activation_dim),
    )
    return dataset, stream


def publish_rejected(stream: Stream, steps: Sequence[Step[FittedCrosscoderInputs]], storage: Storage) -> dict[str, int]:
    """Write the quarantined training documents beside each crosscoder; their number, for the records."""
    rejected = stream.cursor.reject([])
    for step in steps:
        write_rejected(storage, step.folder, rejected)
    return {"num_rejected_documents": len(rejected)}


class Placement(NamedTuple):
    """Logical CPUs of trainers and extraction, which must run at the same time: each waits for the other."""

    per_trainer: float
    per_extractor: float
    num_extractors: int


def place(context: StageContext, trainer_cpus: float) -> Placement:
    """Share the cluster's logical CPUs; asks are scaled down where they exceed it together (threads are not)."""
    training, extraction = context.resources.training, context.resources.extraction
    total = float(total_cpus())
    num_trainers = training.data * training.latent
    left = total - trainer_cpus * num_trainers
    num_extractors = extraction.workers or pool_size(extraction, max(1, int(left / extraction.cpus)))
    num_first = min(extraction.min_workers or num_extractors, num_extractors)
    asked = trainer_cpus * num_trainers + extraction.cpus * num_first
    scale = min(1.0, total * _BUSY_FRAC / asked)
    together: dict[str, float] = {}
    for section, number in ((training, num_trainers), (extraction, num_first)):
        for kind, amount in request(section, 0.0).items():  # CPUs are scaled below
            together[kind] = together.get(kind, 0.0) + amount * number
    check_total("training with resources.extraction", together, num_trainers + num_first)
    return Placement(round(trainer_cpus * scale, 3), round(extraction.cpus * scale, 3), num_extractors)


class _PerDataRank(DataConfig):  # type: ignore[misc]
    """One part per data rank, which get blocks in turn. Latent ranks get the iterator of their data rank; only the
    first of them reads it."""

    def __init__(self, data: int, latent: int) -> None:
        super().__init__()
        self._mesh = (data, latent)

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        data, latent = self._mesh
        assert world_size == data * latent, (world_size, data, latent)
        ((name, dataset),) = datasets.items()
        dataset = dataset.copy(dataset)
        dataset.context.execution_options = self._resolve_execution_options(name)
        dataset.context.execution_options.preserve_order = True
        splits = dataset.streaming_split(data, equal=False)
        return [{name: splits[rank // latent]} for rank in range(world_size)]


def stream_config(*, data: int, latent: int) -> DataConfig:
    """Ray Train's split of the stream."""
    return _PerDataRank(data, latent)
