"""The promises of SECURITY.md that are properties of the code and of what a run leaves behind."""

import ast
import base64
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import BaseModel
from runs import Finished, command

from pipeline.cluster.connect import use_token
from pipeline.config.faults import sections_in
from pipeline.config.run_file import RunConfig
from pipeline.errors import InputError
from pipeline.tracking.mlflow_tracker import MlflowTracker

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "pipeline").rglob("*.py"))


def sections(owner: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if owner in seen:
        return
    seen.add(owner)
    yield owner
    for field in owner.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections(inner, seen)


def test_no_key_of_a_run_file_holds_a_secret() -> None:
    """A key may name the environment variable that holds one (`..._env`)."""
    names = [name for section in sections(RunConfig, set()) for name in section.model_fields]
    assert len(names) > 100
    looks_secret = re.compile(r"password|secret|credential|api_?key|access_?key|auth|token$")
    assert not [name for name in names if looks_secret.search(name) and not name.endswith("_env")]


@pytest.mark.ray
def test_a_run_leaves_no_secret_behind(finished: Finished) -> None:
    """conftest sets HF_TOKEN before the run; nothing that was written or tracked may hold it."""
    secret = os.environ["HF_TOKEN"].encode()
    files = [path for path in finished.root.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not [path for path in files if secret in path.read_bytes()]
    told = repr(finished.tracker.runs).encode()
    assert b"crossray.fingerprint" in told and secret not in told


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_from_storage_is_unpickled(path: Path) -> None:
    """pickle serves messages between the processes of one run alone; torch.load reads tensors alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"):
            assert path.relative_to(ROOT) == Path("pipeline/cluster/pools.py"), f"line {node.lineno}"
        if ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", f"line {node.lineno}"


def test_remote_code_is_off_by_default() -> None:
    for section in sections(RunConfig, set()):
        if "trust_remote_code" in section.model_fields:
            assert section.model_fields["trust_remote_code"].default is False


@pytest.fixture
def shown() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that refuses everything, and the credentials that it was shown."""
    credentials: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            credentials.append(self.headers.get("Authorization", ""))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = refuse

        def log_message(self, *arguments: object) -> None:
            """In silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", credentials
    server.shutdown()
    server.server_close()
    thread.join()


def test_rays_token_is_shown_to_the_cluster(
    shown: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, credentials = shown
    token = "f" * 40
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    done = command("status", "--address", address, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert set(credentials) == {f"Bearer {token}"}
    assert token not in done.stdout + done.stderr


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home", "nowhere"])
def test_rays_token_is_found_where_ray_looks_for_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")  # restores it afterwards, whatever use_token does
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    if place == "home":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("t")
    elif place != "nowhere":
        monkeypatch.setenv(place, "t")
    use_token()
    assert os.environ.get("RAY_AUTH_MODE") == (None if place == "nowhere" else "token")


def test_mlflows_credentials_are_shown_to_its_server(
    shown: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, credentials = shown
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "word")
    with pytest.raises(InputError, match=r"tracking\.uri") as caught:
        MlflowTracker(address, "crossray", None)
    assert f"Basic {base64.b64encode(b'me:word').decode()}" in credentials
    assert "word" not in str(caught.value)
