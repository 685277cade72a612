"""An object store that is busy, slow, cut off, closed to us or not there: work completes, or one line says why not."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from proxy import Faults, misbehaving
from roots import Root
from runs import run_file
from servers import free_port

from pipeline.cli import main
from pipeline.errors import InputError
from pipeline.storage import faults as storage_faults
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.row_order import TrainingRows

pytestmark = pytest.mark.s3

Behind = Callable[[Faults], AbstractContextManager[Storage]]


@pytest.fixture
def behind(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behind:
    """A storage on the session's object store, reached through a proxy with these faults."""

    upstream = os.environ["AWS_ENDPOINT_URL"]

    @contextmanager
    def make(faults: Faults) -> Iterator[Storage]:
        with misbehaving(upstream, faults) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            yield fresh(f"{s3_root}/{tmp_path.name}")

    return make


def fresh(root: str) -> Storage:
    """A storage whose client has not been made yet: clients keep the address that they were made with."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    return Storage(root)


@pytest.fixture(autouse=True)
def _forget_clients() -> Iterator[None]:
    yield
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def exercise(storage: Storage) -> None:
    """Every operation, with its result."""
    content = bytes(range(256)) * 40
    for number in range(4):
        storage.write_bytes(f"a/{number}.bin", content)
    assert storage.files("a") == [f"{number}.bin" for number in range(4)]
    assert storage.size("a/2.bin") == len(content)
    assert all(storage.read_bytes(f"a/{number}.bin") == content for number in range(4))
    assert storage.folders("") == ["a"]
    with storage.local_folder("a") as folder:
        assert sorted(path.name for path in folder.iterdir()) == storage.files("a")
    storage.delete("a")
    assert not storage.exists("a")


@pytest.mark.rare
@pytest.mark.parametrize(
    "faults",
    [
        Faults(busy_every=3),
        Faults(slow_every=4, slow_seconds=0.3),
        Faults(cut_uploads=3, cut_downloads=3),
    ],
    ids=["503", "slow", "cut"],
)
def test_every_operation_completes_behind_a_service_that_misbehaves(behind: Behind, faults: Faults) -> None:
    with behind(faults) as storage:
        exercise(storage)
    if faults.busy_every:
        assert sum(entry.startswith("503") for entry in faults.seen) >= 5
    assert faults.cut_uploads == faults.cut_downloads == 0


def test_an_answer_that_never_comes_is_asked_for_again(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_faults, "READ_TIMEOUT_SECONDS", 0.5)
    with behind(Faults(slow_every=3, slow_seconds=1.0)) as storage:
        storage.write_bytes("a", b"1" * 1000)
        assert storage.read_bytes("a") == b"1" * 1000


def test_a_service_that_stays_busy_is_given_up_after_the_stated_time(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = give_up_soon(monkeypatch)
    with behind(Faults(busy_every=1)) as storage:
        with pytest.raises(InputError, match=r"gave no good answer \(SlowDown: .*then run again"):
            storage.write_bytes("a", b"1")
        assert seconds[0] == pytest.approx(10.0, abs=storage_faults.RETRIES.first_wait_seconds)
        (shown,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert storage.root in shown and "SlowDown" in shown and "10 s" in shown


def give_up_soon(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that retries wait pass at once; their sum."""
    seconds = [0.0]

    def sleep(wait: float) -> None:
        seconds[0] += wait

    policy = storage_faults.FIRST_RETRIES._replace(sleep=sleep, clock=lambda: seconds[0])
    monkeypatch.setattr(storage_faults, "FIRST_RETRIES", policy)
    monkeypatch.setattr(storage_faults, "REQUEST_ATTEMPTS", 1)
    return seconds


def test_half_an_upload_is_never_seen(behind: Behind, s3_root: str, tmp_path: Path) -> None:
    with behind(Faults()) as storage:
        storage.write_bytes("a", b"old" * 100)
    faults = Faults(cut_uploads=1)
    with behind(faults) as storage:
        seen: list[bytes] = []
        plain, write = storage._fs.pipe_file, storage.write_bytes

        def watched(*args: Any) -> Any:
            try:
                return plain(*args)
            finally:
                seen.append(storage._fs.cat_file(storage.url("a")))

        storage._fs.pipe_file = watched
        write("a", b"new" * 1000)
        del storage._fs.pipe_file
        assert storage.read_bytes("a") == b"new" * 1000
    assert faults.seen.count("cut PUT") == 1
    assert seen[-1] == b"new" * 1000
    assert set(seen) <= {b"old" * 100, b"new" * 1000}


@pytest.mark.rare
def test_parts_that_are_not_joined_are_no_file(behind: Behind, s3_root: str, tmp_path: Path) -> None:
    import boto3

    with behind(Faults()) as storage:
        bucket, prefix = s3_root.removeprefix("s3://"), tmp_path.name
        client = boto3.client("s3")
        upload = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/torn")
        client.upload_part(
            Bucket=bucket, Key=f"{prefix}/torn", UploadId=upload["UploadId"], PartNumber=1, Body=b"x" * (5 << 20)
        )
        assert not storage.exists("torn")
        assert storage.files("") == []
        storage.write_bytes("whole", bytes(101 << 20))  # s3fs sends this in parts
        assert storage.size("whole") == 101 << 20
        storage.delete("whole")


def test_a_missing_bucket_is_named(s3_root: str) -> None:
    storage = fresh("s3://no-such-bucket-here/x")
    with pytest.raises(InputError, match=r"no such bucket; make it or correct storage\.root"):
        storage.check_writable()


def test_a_service_that_is_not_there_is_named_soon(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    give_up_soon(monkeypatch)
    with pytest.raises(InputError, match=r"gave no good answer .*check AWS_ENDPOINT_URL"):
        fresh(s3_root).read_bytes("a")


def test_missing_credentials_are_named(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"no credentials .*set AWS_ACCESS_KEY_ID"):
        fresh(s3_root).read_bytes("a")


def test_a_store_is_written_read_and_verified_behind_all_faults_at_once(behind: Behind) -> None:
    faults = Faults(busy_every=7, slow_every=11, slow_seconds=0.1, cut_uploads=2, cut_downloads=2)
    with behind(faults) as storage:
        root = Root(storage)
        store = ActivationStore(storage, root.activations.folder)
        batches = list(TrainingRows(store, seed=0, batch_rows=4).batches(0, 4))
        assert root.verify().faults == ()
    assert len(batches) == 4
    assert faults.cut_uploads == faults.cut_downloads == 0
    assert any(entry.startswith("503") for entry in faults.seen)


def test_refused_credentials_end_the_command_with_one_line(
    behind: Behind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with behind(Faults(refuse=True)) as storage:
        for command in (["verify", "--root", storage.root], ["run", str(run_file(tmp_path, storage.root))]):
            assert main(command) == 2
            assert "refused the credentials (403" in one_line(capsys)


def test_a_missing_bucket_ends_the_command_with_one_line(
    s3_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(run_file(tmp_path, "s3://no-such-bucket-here/x"))]) == 2
    assert "no such bucket" in one_line(capsys)
    assert main(["verify", "--root", "s3://no-such-bucket-here/x"]) == 2
    assert "expected a storage root" in one_line(capsys)


@pytest.mark.rare
def test_what_a_real_gateway_refuses_is_one_line(services: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in services.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"no such bucket; make it or correct storage\.root"):
        fresh("s3://no-such-bucket-here/x").check_writable()
    if services["CROSSRAY_STORE"] != "ceph":
        pytest.skip("the missing bucket was checked: the smaller server looks at no credentials")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):  # a wrong signature, then an unknown key
        monkeypatch.setenv(name, "wrong")
        for attempt in (Storage.check_writable, lambda storage: storage.exists("a"), lambda storage: storage.files("")):
            with pytest.raises(InputError, match=r"refused the credentials .*check AWS_ACCESS_KEY_ID"):
                attempt(fresh("s3://crossray/x"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("crossray: ")
    return line
