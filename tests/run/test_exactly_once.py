"""Every kept token is one row, whatever is killed during extraction: disturbed runs end with the undisturbed bytes."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from runs import Finished, checksums, command_line, copied, descendants, make, run_file, start, wait_for

from pipeline.config.run_file import load
from pipeline.schema import Flag
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage

pytestmark = [pytest.mark.ray, pytest.mark.campaign, pytest.mark.timeout(1200)]

NUM_KILLS = 8
NUM_DRIVER_KILLS = 1
SMALL_SHARDS = {
    "activations": {"layer": 1, "rows_per_shard": 200},
    "resources": {"cluster": {"num_cpus": 2}, "extraction": {"workers": 2, "max_retries": NUM_KILLS}},
    "tracking": {"kind": "none"},
}


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    root = copied(finished, folder, "organism", "corpus", "tokens")
    make(load(run_file(folder, str(root), **SMALL_SHARDS)), "activations")
    return root


def kept_tokens(finished: Finished) -> set[tuple[int, int]]:
    """(doc_id, position) of every token but BOS, from the tokens alone."""
    tokens = finished.root / finished.states["tokens"].step.key.folder
    index = pd.read_parquet(tokens / "index.parquet")
    parts = {name: pd.read_parquet(tokens / name) for name in index["part"].unique()}
    kept: set[tuple[int, int]] = set()
    for row in index.itertuples():
        flags = parts[str(row.part)].iloc[int(row.row)]["flags"]  # type: ignore[arg-type]
        kept |= {(int(row.doc_id), p) for p, bits in enumerate(flags) if not bits & Flag.BOS}  # type: ignore[arg-type]
    return kept


def assert_exactly_once(root: Path, finished: Finished) -> None:
    (folder,) = (path.parent for path in root.glob("activations/*/record.json"))
    store = ActivationStore(Storage(str(root)), f"activations/{folder.name}")
    found: list[tuple[int, int]] = []
    for shard in store.manifest.shards:
        rows = store.read(shard)
        found += zip(rows.doc_id_B.tolist(), rows.position_B.tolist(), strict=True)
    assert len(found) == len(set(found))
    assert set(found) == kept_tokens(finished)


def num_shards(root: Path) -> int:
    return len(list(root.glob("activations/*/*.safetensors.json")))


def is_done(root: Path) -> bool:
    return any(root.glob("activations/*/record.json"))


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_an_undisturbed_run_has_every_row_once(undisturbed: Path, finished: Finished) -> None:
    assert num_shards(undisturbed) > 3 * NUM_KILLS
    assert_exactly_once(undisturbed, finished)


def test_killed_actors_change_nothing(undisturbed: Path, finished: Finished, tmp_path: Path) -> None:
    """Each kill waits for a random number of shards since the last and a random time, so that it hits mid-work."""
    chance = random.Random(0)
    root = copied(finished, tmp_path, "organism", "corpus", "tokens")
    process = start(run_file(tmp_path, str(root), **SMALL_SHARDS))
    killed = 0
    while killed < NUM_KILLS:
        target = num_shards(root) + chance.randint(0, 2)
        wait_for(lambda target=target: num_shards(root) >= target, process)  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 0.3))
        victims = [pid for pid in descendants(process.pid) if "MapWorker" in command_line(pid)]
        if victims:
            os.kill(chance.choice(sorted(victims)), signal.SIGKILL)
            killed += 1
        assert not is_done(root), f"extraction ended after {killed} kills"
        if not victims:
            time.sleep(0.05)
    wait_for(lambda: is_done(root), process)
    end(process)
    assert_exactly_once(root, finished)
    assert checksums(root, "activations") == checksums(undisturbed, "activations")


def test_a_killed_driver_changes_nothing(undisturbed: Path, finished: Finished, tmp_path: Path) -> None:
    chance = random.Random(1)
    root = copied(finished, tmp_path, "organism", "corpus", "tokens")
    path = run_file(tmp_path, str(root), **SMALL_SHARDS)
    for _ in range(NUM_DRIVER_KILLS):
        target = num_shards(root) + chance.randint(1, 15)
        process = start(path)
        wait_for(lambda target=target: num_shards(root) >= target, process)  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 0.2))
        end(process)
        assert not is_done(root)
    process = start(path)
    wait_for(lambda: is_done(root), process)
    end(process)
    assert_exactly_once(root, finished)
    assert checksums(root, "activations") == checksums(undisturbed, "activations")
