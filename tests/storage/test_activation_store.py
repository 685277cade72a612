"""The activation store: every row once an epoch in any number of slices, exact resume, damage found by name."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import ArtifactError, InputError
from pipeline.storage.activation_store import MANIFEST_NAME, ActivationStore, Manifest, Shard, StoredMoments
from pipeline.storage.filesystem import Storage
from pipeline.storage.row_order import ReadOptions, TrainingRows
from pipeline.storage.shards import Rows, pack_shard

SIZES = (7, 12, 5, 9, 11, 6)
NUM_ROWS = sum(SIZES)


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(Storage(str(tmp_path)))


def make_store(storage: Storage, compression: str = "none") -> ActivationStore:
    """Six shards whose rows carry their own number in every coordinate."""
    shards, start = [], 0
    for number, size in enumerate(SIZES):
        numbers = torch.arange(start, start + size)
        data = pack_shard(
            Rows(
                x_BMD=numbers[:, None, None].expand(-1, 2, 3).to(torch.bfloat16),
                token_id_B=numbers.int(),
                doc_id_B=numbers,
                position_B=numbers.int(),
                flags_B=torch.zeros(size, dtype=torch.int32),
                corpus_B=torch.zeros(size, dtype=torch.int32),
            ),
            compression,
        )
        name = f"train-{number:05d}.safetensors"
        storage.write_bytes(f"a/{name}", data)
        shards.append(Shard(name, "train", size, size, len(data), hashlib.sha256(data).hexdigest()))
        start += size
    moments = {"train": StoredMoments(start, ((0.5, 1.5, 2.5), (3.0, 4.0, 5.0)), (1.25, 0.1))}
    manifest = Manifest(tuple(shards), 2, 3, ("documents",), (), (), compression, moments)
    storage.write_json(f"a/{MANIFEST_NAME}", manifest.to_json())
    return ActivationStore(storage, "a")


def numbers(batches: list[torch.Tensor]) -> list[int]:
    return [int(value) for batch in batches for value in batch[:, 0, 0].tolist()]


def test_the_manifest_survives_json(store: ActivationStore) -> None:
    assert Manifest.from_json(store.manifest.to_json()) == store.manifest
    assert store.manifest.num_rows("train") == NUM_ROWS
    assert store.manifest.num_rows("validation") == 0


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("shards", {"a": 1}),
        ("shards", [{"name": 3}]),
        ("shards", [1]),
        ("num_models", "two"),
        ("activation_dim", None),
        ("corpora", 4),
        ("dialogue_corpora", ["x"]),
        ("moments", []),
        ("moments", {"train": {"num_rows": "x", "mean": [], "variance": []}}),
    ],
)
def test_a_manifest_whose_parts_have_another_type_is_named(store: ActivationStore, part: str, value: object) -> None:
    key = f"a/{MANIFEST_NAME}"
    manifest = {**store.storage.read_json(key), part: value}
    store.storage.write_json(key, manifest)
    with pytest.raises(ArtifactError, match=part):
        ActivationStore(store.storage, "a")
    store.storage.write_json(key, {name: own for name, own in manifest.items() if name != part})
    with pytest.raises(ArtifactError, match=part):
        ActivationStore(store.storage, "a")
    store.storage.write_json(key, [manifest])
    with pytest.raises(ArtifactError, match=MANIFEST_NAME):
        ActivationStore(store.storage, "a")


def test_each_row_comes_exactly_once_an_epoch(store: ActivationStore) -> None:
    rows = TrainingRows(store, seed=0, batch_rows=10)
    read = numbers(list(rows.batches(0, 15)))
    for epoch in range(3):
        assert sorted(read[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS]) == list(range(NUM_ROWS))
    assert read[:NUM_ROWS] != read[NUM_ROWS : 2 * NUM_ROWS]


def test_the_order_is_the_seeds(store: ActivationStore) -> None:
    first, same, other = (
        numbers(list(TrainingRows(store, seed=seed, batch_rows=10).batches(0, 5))) for seed in (0, 0, 1)
    )
    assert first == same != other


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_ranks_share_the_batches_of_one_rank(store: ActivationStore, num_ranks: int) -> None:
    whole = list(TrainingRows(store, seed=3, batch_rows=10).batches(0, 12))
    parts = [
        list(TrainingRows(store, seed=3, batch_rows=10, rank=rank, num_ranks=num_ranks).batches(0, 12))
        for rank in range(num_ranks)
    ]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), batch)


@pytest.mark.parametrize("kind", ["lossless", "int8"])
@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_the_order_knows_neither_compression_nor_memory(
    store: ActivationStore, tmp_path: Path, kind: str, memory_bytes: int
) -> None:
    plain = list(TrainingRows(store, seed=3, batch_rows=10).batches(0, 12))
    options = ReadOptions(dtype=torch.float32, memory_bytes=memory_bytes, num_threads=1)
    packed = make_store(Storage(str(tmp_path / kind)), kind)
    read = list(TrainingRows(packed, seed=3, batch_rows=10, options=options).batches(0, 12))
    assert all(torch.equal(a.float(), b) for a, b in zip(plain, read, strict=True))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_a_damaged_shard_is_noticed_by_exactly_one_rank(store: ActivationStore, num_ranks: int) -> None:
    path = Path(store.storage.url(f"a/{store.manifest.shards[4].name}"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    refused = 0
    for rank in range(num_ranks):
        fresh = ActivationStore(store.storage, "a")
        try:
            list(TrainingRows(fresh, seed=3, batch_rows=6, rank=rank, num_ranks=num_ranks).batches(0, 10))
        except ArtifactError:
            refused += 1
    assert refused == 1


@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 9, 14])
def test_a_resumed_read_continues_with_exactly_the_next_row(store: ActivationStore, first_step: int) -> None:
    rows = TrainingRows(store, seed=7, batch_rows=10)
    whole = list(rows.batches(0, 15))
    resumed = list(TrainingRows(store, seed=7, batch_rows=10).batches(first_step, 15))
    assert len(resumed) == 15 - first_step
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[first_step:], strict=True))


def test_a_damaged_shard_is_named(store: ActivationStore) -> None:
    shard = store.manifest.shards[2]
    path = Path(store.storage.url(f"a/{shard.name}"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=rf"damaged shard .*{shard.name}"):
        store.read(shard)
    path.write_bytes(bytes(data[:100]))
    with pytest.raises(ArtifactError, match="got 100 bytes"):
        list(TrainingRows(store, seed=0, batch_rows=10).batches(0, 5))


def test_a_store_without_training_rows_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_json(f"a/{MANIFEST_NAME}", Manifest((), 2, 3, (), (), ()).to_json())
    with pytest.raises(ArtifactError, match="expected training rows"):
        TrainingRows(ActivationStore(storage, "a"), seed=0, batch_rows=4)


def test_a_row_that_is_not_finite_is_named_with_its_shard(store: ActivationStore) -> None:
    shard = store.manifest.shards[1]
    rows = store.read(shard)
    rows.x_BMD[4, 1, 2] = float("nan")
    data = pack_shard(rows)
    store.storage.write_bytes(f"a/{shard.name}", data)
    damaged = replace(shard, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    fresh = ActivationStore(store.storage, "a")
    with pytest.raises(InputError, match=rf"{shard.name}: expected finite activations, got NaN or Inf in row 4"):
        fresh.read(damaged)
