"""Killed in the middle: the next run (or the same one, where only a worker died) ends with the same bytes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    TINY,
    Finished,
    assert_same,
    checksums,
    copied,
    has_checkpoint,
    killing,
    make,
    run_file,
    start,
    wait_for,
)
from safetensors.torch import load_file

from pipeline.config.run_file import RunConfig, load

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BATCH_TOPK = {"crosscoders": TINY["crosscoders"][1:], "tracking": {"kind": "none"}}
"""One crosscoder is enough where all share a process."""


def weights(root: Path) -> dict[str, str]:
    return {name: sums["model.safetensors"] for name, sums in checksums(root, "crosscoder").items()}


def training(finished: Finished, folder: Path, **mesh: Any) -> tuple[Path, RunConfig]:
    """A root with everything that training reads, and a run of one crosscoder."""
    root = copied(finished, folder, "organism", "corpus", "tokens", "activations")
    resources = {"cluster": {"num_cpus": 2}, "training": {"checkpoint_every_steps": 20, **mesh}}
    return root, load(run_file(folder, str(root), resources=resources, **BATCH_TOPK))


def assert_close(root: Path, finished: Finished) -> None:
    """The weights are those of one rank up to rounding."""
    (path,) = root.glob("crosscoder/*/model.safetensors")
    own, one = load_file(path), load_file(finished.root / path.relative_to(root))
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_killed_extraction_worker_changes_no_byte(ray_cluster: None, finished: Finished, tmp_path: Path) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens")
    folder = root / finished.states["activations"].step.key.folder
    with killing("MapWorker", lambda: any(folder.glob("*.safetensors.json"))):
        make(load(run_file(tmp_path, str(root))), "activations")
    assert_same(root, finished.root, "activations")


def test_two_ranks_one_of_them_killed_end_where_one_rank_ends(
    ray_cluster: None, finished: Finished, tmp_path: Path
) -> None:
    root, config = training(finished, tmp_path, data=2)
    with killing("RayTrainWorker", lambda: has_checkpoint(root)):
        make(config, "crosscoder")
    assert_close(root, finished)


@pytest.mark.campaign
def test_a_killed_rank_continues_to_the_same_bytes(ray_cluster: None, finished: Finished, tmp_path: Path) -> None:
    root, config = training(finished, tmp_path)
    with killing("RayTrainWorker", lambda: has_checkpoint(root)):
        make(config, "crosscoder")
    assert weights(root) and weights(root).items() <= weights(finished.root).items()


@pytest.mark.rare
def test_two_latent_ranks_end_where_one_rank_ends(ray_cluster: None, finished: Finished, tmp_path: Path) -> None:
    root, config = training(finished, tmp_path, latent=2)
    make(config, "crosscoder")
    assert_close(root, finished)


@pytest.mark.rare
def test_a_driver_killed_in_extraction_and_in_training_continues_to_the_same_bytes(
    finished: Finished, tmp_path: Path
) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens")
    path = run_file(tmp_path, str(root), tracking={"kind": "none"})
    folder = root / finished.states["activations"].step.key.folder
    process = start(path)
    wait_for(lambda: any(folder.glob("*.safetensors.json")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors") if Path(f"{p}.json").exists()}
    assert not (folder / "record.json").exists()

    process = start(path)
    wait_for(lambda: has_checkpoint(root), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert_same(root, finished.root, "activations")
    assert not list(root.glob("crosscoder/*/record.json"))

    process = start(path)
    wait_for(lambda: len(list(root.glob("crosscoder/*/record.json"))) == 2, process)
    process.kill()
    process.wait()
    assert weights(root).items() <= weights(finished.root).items()
