"""A finished run is recognised from its records alone: without torch, Ray, pandas or a tracker."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import contents, environment, run_file

from pipeline.config.run_file import load
from pipeline.run.flow import build_flow
from pipeline.storage.artifacts import write_record
from pipeline.storage.filesystem import Storage

WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "ray", "transformers", "mlflow", "pandas", "pyarrow", "numpy"}:
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocked())
from pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""
COUNTS = {
    "tokens": {"num_tokens": 12_345, "num_documents": 300, "tokens": {"a/train": 12_345}, "dialogue_corpora": []},
    "activations": {"num_rows": 12_000, "num_bytes": 7_000_000},
}


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run file all of whose steps have records and nothing else."""
    path = run_file(tmp_path, str(tmp_path / "runs"))
    storage = Storage(str(tmp_path / "runs"))
    flow = build_flow(load(path))
    storage.write_bytes(f"{flow.report.folder}/verdict.txt", b"the verdict")
    for step in flow.steps:
        counts = COUNTS.get(step.key.stage, {})
        write_record(storage, step.key, name=step.name, counts=counts, seconds=1.0, run_name="tiny")
    return path


def without_libraries(command: str, path: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", WITHOUT, command, str(path)]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=path.parent, env=environment())


def test_a_finished_run_is_found_done_without_loading_a_library(recorded: Path) -> None:
    before = contents(recorded.parent / "runs")
    done = without_libraries("run", recorded)
    assert done.returncode == 0, done.stderr
    assert "the verdict" in done.stdout
    assert contents(recorded.parent / "runs") == before


def test_a_plan_of_a_finished_run_tells_its_sizes_from_the_records(recorded: Path) -> None:
    done = without_libraries("plan", recorded)
    assert done.returncode == 0, done.stderr
    states = [line.split()[0] for line in done.stdout.splitlines()[1:] if line.split()]
    assert states[:20] == ["done"] * 20 and "estimate" in states[20:] and "missing" not in states
    assert {"12,345", "12,000", "7.0"} <= set(done.stdout.split())
