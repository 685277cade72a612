"""Nothing that holds a secret is recorded, shown, or packed into a job: looked for with canaries."""

import logging
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import TINY, command, run_file

from pipeline.cluster.job_package import check_environment
from pipeline.cluster.jobs import pack
from pipeline.config.resources import TrackingSection
from pipeline.config.run_file import load
from pipeline.errors import CrossrayError, InputError, is_secret_name, redacted
from pipeline.models.endpoint import read_key
from pipeline.run.flow import build_flow
from pipeline.storage.artifacts import write_record
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Console
from pipeline.tracking.choose import make_tracker
from pipeline.tracking.log_file import run_logging
from pipeline.tracking.run_log import RunLog

CANARY = "canary4711xyzzy"
URLS = [
    f"postgresql://me:{CANARY}@host/db",
    f"postgresql+psycopg://me:a/b@{CANARY}@host:5432/db",
    f"https://{CANARY}@host/x",
    f"s3://AKIA:{CANARY}@bucket/prefix",
    f"simplecache::s3://key:{CANARY}@bucket/x",
    f"https://bucket.host/x.jsonl?X-Amz-Expires=60&X-Amz-Signature={CANARY}",
    f"https://account.host/container/x?sv=2024&sig={CANARY}",
    f"https://host/x?access_token={CANARY}",
    f"mysql://host/db?password={CANARY}",
]
PLAIN = [
    "s3://bucket/run@2/x",
    "http://localhost:5000/path@x",
    "postgresql://me@host/db",
    "sqlite:////tmp/mlflow.db",
    "https://host/x.jsonl?part=3&split=train",
    "mail me@example.org: 3",
    "org/model@v1",
]


@pytest.fixture(autouse=True)
def _in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", CANARY)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", ["tracking.uri", "storage.root", "models.chat.source", "corpus.sources.mine.paths"])
def test_an_address_with_credentials_is_refused_wherever_it_would_be_recorded(
    key: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_SERVICE_API_KEY")
    changes: dict[str, Any] = {
        "tracking.uri": {"tracking": {"uri": url}},
        "storage.root": {"storage": {"root": url}},
        "models.chat.source": {"models": {**TINY["models"], "chat": {"source": url}}},
        "corpus.sources.mine.paths": {
            "corpus": {"sources": [{"name": "mine", "kind": "text", "paths": ["a", url]}]},
        },
    }[key]
    root = changes.pop("storage", {"root": str(tmp_path / "runs")})["root"]
    with pytest.raises(InputError) as caught:
        load(run_file(tmp_path, root, **changes))
    told = "".join(traceback.format_exception(caught.value))
    assert key.split(".")[-1] in str(caught.value) and CANARY not in told
    with pytest.raises(InputError) as caught:
        Storage(url)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("text", PLAIN)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text


def test_a_fault_elsewhere_does_not_quote_a_secret(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(run_file(tmp_path, "runs", tracking=f"https://me:{CANARY}@host"))
    assert "tracking" in str(caught.value) and CANARY not in str(caught.value)


@pytest.mark.parametrize("key", [f"{CANARY}\nx", f"{CANARY}\0", f"\ufeff{CANARY}", f"{CANARY}\u00e9", f"a {CANARY}"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"SOME_KEY": key})  # a real environment holds no NUL
    with pytest.raises(InputError, match=r"api_key_env.*SOME_KEY") as caught:
        read_key("SOME_KEY")
    assert CANARY not in str(caught.value)


def test_a_key_is_read_without_the_line_break_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", f"{CANARY}\n")
    assert read_key("SOME_KEY") == CANARY


@pytest.mark.parametrize(
    "name",
    [
        "DATABASE_URL",
        "PGPASS",
        "PGPASSWORD",
        "BASIC_AUTH",
        "APP_JWT",
        "COOKIE",
        "AZURE_SAS",
        "apiKey",
        "HF_TOKEN",
        "DB_PWD",
    ],
)
def test_a_variable_named_like_a_secret_travels_with_no_job(name: str) -> None:
    assert is_secret_name(name)
    with pytest.raises(InputError, match=rf"--env: .*{name}"):
        check_environment({"OMP_NUM_THREADS": "2", name: "x"})


@pytest.mark.parametrize("value", [*URLS, CANARY, "hf_" + "a" * 30, "sk-" + "b" * 40, "Bearer " + "c" * 20])
def test_a_value_that_is_a_secret_travels_with_no_job(value: str) -> None:
    with pytest.raises(InputError, match=r"--env: .*PLAIN") as caught:
        check_environment({"PLAIN": value})
    assert CANARY not in str(caught.value)


def test_plain_settings_travel() -> None:
    names = ["TOKENIZERS_PARALLELISM", "AUTHOR", "KEYBOARD", "MAX_NEW_TOKENS", "PWD", "PATH", "AWS_ENDPOINT_URL"]
    check_environment({**dict.fromkeys(names, "1"), "AWS_ENDPOINT_URL": "http://store:9000"})


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model's folder with much beside it that is none of a job's business."""
    folder = tmp_path / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "sub/cfg.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    for name in (
        ".env",
        ".git/config",
        ".cache/x.json",
        "runs/tokens/ab/record.json",
        "notes.md",
        "id_rsa",
        "x.parquet",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CANARY)
    return folder


def packed(tmp_path: Path, model: Path) -> dict[str, bytes]:
    models = {**TINY["models"], "chat": {"source": str(model)}}
    config = load(run_file(tmp_path, "s3://bucket/runs", models=models, tracking={"uri": "http://mlflow:5000"}))
    (tmp_path / "job").mkdir()
    sizes = pack(config, tmp_path / "job")
    files = {str(p.relative_to(tmp_path / "job")): p.read_bytes() for p in (tmp_path / "job").rglob("*") if p.is_file()}
    assert sum(own.num_bytes for own in sizes) == sum(len(data) for name, data in files.items() if name != "run.yaml")
    return files


def test_a_job_holds_what_it_needs_and_nothing_else(tmp_path: Path, model_folder: Path) -> None:
    stray = Path(__file__).parent.parent / "pipeline" / ".env"
    try:
        stray.write_text(CANARY)
        files = packed(tmp_path, model_folder)
    finally:
        stray.unlink()
    assert not [name for name, data in files.items() if CANARY.encode() in data]
    mine = {name.split("-model/")[1] for name in files if name.startswith("files/")}
    assert mine == {"config.json", "model.safetensors", "tokenizer.json", "sub/cfg.json"}
    assert {"pipeline/cli.py", "pipeline/report/templates/report.html", "run.yaml"} <= files.keys()
    assert not [name for name in files if "__pycache__" in name]


@pytest.mark.parametrize("kind", ["out", "dangling", "loop", "folder"])
def test_a_link_that_leads_out_is_refused(kind: str, tmp_path: Path, model_folder: Path) -> None:
    link = model_folder / "extra.json"
    (tmp_path / "secret.json").write_text(CANARY)
    link.symlink_to({"out": tmp_path / "secret.json", "dangling": "nothing", "loop": link, "folder": tmp_path}[kind])
    with pytest.raises(InputError, match=r"source: .*extra\.json"):
        packed(tmp_path, model_folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "ffff"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_text("the weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert b"the weights" in packed(tmp_path, snapshot).values()


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[Path]:
    """A root with the log file and MLflow database of a run whose faults name a secret in many ways."""
    root = tmp_path / "runs"
    config, storage = load(run_file(tmp_path, str(root))), Storage(str(root))
    with (tmp_path / "terminal").open("w") as file, run_logging(storage, "tiny", lambda _: None):
        console = Console(file)
        flow = build_flow(config)
        log = RunLog(make_tracker(TrackingSection(), storage), config, storage, flow)
        step = flow.steps[0]
        log.finished(
            step,
            write_record(storage, step.key, name=step.name, counts={}, seconds=1.0, run_name="tiny"),
            reused=False,
        )
        for url in URLS:
            console.message(f"a message with {url}")
            logging.getLogger("pipeline.storage").warning("a warning with %s", url)
        logging.getLogger("pipeline.storage").error("a key: %s", CANARY, exc_info=CrossrayError(f"got {CANARY}"))
        log.close(succeeded=True)
    yield root


def test_no_secret_is_in_storage_in_mlflow_or_in_a_log(tracked: Path) -> None:
    files = [path for path in tracked.parent.rglob("*") if path.is_file()]
    assert {"mlflow.db", "record.json", "run.json"} <= {path.name for path in files}
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_no_secret_is_on_the_terminal(tmp_path: Path) -> None:
    path = run_file(tmp_path, str(tmp_path / "runs"), tracking={"uri": f"postgresql://me:{CANARY}@host/db"})
    done = command("plan", str(path), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "tracking.uri" in done.stderr
    assert CANARY not in done.stdout + done.stderr
