"""The rows that training reads: every row once per epoch, in an order that depends on seed and epoch, for any rank.

Shards are permuted and taken a few at a time (a window), and the rows of a window are permuted; batches continue across
windows and epochs. The order inside a batch does not matter, so its rows are taken in the order of the files, which are
then read forwards. The rows of any step are known without reading the ones before it. Therefore a resumed run reads
exactly the next rows, and R ranks that each take their slice of every global batch see the same batches as one rank.

A rank takes only its own rows out of a window, so R ranks on one machine share the work of copying and converting.
They share the checksums too: one rank compares each shard, and no step on a window's rows can end before all ranks have
opened the window. What is not mapped from a local file (an object store, lossless compression) is fetched or
decompressed whole by every rank.

Shapes: N rows of this rank's slice of a batch, M models, D width.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, islice
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.schema import Split
from pipeline.storage.activation_store import ActivationStore, Shard
from pipeline.storage.shards import OpenShard

_WINDOW_SHARDS = 4
"""Shards whose rows are mixed with each other; more mix better and cost memory."""


class ReadOptions(NamedTuple):
    """How rows are read; does not change which."""

    dtype: torch.dtype = torch.bfloat16
    """Of the batches. The values are the same; float32 saves a CPU trainer the conversion."""
    memory_bytes: int = 4 << 30
    """Bound of what is read ahead beyond the current window: batches, and shards that are not mapped."""
    num_threads: int = 2
    """Threads that open shards, and threads that take rows."""


class _Window:
    """Some shards whose rows are mixed: what is left of them, in their order, and the shards as they open."""

    def __init__(self, shards: list[Shard], order: Tensor) -> None:
        self.shards = shards
        self.order = order
        self.starts = torch.tensor([0, *accumulate(shard.num_rows for shard in shards)])
        self.opening: list[Future[OpenShard]] = []


class _Piece(NamedTuple):
    """What a batch takes from one window."""

    window: _Window
    places: slice
    """Of the whole batch, in the window's order."""
    own: slice
    """Of those, once sorted, what this rank takes; empty where it only waits for the window."""


class TrainingRows:
    """An endless sequence of global batches.

    Args of the constructor: `seed` of the order; `batch_rows` of a global batch; `rank` of `num_ranks`, which take
    equal, adjacent slices of each global batch; `options` of reading, which do not change the rows.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        seed: int,
        batch_rows: int,
        rank: int = 0,
        num_ranks: int = 1,
        options: ReadOptions | None = None,
    ) -> None:
        self.store = store
        self.shards = store.manifest.of_split(Split.TRAIN)
        self.num_rows = sum(shard.num_rows for shard in self.shards)
        if self.num_rows < 1:
            raise ArtifactError(f"{store.storage.url(store.folder)}: expected training rows, got none; add documents")
        assert batch_rows % num_ranks == 0, (batch_rows, num_ranks)
        self.seed, self.batch_rows, self.rank, self.num_ranks = seed, batch_rows, rank, num_ranks
        self.options = options or ReadOptions()
        self._own_shards = {shard.name for shard in self.shards[rank::num_ranks]}

    def batches(self, first_step: int, last_step: int) -> Iterator[Tensor]:
        """x_NMD (this rank's slice of the global batch) for steps first_step .. last_step - 1; some are read ahead."""
        manifest = self.store.manifest
        shape = (self.batch_rows // self.num_ranks, manifest.num_models, manifest.activation_dim)
        num_bytes = math.prod(shape) * self.options.dtype.itemsize
        depth = max(1, min(2 * self.options.num_threads, self.options.memory_bytes // (4 * num_bytes)))
        with (
            ThreadPoolExecutor(self.options.num_threads, thread_name_prefix="crossray-open") as openers,
            ThreadPoolExecutor(self.options.num_threads, thread_name_prefix="crossray-take") as takers,
        ):
            ahead: deque[Future[Tensor]] = deque()
            try:
                for pieces in islice(self._slices_from(first_step, openers), max(0, last_step - first_step)):
                    # Allocated in this thread, where it is freed too: the allocator can then use it again.
                    out_NMD = torch.empty(shape, dtype=self.options.dtype)
                    ahead.append(takers.submit(self._take, pieces, out_NMD))
                    if len(ahead) > depth:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                takers.shutdown(cancel_futures=True)
                openers.shutdown(cancel_futures=True)

    def _slices_from(self, first_step: int, openers: ThreadPoolExecutor) -> Iterator[list[_Piece]]:
        """Where this rank's rows are, for every step from the given one on, without an end."""
        own_rows = self.batch_rows // self.num_ranks
        windows = self._opened(first_step * self.batch_rows, openers)
        window, at = next(windows), 0
        while True:
            pieces: list[_Piece] = []
            place = 0  # in the global batch
            while place < self.batch_rows:
                if at == len(window.order):
                    window, at = next(windows), 0
                length = min(len(window.order) - at, self.batch_rows - place)
                start = max(self.rank * own_rows - place, 0)
                stop = min((self.rank + 1) * own_rows - place, length)
                pieces.append(_Piece(window, slice(at, at + length), slice(start, max(start, stop))))
                at, place = at + length, place + length
            yield pieces

    def _opened(self, start_row: int, openers: ThreadPoolExecutor) -> Iterator[_Window]:
        """Windows whose shards are being opened; of the next one as many as the memory allows are opened ahead."""
        windows = self._windows(*divmod(start_row, self.num_rows))
        window = next(windows)
        while True:
            self._open(window, len(window.shards), openers)
            following = next(windows)
            total = sum(map(self.store.resident_bytes, window.shards))
            sizes = accumulate(map(self.store.resident_bytes, following.shards), initial=0)
            num_ahead = sum(size <= self.options.memory_bytes - total for size in list(sizes)[1:])
            self._open(following, num_ahead, openers)
            yield window
            window = following

    def _open(self, window: _Window, num_shards: int, openers: ThreadPoolExecutor) -> None:
        for shard in window.shards[len(window.opening) : num_shards]:
            window.opening.append(openers.submit(self._open_shard, shard))

    def _open_shard(self, shard: Shard) -> OpenShard:
        self.store.storage.read_ahead(f"{self.store.folder}/{shard.name}")
        return self.store.open(shard, verify=shard.name in self._own_shards)

    def _windows(self, epoch: int, skip: int) -> Iterator[_Window]:
        """Windows from the given row of an epoch on, without an end."""
        while True:
            order = torch.randperm(len(self.shards), generator=self._generator(epoch, 0)).tolist()
            for number, at in enumerate(range(0, len(order), _WINDOW_SHARDS)):
                shards = [self.shards[i] for i in order[at : at + _WINDOW_SHARDS]]
                num_rows = sum(shard.num_rows for shard in shards)
                if skip >= num_rows:
                    skip -= num_rows
                    continue
                rows = torch.randperm(num_rows, generator=self._generator(epoch, number + 1))
                yield _Window(shards, rows[skip:])
                skip = 0
            epoch += 1

    def _take(self, pieces: list[_Piece], out_NMD: Tensor) -> Tensor:
        """Fill `out` with this rank's rows of a batch."""
        offset = 0
        for window, places, own in pieces:
            rows_N = window.order[places].sort().values[own]
            ends = torch.searchsorted(rows_N, window.starts).tolist()
            for number, opening in enumerate(window.opening):
                opened = opening.result()
                first, last = ends[number], ends[number + 1]
                opened.take(rows_N[first:last] - window.starts[number], out_NMD[offset + first : offset + last])
            offset += len(rows_N)
        return out_NMD

    def _generator(self, epoch: int, part: int) -> torch.Generator:
        text = f"{self.seed}/{epoch}/{part}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1)
