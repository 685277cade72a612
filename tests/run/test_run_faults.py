"""A whole run on an object store that answers 503, waits and cuts connections: the same numbers, no fault found."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import s3fs
from proxy import Faults, misbehaving
from runs import TINY, Finished, environment, run_file

from pipeline.storage.filesystem import Storage

FAULTS = Faults(busy_every=13, slow_every=17, slow_seconds=0.3, cut_every=19)
"""No two of them are due together for the first 220 requests."""


def crossray(*arguments: str, variables: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**environment(), **variables})


@pytest.mark.rare
@pytest.mark.ray
@pytest.mark.s3
def test_a_whole_run_ends_the_same_on_a_store_that_misbehaves(
    finished: Finished,
    services: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    analyses = {**TINY["analyses"], "causality": None, "steering": None, "evidence": None}
    path = run_file(tmp_path, "s3://crossray/misbehaving", analyses=analyses, tracking={"kind": "none"})
    with misbehaving(services["AWS_ENDPOINT_URL"], FAULTS) as url:
        variables = {**services, "AWS_ENDPOINT_URL": url}
        done = crossray("run", str(path), variables=variables, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        checked = crossray("verify", str(path), variables=variables, cwd=tmp_path)
    assert checked.returncode == 0 and ": 0 faults" in checked.stdout, checked.stdout + checked.stderr
    record_property("requests", len(FAULTS.seen))
    for fault in ("503 GET", "503 PUT", "cut GET", "cut PUT"):
        record_property(fault, FAULTS.seen.count(fault))
        assert fault in FAULTS.seen

    for name, value in services.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # another test's credentials
    own = Storage("s3://crossray/misbehaving")
    for state in finished.states.values():
        if state.step.key.stage not in ("organism", "corpus", "tokens", "activations", "crosscoder"):
            continue
        folder = state.step.key.folder
        assert own.exists(f"{folder}/record.json")
        if state.step.key.stage in ("corpus", "tokens", "activations"):
            _check_equal_files(own, finished.storage, folder)
        for file in (finished.root / folder).rglob("*.parquet"):
            if file.name == "curves.parquet":
                continue  # it holds times
            table = pd.read_parquet(f"{own.url(folder)}/{file.relative_to(finished.root / folder)}")
            pd.testing.assert_frame_equal(table, pd.read_parquet(file), rtol=1e-9, obj=f"{folder}/{file.name}")
    assert not own.folders("training")  # checkpoints go when what they are for is published


def _check_equal_files(own: Storage, other: Storage, folder: str) -> None:
    ours, theirs = (json.loads(one.read_bytes(f"{folder}/record.json"))["checksums"] for one in (own, other))
    assert ours == theirs, folder
