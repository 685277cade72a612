"""Where a training rank's batches come from: the store, or the stream. The training loop knows only `RowSource`.

The store's order is a function of seed and step, so a checkpoint holds nothing of it. In stream mode each data rank
mixes its blocks in a shuffle buffer. Blocks arrive in the order of the plan, so the same seed and ranks see the same
batches, whatever workers are lost. Latent ranks of one data rank receive its rows.

A checkpoint of a stream holds which blocks were taken and which of their rows are still in the buffers, not the rows
themselves. A run that continues from it extracts those blocks once more and leaves out the rows that were used: every
row is trained on once per epoch, in an order that from there on differs from that of a run without interruption.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray.train
import torch
from torch import Tensor

from pipeline.cluster.pools import result_of
from pipeline.config.crosscoder import TrainingSection
from pipeline.errors import InputError
from pipeline.numerics.parallel import Mesh
from pipeline.stages.stream import Block, Stream
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.row_order import ReadOptions, TrainingRows
from pipeline.storage.shuffle_buffer import ShuffleBuffer


class RowSource(Protocol):
    """Batches of one rank. What is called collective must be called by all ranks alike."""

    def restore(self, state: Mapping[str, Any] | None, first_step: int) -> None:
        """Continue after `first_step` steps from the state at that time; None starts from the first row. Collective."""
        ...

    def warm_up(self) -> Tensor:
        """x_BMD of the first step, for what the fit must know before it; `batches` gives it again."""
        ...

    def batches(self, first_step: int, last_step: int) -> Iterator[Tensor]:
        """x_BMD (this rank's slice of the global batch, bfloat16 or float32) for steps first_step .. last_step - 1."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the source, the same on every rank: tensors and plain values. Collective."""
        ...


class StoreRows:
    """Batches of the store: any step's rows can be read at once, so there is no state."""

    def __init__(self, rows: TrainingRows) -> None:
        self._rows = rows

    def restore(self, state: Mapping[str, Any] | None, first_step: int) -> None:
        """Nothing to do."""

    def warm_up(self) -> Tensor:
        """The first batch of the order."""
        return next(self._rows.batches(0, 1))

    def batches(self, first_step: int, last_step: int) -> Iterator[Tensor]:
        """As in the store's order."""
        return self._rows.batches(first_step, last_step)

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class Position(NamedTuple):
    """How far a stream was read, over all ranks."""

    taken: Tensor
    """bool [slots]: blocks that a rank has taken."""
    pending: Tensor
    """int64 [n, 2]: (slot, row) of taken rows that are not trained on yet."""
    rejected: list[dict[str, Any]]
    """Documents quarantined so far."""

    @classmethod
    def start(cls, num_slots: int) -> "Position":
        """Nothing was read."""
        return cls(torch.zeros(num_slots, dtype=torch.bool), torch.zeros(0, 2, dtype=torch.int64), [])

    @classmethod
    def of_state(cls, state: Mapping[str, Any], num_slots: int) -> "Position":
        """From a checkpoint, which may have planned more or fewer blocks."""
        position = cls.start(num_slots)
        taken = state["taken"][:num_slots]
        position.taken[: len(taken)] = taken
        return cls(position.taken, state["pending"], state["rejected"])

    def done(self) -> set[int]:
        """Slots whose rows are all used."""
        return set(self.taken.nonzero().squeeze(1).tolist()) - set(self.pending[:, 0].tolist())


class StreamRows:
    """A rank's batches from a stream.

    Args of the constructor: `blocks` gives the iterator over this data rank's blocks; `device` is where batches are
    put together.
    """

    def __init__(
        self,
        stream: Stream,
        blocks: Callable[[], Iterator[Block]],
        *,
        batch_rows: int,
        mesh: Mesh,
        device: str,
    ) -> None:
        self.stream, self.mesh, self.device = stream, mesh, device
        self._blocks = blocks
        self._own_rows = batch_rows // mesh.data_size
        self._is_reader = mesh.latent_rank == 0
        self._num_rows = -(-stream.buffer_rows // mesh.data_size)
        self._begin(Position.start(stream.num_slots), 0)

    def _begin(self, position: Position, first_step: int) -> None:
        seed = int(np.random.SeedSequence([self.stream.seed, self.mesh.data_rank, first_step]).generate_state(1)[0])
        self._start = position
        self._taken = torch.zeros(self.stream.num_slots, dtype=torch.int64)
        self._buffer = ShuffleBuffer(self._num_rows, seed=seed)
        self._left: dict[int, list[int]] = {}
        for slot, row in position.pending.tolist():
            self._left.setdefault(slot, []).append(row)
        self._arriving: Iterator[Block] | None = None
        self._first: Tensor | None = None

    def restore(self, state: Mapping[str, Any] | None, first_step: int) -> None:
        """Continue from a checkpoint's state, or start from the first row."""
        num_slots = self.stream.num_slots
        position = Position.start(num_slots) if state is None else Position.of_state(state, num_slots)
        self._begin(position, first_step)
        if self.mesh.data_rank == self.mesh.latent_rank == 0:
            self.stream.cursor.start(position.done(), position.rejected)
        self.mesh.sum_(torch.zeros(1, device=self.device), "world")  # no rank reads before the cursor is set

    def warm_up(self) -> Tensor:
        """The first batch, which `batches` will give again."""
        if self._first is None:
            self._first = self._next(self._own_rows)
        return self._first

    def batches(self, first_step: int, last_step: int) -> Iterator[Tensor]:
        """x_BMD (bfloat16, this rank's part of the global batch) for steps first_step .. last_step - 1."""
        for step in range(first_step, last_step):
            x_BMD = self._next((last_step - step) * self._own_rows) if self._first is None else self._first
            self._first = None
            yield x_BMD

    def state(self) -> dict[str, Any]:
        """The position, over all ranks."""
        taken = self.mesh.sum_(self._taken.to(self.device), "data").cpu() > 0
        pending = self._buffer.origins()
        most = int(self.mesh.max_(torch.tensor(len(pending), device=self.device), "data"))
        padded = torch.full((most, 2), -1, dtype=torch.int64)
        padded[: len(pending)] = pending
        every = self.mesh.gather(padded.to(self.device), "data").flatten(0, 1).cpu()
        unread = self._start.pending[~taken[self._start.pending[:, 0]]]
        return {
            "taken": taken | self._start.taken,
            "pending": torch.cat([every[every[:, 0] >= 0], unread]),
            "rejected": self.stream.cursor.reject([]),
        }

    def _next(self, rows_left: int) -> Tensor:
        """This rank's next rows, from the buffer or from its data rank's first latent rank."""
        if not self._is_reader:
            return self._shared(None)
        while not self._buffer.is_full and len(self._buffer) < rows_left:
            self._take()
        return self._shared(self._buffer.draw(self._own_rows))

    def _take(self) -> None:
        if self._arriving is None:
            self._arriving = self._blocks()
        block = next(self._arriving, None)
        if block is None:
            raise InputError(
                f"activations.mode: expected the stream's {self.stream.num_slots} blocks to be enough for "
                f"training.num_rows, got too few rows, with {len(self._buffer)} left; most tokens of the training "
                "documents are dropped: lower activations.drop_first_tokens or use mode: store"
            )
        slot, x = block
        if x is None:
            return
        x_BMD = torch.from_numpy(x).view(torch.bfloat16)
        rows = torch.tensor(self._left[slot]) if slot in self._left else torch.arange(len(x_BMD))
        self._taken[slot] = 1
        self.stream.cursor.take([slot])
        self._buffer.add(x_BMD[rows], torch.stack([torch.full_like(rows, slot), rows], dim=1))

    def _shared(self, x_BMD: Tensor | None) -> Tensor:
        """The rows of this data rank on all its latent ranks: the bits as integers, summed with zeros."""
        if self.mesh.latent_size == 1:
            assert x_BMD is not None
            return x_BMD
        shape = (self._own_rows, *self.stream.row_shape)
        mine = torch.zeros(shape, dtype=torch.bfloat16) if x_BMD is None else x_BMD
        bits = self.mesh.sum_(mine.flatten(1).view(torch.int32).to(self.device), "latent")
        return bits.view(torch.bfloat16).view(shape)


def _arriving() -> Iterator[Block]:
    """The blocks of this rank's part of Ray Train's data set, in order."""
    shard = ray.train.get_dataset_shard("train")
    for batch in shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
        for result in batch["result"]:
            yield result_of({"result": result})


def open_rows(
    storage: Storage,
    activations_folder: str,
    training: TrainingSection,
    *,
    stream: Stream | None,
    mesh: Mesh,
    device: str,
) -> RowSource:
    """The source of this rank: the stream, where there is one, else the store."""
    if stream is not None:
        return StreamRows(stream, _arriving, batch_rows=training.batch_rows, mesh=mesh, device=device)
    rows = TrainingRows(
        ActivationStore(storage, activations_folder),
        seed=training.shuffle_seed,
        batch_rows=training.batch_rows,
        rank=mesh.data_rank,
        num_ranks=mesh.data_size,
        options=ReadOptions(dtype=torch.float32 if device == "cpu" else torch.bfloat16),
    )
    return StoreRows(rows)
