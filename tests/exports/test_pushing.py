"""A crosscoder goes to a hub with its card and comes back; what cannot work is one line before any work."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import COMMIT, Hub, client_environment, serving_hub

import crossray
from pipeline.cli import main


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files = {}
    with serving_hub() as address:
        yield address


def push(hub: str, home: Path, root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "push", "made", *arguments, "--root", str(root)]
    environment = client_environment(hub, home) | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_what_is_pushed_is_loaded_again_by_its_hub_id(hub: str, root: Path, run: crossray.Run, tmp_path: Path) -> None:
    done = push(hub, tmp_path, root, "batch_topk", "new/one")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hub      {hub}/new/one/commit/{COMMIT}\n", "")
    names = {key.removeprefix("new/one/") for key in Hub.files}
    assert names == {"README.md", "config.json", "model.safetensors", "trainer_config.json"}
    card = Hub.files["new/one/README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "crossray"
    assert "crossray.Crosscoder.from_pretrained('new/one')" in card
    code = "import crossray; print(crossray.Crosscoder.from_pretrained('new/one').W_dec_FMD.double().sum().item())"
    read = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=client_environment(hub, tmp_path)
    )
    assert float(read.stdout) == run.crosscoder("batch_topk").W_dec_FMD.double().sum().item(), read.stderr


def test_a_private_repository_is_private_or_refused(hub: str, root: Path, tmp_path: Path) -> None:
    assert push(hub, tmp_path, root, "batch_topk", "new/hidden", "--private").returncode == 0
    assert Hub.created == {"new/hidden": True}
    Hub.files, Hub.public = {}, {"new/known"}
    done = push(hub, tmp_path, root, "batch_topk", "new/known", "--private")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "public" in done.stderr and Hub.files == {}


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (("l1", "new/one"), {}, "expected one of batch_topk"),
        (("batch_topk", "one"), {}, "owner/name"),
        (("batch_topk", "new/o n e"), {}, "owner/name"),
        (("batch_topk", "new/one"), {"HF_TOKEN": ""}, "HF_TOKEN"),
        (("batch_topk", "new/one"), {"HF_TOKEN": "hf_other"}, "expected a token that"),
        (("batch_topk", "new/one"), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        (("batch_topk", "new/one"), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "check the network"),
    ],
)
def test_what_cannot_work_is_one_line_and_nothing_is_made(
    hub: str, root: Path, tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, str], told: str
) -> None:
    done = push(hub, tmp_path, root, *arguments, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert told in done.stderr and "hf_other" not in done.stderr
    assert Hub.files == {} and Hub.created == {}


def test_a_run_that_is_not_there_is_refused_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "nobody", "l1", "new/one", "--root", str(root)]) == 2
    assert "those there: made" in capsys.readouterr().err
