"""Pushing to a hub and loading from it, against a local HTTP server that keeps files as the hub does.

The client runs in a process of its own, because the hub's address and cache are read when its library is imported.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabricated import F, topk_tensors, write, write_scaled
from hub_server import COMMIT, Hub, client_environment, serving_hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    write(tmp_path / "theirs", topk_tensors(), {"dict_class": "BatchTopKCrossCoder"})
    write_scaled(tmp_path / "scaled")
    Hub.files = {
        "them/topk/model.safetensors": (tmp_path / "theirs" / "model.safetensors").read_bytes(),
        "them/topk/config.json": (tmp_path / "theirs" / "config.json").read_bytes(),
        "them/topk/README.md": b"# a crosscoder",
        "them/scaled/blocks.14/cc_weights.pt": (tmp_path / "scaled" / "cc_weights.pt").read_bytes(),
        "them/scaled/blocks.14/cfg.json": (tmp_path / "scaled" / "cfg.json").read_bytes(),
    }
    with serving_hub() as address:
        yield address


def run_client(hub: str, home: Path, code: str, *, is_offline: bool = False) -> str:
    environment = client_environment(hub, home) | {"HF_HUB_OFFLINE": "1" if is_offline else "0"}
    code = "from pipeline.errors import InputError\nfrom pipeline.numerics.crosscoder import Crosscoder\n" + code
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_load_push_load_again_and_load_offline(hub: str, tmp_path: Path) -> None:
    online = """
theirs = Crosscoder.from_pretrained("them/topk")
print(theirs.push_to_hub("new/one"))
ours = Crosscoder.from_pretrained("new/one")
assert ours.W_dec_FMD.equal(theirs.W_dec_FMD) and ours.threshold == theirs.threshold == 1.5 and ours.k == 3
scaled = Crosscoder.from_pretrained("them/scaled")
assert scaled.W_dec_FMD.equal(Crosscoder.from_pretrained("them/scaled/blocks.14").W_dec_FMD)
try:
    Crosscoder.from_pretrained("them/absent")
except InputError as error:
    print(error)
"""
    address, error = run_client(hub, tmp_path / "home", online).splitlines()
    assert address == f"{hub}/new/one/commit/{COMMIT}"
    assert "expected a crosscoder at the hub id them/absent (revision main), came RepositoryNotFoundError" in error
    assert {key for key in Hub.files if key.startswith("new/")} == {
        "new/one/model.safetensors",
        "new/one/config.json",
    }
    offline = """
print(Crosscoder.from_pretrained("them/topk").num_latents)
try:
    Crosscoder.from_pretrained("them/never-loaded")
except InputError as error:
    print(error)
"""
    num_latents, error = run_client(hub, tmp_path / "home", offline, is_offline=True).splitlines()
    assert int(num_latents) == F
    assert "expected a crosscoder at the hub id them/never-loaded" in error
