"""What the campaign calls a difference, and what it finds of a run's processes; the campaign itself is not run here."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from workloads.benchmarks import kill_campaign as campaign


def made(root: Path, *, kl: float = 0.5, weight: float = 1.0, time_ms: int = 1) -> Path:
    """Two artifacts: a table with a NaN and a column of times, and weights."""
    for stage in ("causality", "crosscoder"):
        (root / stage / "abc").mkdir(parents=True)
        (root / stage / "abc" / "record.json").write_text('{"counts": {"last_fve_base": 0.5}}')
    table = pa.table({"kl": [kl, float("nan")], "time_ms": [time_ms, 2]})
    pq.write_table(table, root / "causality" / "abc" / "table.parquet")
    save_file({"w": torch.tensor([weight, float("nan")])}, root / "crosscoder" / "abc" / "model.safetensors")
    return root


def test_only_what_was_computed_counts_as_a_difference(tmp_path: Path) -> None:
    reference = made(tmp_path / "reference")
    same, table, weights = (
        made(tmp_path / name, **changes)  # type: ignore[arg-type]
        for name, changes in (("same", {"time_ms": 7}), ("table", {"kl": 0.6}), ("weights", {"weight": 2.0}))
    )
    assert list(campaign.differences(same, reference, "store")) == []
    assert list(campaign.differences(table, reference, "store")) == ["causality/abc/table.parquet"]
    assert list(campaign.differences(weights, reference, "store")) == ["crosscoder/abc/model.safetensors"]
    assert list(campaign.differences(weights, reference, "stream")) == []  # its rows come in another order
    (weights / "crosscoder" / "abc" / "record.json").write_text('{"counts": {"last_fve_base": 0.4}}')
    assert list(campaign.differences(weights, reference, "stream")) == ["crosscoder/abc/record.json"]
    (same / "causality" / "abc" / "table.parquet").unlink()
    assert list(campaign.differences(same, reference, "store")) == ["causality/abc/table.parquet"]


def test_a_process_of_the_tree_is_killed_and_what_is_left_is_found(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE).wait()"
    process = subprocess.Popen([sys.executable, "-c", child], env={campaign._MARK: "test-mark"})
    try:
        while len(campaign.descendants(process.pid)) < 2:
            assert process.poll() is None
        tree = sorted(campaign.descendants(process.pid))
        while len(campaign.marked("test-mark")) < 2:
            assert process.poll() is None
        assert sorted(campaign.marked("test-mark")) == tree
        (hit,) = campaign.kill_one(process.pid, random.Random(0), tmp_path)
        assert hit["stage"] == "start"
    finally:
        process.kill()
        process.wait()
        for pid in campaign.marked("test-mark"):
            os.kill(pid, signal.SIGKILL)


_WORK = """
import sys, time
from pathlib import Path
for stage in ("tokens", "causality"):  # each is made where it has no record, as a run does
    folder = Path(sys.argv[1]) / "runs" / stage / "abc"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "record.json").exists():
        time.sleep(0.6)
        (folder / "record.json").write_text("{}")
"""


def test_a_killed_run_is_started_again_until_it_ends_and_the_rest_of_a_campaign_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop of the campaign, around a program that takes a second in place of a run."""

    def start(path: Path, mark: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, campaign._MARK: mark}
        return subprocess.Popen([sys.executable, "-c", _WORK, str(path.parent)], env=environment)

    monkeypatch.setattr(campaign, "start", start)
    asked = ["campaign", str(tmp_path), "--kills-per-run", "2", "--mean-seconds", "0.3", "--modes", "store"]
    monkeypatch.setattr(sys, "argv", [*asked, "--kills", "2"])
    campaign.main()
    lines = (tmp_path / "campaign.jsonl").read_text().splitlines()
    found = [campaign.Found(**json.loads(line)) for line in lines]
    assert sum(len(one.kills) for one in found) >= 2
    assert all(one.num_starts == len(one.kills) + 1 for one in found)
    for one in found:
        del one.counts["left shared memory"]  # other tests work on this machine too
        assert set(one.counts.values()) == {0} and one.differing == []
    monkeypatch.setattr(sys, "argv", [*asked, "--kills", str(sum(len(one.kills) for one in found) + 1)])
    campaign.main()
    assert (tmp_path / "campaign.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert "lost rows" in capsys.readouterr().out


def test_the_stage_at_work_is_the_one_without_a_record(tmp_path: Path) -> None:
    assert campaign.stage_of(tmp_path) == "start"
    made(tmp_path)
    assert campaign.stage_of(tmp_path).startswith("after ")
    (tmp_path / "crosscoder" / "abc" / "record.json").unlink()
    assert campaign.stage_of(tmp_path) == "crosscoder"


@pytest.mark.parametrize("mode", campaign.MODES)
def test_its_run_files_are_valid_and_its_table_adds_up(tmp_path: Path, mode: str) -> None:
    from pipeline.config.run_file import load

    assert load(campaign.run_file(tmp_path, mode)).activations.mode == mode
    hits = [{"role": "raylet", "stage": "tokens"}] * 2
    found = [campaign.Found(i, mode, hits, 3, {"lost rows": i, "hung": 1}, []) for i in np.arange(3).tolist()]
    line = next(row for row in campaign.summary(found).splitlines() if row.startswith(f"{mode} "))
    assert line.split() == [mode, "3", "6", "3", "0", "0", "0", "0", "3"]
