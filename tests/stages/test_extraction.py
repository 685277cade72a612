"""Extraction on a real cluster: what is poisonous is set aside, lost processes cost nothing but time, up to a limit."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from runs import Finished, checksums, copied, make, mounted, run_file
from safetensors.torch import load_file, save_file

from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.resources import ExtractionResources
from pipeline.config.run_file import RunConfig, load
from pipeline.errors import CrossrayError, InputError
from pipeline.schema import Split
from pipeline.storage.activation_store import ActivationStore

pytestmark = [pytest.mark.ray]


def poisoned(finished: Finished, folder: Path, **activations: Any) -> tuple[RunConfig, set[int], int]:
    """A run whose base model answers the rarest token of the training documents with NaN, and of which one document
    holds an id that no model knows; the documents with that token, and the other one."""
    root = copied(finished, folder, "organism", "corpus", "tokens")
    config = load(run_file(folder, str(root), activations={"layer": 1, "rows_per_shard": 4000, **activations}))
    tokens = root / finished.states["tokens"].step.key.folder
    index = pd.read_parquet(tokens / "index.parquet")
    frames = {name: pd.read_parquet(tokens / name) for name in index["part"].unique()}
    used = [(row.doc_id, row.split, frames[row.part].iloc[row.row]["input_ids"]) for row in index.itertuples()]
    documents_with: dict[int, set[int]] = {}
    for doc_id, split, ids in used:
        for token in set(ids.tolist()):
            documents_with.setdefault(token, set()).add(doc_id if split == Split.TRAIN else -1)
    token = min((len(own), token) for token, own in documents_with.items() if -1 not in own)[1]
    weights = next(root.glob("organism/*/base/model.safetensors"))
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    row = next(
        row for row in index.itertuples() if row.split == Split.TRAIN and row.doc_id not in documents_with[token]
    )
    part = tokens / str(row.part)
    table = pq.read_table(part)
    columns = table.to_pydict()
    columns["input_ids"][row.row][1] = 10**6
    pq.write_table(type(table).from_pydict(columns, schema=table.schema), part)
    return config, documents_with[token], int(row.doc_id)


def test_poisonous_documents_are_set_aside_and_counted(ray_cluster: None, finished: Finished, tmp_path: Path) -> None:
    config, with_nan, unreadable = poisoned(finished, tmp_path, max_rejected_frac=0.5)
    record = make(config, "activations")["activations"]
    folder = tmp_path / "runs" / "activations" / record.fingerprint
    table = pd.read_parquet(folder / "rejected.parquet").set_index("doc_id")
    assert set(table.index) == with_nan | {unreadable}
    assert record.counts["num_rejected_documents"] == len(table)
    assert "rejected.parquet" in record.checksums
    assert table.loc[unreadable, "reason"].startswith("cannot be read: token id 1000000 is outside")
    assert table.loc[sorted(with_nan), "reason"].str.startswith("NaN or Inf in").all()
    store = ActivationStore(finished.storage.__class__(config.storage.root), f"activations/{record.fingerprint}")
    kept = np.concatenate([store.read(shard).doc_id_B.unique().numpy() for shard in store.manifest.shards])
    index = finished.table("tokens", "index.parquet")
    assert sorted(kept) == sorted(set(index["doc_id"]) - set(table.index))


def test_record_says_how_far_the_rows_are_from_the_plain_forward(finished: Finished) -> None:
    record = finished.states["activations"].record
    assert record is not None
    assert all(0 <= record.counts[f"plain_forward_difference_{name}"] < 1e-3 for name in ("base", "chat"))
    assert (record.counts["commit_base"], record.counts["commit_chat"]) == (None, None)
    assert (record.counts["num_out_of_memory"], record.counts["num_rows_above_norm_cap"]) == (0, 0)
    assert record.counts["real_token_frac"] > 0.9


@pytest.mark.rare
def test_a_stream_sets_poisonous_documents_aside_too(ray_cluster: None, finished: Finished, tmp_path: Path) -> None:
    config, with_nan, unreadable = poisoned(finished, tmp_path, max_rejected_frac=0.5, mode="stream")
    records = make(config, "activations", "crosscoder")
    assert records["activations"].counts["num_rejected_documents"] == 0  # all of them are training documents
    assert records["crosscoder"].counts["num_rejected_documents"] == len(with_nan) + 1
    tables = [pd.read_parquet(path) for path in tmp_path.glob("runs/crosscoder/*/rejected.parquet")]
    assert len(tables) == 2
    assert all(set(table["doc_id"]) == with_nan | {unreadable} for table in tables)


@pytest.mark.rare
def test_more_poison_than_allowed_ends_the_run_with_names(
    ray_cluster: None, finished: Finished, tmp_path: Path
) -> None:
    config, with_nan, unreadable = poisoned(finished, tmp_path, max_rejected_frac=0.0)
    with pytest.raises(InputError, match="max_rejected_frac: expected at most 0 documents") as caught:
        make(config, "activations")
    assert any(f"document {doc_id}" in str(caught.value) for doc_id in with_nan | {unreadable})
    assert not list(tmp_path.glob("runs/activations/*/record.json"))


@pytest.mark.rare
def test_a_disk_that_fills_up_in_mid_extraction_keeps_what_was_finished(
    ray_cluster: None, finished: Finished, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "256m") as disk:
        root = copied(finished, disk, "organism", "corpus", "tokens")
        config = load(run_file(tmp_path, str(root)))
        size = sum(path.stat().st_size for path in finished.root.glob("activations/*/*"))
        used = shutil.disk_usage(disk).used
        subprocess.run(["mount", "-o", f"remount,size={used + size // 2}", str(disk)], check=True)
        with pytest.raises(InputError, match="no space left"):
            make(config, "activations")
        # Finished is a shard with its description: the disk may be full between the two, and the shard is made again.
        described = [path.with_suffix("") for path in root.glob("activations/*/*.safetensors.json")]
        kept = {path: path.stat().st_mtime_ns for path in described}
        assert kept
        assert not [path for path in root.rglob("*") if ".tmp-" in path.name]
        subprocess.run(["mount", "-o", f"remount,size={used + 3 * size}", str(disk)], check=True)
        record = make(config, "activations")["activations"]
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        assert record.checksums == checksums(finished.root, "activations")[record.fingerprint]


def mortal() -> type:
    """A worker that dies on item 3 as often as it is told to, by a count that outlives it (classes of a test's module
    cannot be imported where they run, local ones travel by value)."""

    class Mortal:
        def __init__(self, folder: Path, deaths: int) -> None:
            self.folder, self.deaths = folder, deaths

        def __call__(self, item: dict[str, int]) -> dict[str, int]:
            died = len(list(self.folder.iterdir()))
            if item["number"] == 3 and died < self.deaths:
                (self.folder / str(died)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"number": item["number"], "pid": os.getpid()}

    return Mortal


def brief() -> type:
    """A worker that says which process it is."""

    class Brief:
        def __init__(self) -> None:
            self.pid = os.getpid()

        def __call__(self, item: dict[str, int]) -> dict[str, int]:
            time.sleep(0.1)
            return {"number": item["number"], "pid": self.pid}

    return Brief


@pytest.mark.parametrize("uses_actors", [True, False], ids=["actors", "tasks"])
def test_lost_processes_are_replaced_up_to_the_limit(ray_cluster: None, tmp_path: Path, uses_actors: bool) -> None:
    items = [{"number": number} for number in range(8)]
    section = ExtractionResources(workers=1, cpus=0.5, max_retries=2)
    pool = Pool("extraction", section, mortal(), (tmp_path, 2), uses_actors=uses_actors)
    assert sorted(result["number"] for result in run_pool(pool, items)) == list(range(8))
    with pytest.raises(CrossrayError, match=r"resources.extraction: .*max_retries=2"):
        list(run_pool(pool._replace(arguments=(tmp_path, 99)), items))


def test_a_pool_that_may_grow_gives_every_result(ray_cluster: None) -> None:
    """Ray Data lets it grow when its coordinator has seen the cluster, which takes from seconds to minutes."""
    section = ExtractionResources(workers=3, cpus=0.25, min_workers=1)
    pool = Pool("extraction", section, brief(), (), uses_actors=True, min_workers=1)
    results = list(run_pool(pool, [{"number": number} for number in range(40)]))
    assert sorted(result["number"] for result in results) == list(range(40))
    assert 1 <= len({result["pid"] for result in results}) <= 3
