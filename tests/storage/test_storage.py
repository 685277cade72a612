"""Storage: atomic writes, listing, and faults that name what to do; local and on a real S3-compatible server."""

import shutil
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.storage.filesystem import Storage


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "root"))
    return Storage(f"{request.getfixturevalue('s3_root')}/{tmp_path.name}")


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write_bytes("a/b/c.bin", b"\x00\xff")
    storage.write_json("a/d.json", {"y": [1, 2.5], "x": None})
    assert storage.read_bytes("a/b/c.bin") == b"\x00\xff"
    assert storage.read_json("a/d.json") == {"y": [1, 2.5], "x": None}
    assert storage.exists("a/d.json")
    assert not storage.exists("a/e.json")


def test_pieces_of_any_size_follow_each_other(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.filesystem._FLUSH_BYTES", 7)
    parts = [b"", b"abc", memoryview(bytes(range(100))), b"z" * 7]
    storage.write_parts("a", parts)
    assert storage.read_bytes("a") == b"".join(parts)
    storage.write_bytes("empty", b"")
    assert storage.size("empty") == 0


def test_a_second_write_replaces_the_first(storage: Storage) -> None:
    storage.write_bytes("a", b"one")
    storage.write_bytes("a", b"two")
    assert storage.read_bytes("a") == b"two"


def test_listings_are_sorted_and_relative(storage: Storage) -> None:
    for name in ("x/2/b", "x/1/a", "x/c"):
        storage.write_bytes(name, b"1")
    assert storage.files("x") == ["1/a", "2/b", "c"]
    assert storage.folders("x") == ["1", "2"]
    assert storage.files("nothing") == []
    assert storage.folders("nothing") == []


def test_folders_travel_whole(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "f").write_bytes(b"1")
    (source / "g").write_bytes(b"2")
    storage.upload_folder(source, "copy")
    with storage.local_folder("copy") as folder:
        assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
            "sub/f": b"1",
            "g": b"2",
        }


def test_deleting_what_is_not_there_is_no_fault(storage: Storage) -> None:
    storage.write_bytes("d/e", b"1")
    storage.delete("d")
    storage.delete("d")
    assert not storage.exists("d/e")


def test_a_missing_file_is_named(storage: Storage) -> None:
    with pytest.raises(InputError, match="nowhere"):
        storage.read_bytes("nowhere")


def test_json_that_is_none_is_named(storage: Storage) -> None:
    storage.write_bytes("broken.json", b"{")
    with pytest.raises(InputError, match=r"broken\.json: expected JSON"):
        storage.read_json("broken.json")


def test_the_write_check_leaves_nothing(storage: Storage) -> None:
    storage.check_writable()
    assert storage.files("") == []


def test_leftovers_of_killed_writers_are_never_listed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("a/b", b"1")
    (tmp_path / "a" / ".b.tmp-12345678").write_bytes(b"half")
    assert storage.files("a") == ["b"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="no space left"):
        storage.write_bytes("a", b"new")
    assert storage.read_bytes("a") == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_an_unwritable_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="set storage"):
        Storage(str(tmp_path / "file" / "below")).check_writable()


@pytest.mark.parametrize(
    "root",
    [
        "",
        "  ",
        "a\0b",
        "a\nb",
        "~nobody-of-this-name/x",
        "memory://x",
        "memory:x",
        "http://host/x",
        "data:,x",
        "s3://",
        "gs:///x",
    ],
)
def test_a_root_that_no_run_can_use_is_refused(root: str) -> None:
    with pytest.raises(InputError, match=r"storage\.root: expected"):
        Storage(root)


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"):
        Storage(str(tmp_path / "file")).check_writable()


@pytest.mark.parametrize("prefix", ["", "file:", "file://", "file://localhost"])
def test_a_local_root_may_be_written_as_a_url(prefix: str, tmp_path: Path) -> None:
    assert Storage(f"{prefix}{tmp_path}").root == str(tmp_path)


def test_a_file_system_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(InputError, match=r"storage\.root: .*'ftp://127\.0\.0\.1:9/x'"):
        Storage("ftp://127.0.0.1:9/x").exists("a")


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(InputError, match="fsspec"):
        Storage("gopher://hole/x").exists("a")


def test_free_space_is_known_for_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert (Storage(str(tmp_path / "a" / "b")).free_bytes() or 0) > 0


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_root_that_is_removed_in_mid_run_is_one_line(tmp_path: Path, is_made_again: bool) -> None:
    storage = Storage(str(tmp_path / "runs"))
    storage.write_bytes("a/b", b"x")
    with pytest.raises(KeyError), storage.kept():
        raise KeyError("ours")

    def fails() -> None:
        shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
        if is_made_again:
            storage.write_bytes("c", b"x")
        raise RuntimeError("Unable to set up storage")

    with pytest.raises(InputError, match=r"storage\.root: expected .*runs to stay.*Unable to set up"), storage.kept():
        fails()
