"""Killed in the middle: the next run (or the same one, where only a worker died) ends with the same bytes."""

import os
import signal
from pathlib import Path

import pytest
import torch
from runs import Finished, assert_same, checksums, copied, kill_worker, run_file, start, wait_for
from safetensors.torch import load_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def weights(root: Path) -> dict[str, str]:
    return {name: sums["model.safetensors"] for name, sums in checksums(root, "crosscoder").items()}


@pytest.mark.parametrize("victim", [pytest.param("driver", marks=pytest.mark.rare), "worker"])
def test_a_killed_extraction_continues_to_the_same_bytes(finished: Finished, tmp_path: Path, victim: str) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens")
    path = run_file(tmp_path, str(root), tracking={"kind": "none"})
    folder = root / finished.states["activations"].step.key.folder
    process = start(path)
    wait_for(lambda: len(list(folder.glob("*.safetensors.json"))) >= 1, process)
    if victim == "driver":
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors") if Path(f"{p}.json").exists()}
        assert not (folder / "record.json").exists()
        process = start(path)
        wait_for(lambda: (folder / "record.json").exists(), process)
        assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    else:
        kill_worker(process, "MapWorker")
        wait_for(lambda: (folder / "record.json").exists(), process)
    process.kill()
    process.wait()
    assert_same(root, finished.root, "activations")


@pytest.mark.parametrize("victim", ["driver", pytest.param("worker", marks=pytest.mark.rare)])
def test_a_killed_training_continues_to_the_same_weights(finished: Finished, tmp_path: Path, victim: str) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens", "activations")
    path = run_file(tmp_path, str(root), tracking={"kind": "none"})
    process = start(path)
    wait_for(lambda: any(root.glob("training/*/step-000000020/state.pt")), process)
    if victim == "driver":
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not list(root.glob("crosscoder/*/record.json"))
        process = start(path)
    else:
        kill_worker(process, "RayTrainWorker")
    wait_for(lambda: len(list(root.glob("crosscoder/*/record.json"))) == 2, process)
    process.kill()
    process.wait()
    own = {name: weights(finished.root)[name] for name in weights(root)}
    assert weights(root) == own


@pytest.mark.rare
@pytest.mark.parametrize("mesh", [{"data": 2}, {"latent": 2}], ids=["data", "latent"])
def test_two_ranks_end_where_one_rank_ends(finished: Finished, tmp_path: Path, mesh: dict[str, int]) -> None:
    root = copied(finished, tmp_path, "organism", "corpus", "tokens", "activations")
    path = run_file(tmp_path, str(root), resources={"training": mesh}, tracking={"kind": "none"})
    process = start(path)
    wait_for(lambda: len(list(root.glob("crosscoder/*/record.json"))) == 2, process)
    process.kill()
    process.wait()
    for folder in (path.parent for path in root.glob("crosscoder/*/model.safetensors")):
        own, one = (load_file(place / folder.name / "model.safetensors") for place in (folder.parent, alone(finished)))
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-5, equal_nan=True)


def alone(finished: Finished) -> Path:
    return finished.root / "crosscoder"
