"""A compressed store in the whole flow: extraction packs it, the trainer reads it, verify reads it."""

from pathlib import Path

import pytest
from runs import Finished, copied, make, run_file

from pipeline.config.run_file import load
from pipeline.run.verify import verify
from pipeline.storage.artifacts import all_folders
from pipeline.storage.filesystem import Storage
from pipeline.terminal import SilentReporter


@pytest.mark.rare
@pytest.mark.ray
@pytest.mark.parametrize(("kind", "size"), [("lossless", 0.9), pytest.param("int8", 0.7, marks=pytest.mark.campaign)])
def test_a_compressed_store_trains_the_same_crosscoder(
    ray_cluster: None, finished: Finished, tmp_path: Path, kind: str, size: float
) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens")
    section = {"layer": 1, "rows_per_shard": 2000, "compression": kind}
    records = make(load(run_file(tmp_path, str(root), activations=section)), "activations", "crosscoder")
    plain = {name: finished.states[name].record for name in ("activations", "crosscoder l1")}
    assert plain["activations"] is not None
    assert plain["crosscoder l1"] is not None
    assert records["activations"].counts["num_bytes"] < size * plain["activations"].counts["num_bytes"]
    found, expected = (record.counts["last_fve"] for record in (records["crosscoder"], plain["crosscoder l1"]))
    assert found == pytest.approx(expected, abs=1e-6 if kind == "lossless" else 0.01)
    storage = Storage(str(root))
    assert verify(storage, all_folders(storage), SilentReporter()).faults == ()
