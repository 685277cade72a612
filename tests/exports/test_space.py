"""The folder of a Space: it starts by itself, with its own code, and shows the run."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import HOSTILE
from hub_server import Hub, client_environment, serving_hub
from packaging.requirements import Requirement
from servers import free_port

import crossray
from pipeline.explorer import sample
from pipeline.exports import space
from pipeline.exports.forms import export
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(run: crossray.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, "batch_topk", tmp_path_factory.mktemp("spaces") / "space", form="space")


def started(folder: Path, **variables: str) -> tuple[subprocess.Popen[str], str]:
    """The Space's process, without what its requirements leave out, and its address."""
    block = folder.parent / "blocked"
    block.mkdir(exist_ok=True)
    names = sorted(space._UNUSED - {"requests", "aiohttp"})  # which other packages use where they are there
    for name in names:
        (block / f"{name.replace('-', '_')}.py").write_text(f"raise ImportError('{name}', name='{name}')\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder.parent), "PYTHONPATH": str(block)} | variables
    environment |= {
        "PYTHONDONTWRITEBYTECODE": "1",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(free_port()),
    }
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, f"http://127.0.0.1:{environment['GRADIO_SERVER_PORT']}/"


def page(process: subprocess.Popen[str], address: str) -> str:
    """The first page; the process ends afterwards."""
    try:
        for _ in range(600):
            assert process.poll() is None, process.communicate()[1]
            try:
                with urllib.request.urlopen(address, timeout=60) as answer:
                    return str(answer.read().decode())
            except OSError:
                time.sleep(0.2)
        pytest.fail("the Space did not answer")
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
def test_it_starts_with_its_own_code_and_shows_the_run(folder: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    shown = page(*started(folder, SPACE_ID="new/space"))
    assert "made, crossray" in shown and "organisation/base" in shown and "batch_topk" in shown
    assert "/home/me" not in shown
    code = "import crossray, pipeline; print(pipeline.__path__[0], crossray.__file__)"
    quiet = {"PYTHONDONTWRITEBYTECODE": "1"}
    told = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=quiet)
    assert told.stdout.split() == [str(folder / "pipeline"), str(folder / "crossray" / "__init__.py")]


@pytest.mark.slow
def test_with_the_secret_it_asks_for_it(folder: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    shown = page(*started(folder, SPACE_ID="new/space", CROSSRAY_EXPLORE_TOKEN="0123456789abcdef"))
    assert "auth_required" in shown and "organisation/base" not in shown and "0123456789abcdef" not in shown


def test_it_holds_one_crosscoder_its_tables_and_validation_rows(
    folder: Path, run: crossray.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = crossray.open(folder / "runs", "made")
    assert copy.crosscoders == ("batch_topk",) and copy.labels == ("organisation/base", "chat")
    assert copy.latents("batch_topk").equals(run.latents("batch_topk"))
    assert copy.crosscoder("batch_topk").W_dec_FMD.equal(run.crosscoder("batch_topk").W_dec_FMD)
    assert copy.rows("validation").x.equal(run.rows("validation").x)
    assert not list((folder / "runs").rglob("train-*")) and not list((folder / "runs" / "tokens").rglob("*.parquet"))
    assert not [path for path in folder.rglob("*") if path.name == "__pycache__" or path.name.startswith(".")]
    assert "/home/me" not in "".join(path.read_text() for path in folder.rglob("*.json"))


def test_no_more_rows_travel_than_the_explorer_reads(
    run: crossray.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert space.MAX_ROWS == sample.MAX_ROWS
    monkeypatch.setattr(space, "MAX_ROWS", 0)
    copy = crossray.open(export(run, "batch_topk", tmp_path / "space", form="space") / "runs", "made")
    assert ActivationStore(copy.storage, copy.artifacts()["activations"]).manifest.shards == ()


def test_its_settings_are_those_of_the_hub(folder: Path) -> None:
    head = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert (head["sdk"], head["app_file"], head["title"]) == ("gradio", "app.py", "batch_topk of made")
    pins = (ROOT / "constraints.txt").read_text()
    assert f"gradio=={head['sdk_version']}" in pins
    lines = (folder / "requirements.txt").read_text().splitlines()
    wanted = {Requirement(line).name: Requirement(line) for line in lines if not line.startswith("--")}
    assert {"torch", "transformers", "pandas", "gradio"} <= set(wanted) and not {"ray", "mlflow"} & set(wanted)
    assert head["sdk_version"] in wanted["gradio"].specifier


def test_models_of_the_hub_are_loaded_as_the_run_loaded_them_where_that_is_asked_for(
    write_run: Any, tmp_path: Path
) -> None:
    write_run(str(tmp_path / "runs"))
    for path in (tmp_path / "runs").glob("activations/*/record.json"):
        record = json.loads(path.read_text())
        models = {"base": {"source": "a/b", "source_revision": "main", "token_replacements": [[1, 2]]}}
        models["chat"] = {"source": "a/c", "source_revision": None}
        record["identity"]["section"] |= {"models": models, "drop_bos": True, "rows": {"keep": [], "leave_out": []}}
        path.write_text(json.dumps(record))
    folder = export(crossray.open(tmp_path / "runs", "made"), "batch_topk", tmp_path / "space", form="space")
    program = (folder / "app.py").read_text()
    loaded: dict[str, Any] = {}
    fake = type("crossray", (), {"open": lambda *_: "run", "explore": lambda *_, **own: loaded.update(own) or _Ended})
    fake.ModelSpec, fake.load_pair = crossray.ModelSpec, lambda *models, **own: (models, own)  # type: ignore[attr-defined]
    lines = program.replace("import crossray\n", "")
    for asked, place in (("", {}), ("1", {"SPACE_ID": "new/space"})):
        environ = {space.MODELS_VARIABLE: asked, **place}
        exec(
            compile(lines.replace("import os\n", ""), "app.py", "exec"),
            {"crossray": fake, "os": type("os", (), {"environ": environ}), "__file__": str(folder / "app.py")},
        )
        assert (loaded["pair"] is None) == (not asked)
        assert (loaded["host"], loaded["without_token"]) == ("0.0.0.0" if place else "127.0.0.1", bool(place))
    (base, chat), own = loaded["pair"]
    assert base == crossray.ModelSpec("a/b", "main", token_replacements=((1, 2),)) and chat == crossray.ModelSpec("a/c")
    assert own == {"layer": 1, "drop_bos": True, "rows": {"keep": [], "leave_out": []}}


class _Ended:
    url = ""
    made_token = None
    wait = staticmethod(lambda: None)


def test_names_that_hold_anything_stay_text(write_run: Any, tmp_path: Path) -> None:
    write_run(str(tmp_path / "runs"), name=HOSTILE, labels=(HOSTILE, HOSTILE))
    folder = export(crossray.open(tmp_path / "runs", HOSTILE), "batch_topk", tmp_path / "space", form="space")
    compile((folder / "app.py").read_text(), "app.py", "exec")
    assert repr(HOSTILE) in (folder / "app.py").read_text()
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["sdk"] == "gradio" and "<script>" not in text.replace("\\<script\\>", "")
    assert crossray.open(str(Storage(str(folder / "runs")).root), HOSTILE).name == HOSTILE


def test_push_makes_a_space(root: Path, tmp_path: Path) -> None:
    Hub.files = {}
    with serving_hub() as hub:
        command = [*(sys.executable, "-m", "pipeline", "push", "made", "batch_topk", "new/space"), "--space"]
        done = subprocess.run(
            [*command, "--root", str(root)], capture_output=True, text=True, env=client_environment(hub, tmp_path)
        )
        assert done.returncode == 0 and "/commit/" in done.stdout, done.stderr
        assert {"new/space/app.py", "new/space/README.md", "new/space/crossray/__init__.py"} <= set(Hub.files)
        assert Hub.kinds == {"new/space": "space"}
