"""Digests of local files: every byte counts, each file is read once, and what is remembered never misleads."""

import json
import logging
import os
from pathlib import Path

import pytest

from pipeline.storage.content import ContentDigests


def _digests(path: Path | None, *, settled_ns: int = 0) -> ContentDigests:
    """Remembers files of any size, at once unless told otherwise."""
    return ContentDigests(path, remembered_from=0, settled_ns=settled_ns)


@pytest.mark.parametrize("place", [0, 40_000_000, 79_999_999])
def test_every_byte_of_a_large_file_counts(tmp_path: Path, place: int) -> None:
    for name in ("one", "two"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(80_000_000)
    with (tmp_path / "two").open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\1")
    digests = _digests(None)
    assert digests.of_file(tmp_path / "one") != digests.of_file(tmp_path / "two")


def test_a_file_is_read_once_and_again_as_soon_as_it_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache" / "digests.json"
    file.write_bytes(b"first")
    first = _digests(cache).of_file(file)
    again = _digests(cache)
    assert again.of_file(file) == first and again.num_bytes_read == 0
    state = file.stat()
    file.write_bytes(b"other")  # as long as before, and dated back below
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    other = _digests(cache).of_file(file)
    assert other != first
    assert _digests(None).of_file(file) == other


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"first")
    _digests(cache, settled_ns=10**15).of_file(file)
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"1:2": 3}', b'{"1:2": [1, 2]}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    file, cache = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"first")
    cache.write_bytes(damage)
    assert _digests(cache).of_file(file) == _digests(None).of_file(file)
    assert json.loads(cache.read_bytes())


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder would be")
    (tmp_path / "weights").write_bytes(b"first")
    digests = _digests(tmp_path / "taken" / "digests.json")
    first = digests.of_file(tmp_path / "weights")
    assert digests.of_file(tmp_path / "weights") == first
    assert digests.num_bytes_read == 5  # this process reads it once all the same


def test_small_files_are_read_once_by_a_process_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"first")
    digests = ContentDigests(tmp_path / "digests.json", settled_ns=0)
    digests.of_file(tmp_path / "config")
    digests.of_file(tmp_path / "config")
    assert digests.num_bytes_read == 5
    assert not (tmp_path / "digests.json").exists()


def test_a_group_has_the_names_below_its_folder_and_no_place(tmp_path: Path) -> None:
    for folder, names in (("a", ("x", "y")), ("b", ("x", "y")), ("c", ("x", "z"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(names[0])
    found = [_digests(None).of_group(sorted((tmp_path / one).iterdir()), tmp_path / one) for one in "abc"]
    assert found[0] == found[1] != found[2]


def test_reading_much_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "weights").write_bytes(b"0" * 1000)
    with caplog.at_level(logging.WARNING):
        ContentDigests(None, told_from=1001).of_file(tmp_path / "weights")
        assert not caplog.records
        ContentDigests(None, told_from=1000).of_file(tmp_path / "weights")
    assert str(tmp_path / "weights") in caplog.text
