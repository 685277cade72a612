"""Several nodes, and the loss of one: the same rows, the same weights, whatever goes away while it is needed."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clusters import Nodes
from runs import Finished, assert_same, checksums, copied, has_checkpoint, run_file, start, wait_for
from safetensors.torch import load_file

TWO_RANKS = {"data": 2, "min_data": 1, "cpus": 0.5}
pytestmark = [pytest.mark.ray, pytest.mark.rare]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """A head without CPUs, for the driver, and two nodes with one CPU each."""
    cluster = Nodes(tmp_path, head_cpus=0)
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.close()


def begun(nodes: Nodes, folder: Path, **changes: Any) -> tuple[Path, subprocess.Popen[str]]:
    """The storage root and the driver of the tiny run on the cluster."""
    root = folder / "runs"
    training = {"checkpoint_every_steps": 20, **changes.pop("training", {})}
    resources = {"cluster": {"address": f"127.0.0.1:{nodes.gcs}"}, "training": training}
    path = run_file(folder, str(root), resources=resources, tracking={"kind": "none"}, **changes)
    return root, start(path, RAY_AUTH_MODE="disabled")


@pytest.mark.parametrize(
    ("pattern", "title"),
    [
        ("activations/*/*.safetensors.json", "MapWorker"),
        pytest.param("training/*/step-000000020/state.pt", "RayTrainWorker", marks=pytest.mark.campaign),
    ],
    ids=["extraction", "training"],
)
def test_a_node_lost_at_work_changes_nothing(
    nodes: Nodes, finished: Finished, tmp_path: Path, pattern: str, title: str
) -> None:
    stages = ("organism", "corpus", "tokens")
    copied(finished, tmp_path, *stages, *(["activations"] if title == "RayTrainWorker" else []))
    root, process = begun(nodes, tmp_path)
    wait_for(lambda: any(root.glob(pattern)), process)
    found = nodes.with_process(title)
    assert found, f"no node runs {title}"
    nodes.kill_node(found[0])
    wait_for(lambda: len(list(root.glob("crosscoder/*/record.json"))) == 2, process)
    weights = {name: sums["model.safetensors"] for name, sums in checksums(root, "crosscoder").items()}
    expected = {name: sums["model.safetensors"] for name, sums in checksums(finished.root, "crosscoder").items()}
    assert weights and weights.items() <= expected.items()
    assert_same(root, finished.root, "activations")
    process.kill()
    process.wait()


def test_training_goes_on_with_the_ranks_that_are_left(nodes: Nodes, finished: Finished, tmp_path: Path) -> None:
    """Two data ranks, one of which is lost with its node: one rank ends where one rank always ends, up to rounding."""
    copied(finished, tmp_path, "organism", "corpus", "tokens", "activations")
    root, process = begun(nodes, tmp_path, training=TWO_RANKS)
    wait_for(lambda: has_checkpoint(root), process)
    nodes.kill_node(2)
    wait_for(lambda: len(list(root.glob("crosscoder/*/record.json"))) == 2, process)
    process.kill()
    process.wait()
    for path in root.glob("crosscoder/*/model.safetensors"):
        own, one = load_file(path), load_file(finished.root / "crosscoder" / path.parent.name / path.name)
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-5, equal_nan=True)
