"""Globs, object stores and what cannot be read."""

import bz2
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.text.documents import read_documents
from pipeline.text.files import as_input_error, expand_paths, read_json, read_text


def test_globs_are_sorted_and_paths_stay_as_given(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.json", "odd[1].txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.txt").mkdir()
    paths = [str(tmp_path / "c.json"), str(tmp_path / "[ab].txt"), str(tmp_path / "a.txt")]
    assert [Path(path).name for path in expand_paths(paths, "corpus")] == ["c.json", "a.txt", "b.txt"]
    assert expand_paths([str(tmp_path / "odd[1].txt")], "corpus") == [str(tmp_path / "odd[1].txt")]
    assert len(expand_paths([str(tmp_path / "*.txt")], "corpus")) == 3


@pytest.mark.parametrize("name", ["absent.txt", "*.csv", "folder"])
def test_a_path_without_a_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"corpus 'a': paths: expected an existing file, got '.*; correct the path"):
        expand_paths([str(tmp_path / name)], "corpus 'a': paths")


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_byte_order_mark_belongs_to_no_document(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + (b'{"text": "one"}\n' if kind == "jsonl" else b"one\n"))
    source = {"name": "a", "kind": kind, "text_column": "text", "split_on": "line"}
    assert [document.text for document in read_documents(str(path), source)] == ["one"]
    template = tmp_path / "template.jinja"
    template.write_bytes(b"\xef\xbb\xbf{{ x }}")
    assert read_text(str(template), "template") == "{{ x }}"


@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
def test_a_file_that_unpacks_to_far_more_than_text_does_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    with {".gz": gzip.open, ".bz2": bz2.open}[suffix](path, "wb", 1) as stream:
        for _ in range(20):
            stream.write(bytes(16 << 20))
    with pytest.raises(InputError, match=r"a\.txt\..*: expected a compressed text"):
        list(read_documents(str(path), {"name": "a", "kind": "text", "split_on": "line"}))


def test_a_parquet_file_that_unpacks_to_far_more_than_text_does_is_refused(tmp_path: Path) -> None:
    source = {"name": "a", "kind": "parquet", "text_column": "text", "where": {"x": 1}}
    pq.write_table(pa.table({"text": ["x" * (270 << 20)], "x": [1]}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(InputError, match=r"a\.parquet: expected a compressed text"):
        list(read_documents(str(tmp_path / "a.parquet"), source))
    pq.write_table(pa.table({"text": ["word"] * 3000, "x": [1, 2, 3] * 1000}), tmp_path / "b.parquet")
    found = list(read_documents(str(tmp_path / "b.parquet"), source))
    assert sum(not document.reason for document in found) == 1000 and len(found) == 3000


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(InputError, match="corpus: expected a path or a URL that fsspec knows, got 'nowhere://x'"):
        expand_paths(["nowhere://x"], "corpus")


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(KeyError), as_input_error("corpus"):
        raise KeyError("ours")


def test_a_text_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"tokens\.chat_template: .*a\.jinja: expected a readable file"):
        read_text(str(tmp_path / "a.jinja"), "tokens.chat_template")


@pytest.mark.s3
def test_an_object_store_is_read_like_a_folder(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fs, _ = fsspec.core.url_to_fs(f"{s3_root}/texts")
    for name in ("b.jsonl.gz", "a.jsonl.gz"):
        with fsspec.open(f"{s3_root}/texts/{name}", "wt", compression="infer") as file:
            file.write('{"text": "of ' + name + '"}\n')
    paths = expand_paths([f"{s3_root}/texts/*.gz"], "corpus")
    assert paths == [f"{s3_root}/texts/a.jsonl.gz", f"{s3_root}/texts/b.jsonl.gz"]
    settings = {"name": "mine", "kind": "jsonl", "text_column": "text"}
    assert [next(read_documents(path, settings)).text for path in paths] == ["of a.jsonl.gz", "of b.jsonl.gz"]
    with pytest.raises(InputError, match="expected an existing file, got 's3://"):
        expand_paths([f"{s3_root}/texts/absent"], "corpus")
    with pytest.raises(InputError, match="expected a readable file"):
        list(read_documents(f"{s3_root}/texts/absent", settings))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    fs.clear_instance_cache()
    with pytest.raises(InputError, match="check permissions and credentials"):
        expand_paths([f"{s3_root}/texts/*.gz"], "corpus")
    fs.clear_instance_cache()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "", "9" * 5000, "{'a': 1}"])
def test_json_that_cannot_be_read_is_one_short_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(InputError, match=r"prompts: expected a JSON file.*prompts\.json") as caught:
        read_json(str(tmp_path / "prompts.json"), "prompts")
    assert len(str(caught.value)) < 500


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_bytes(b'\xef\xbb\xbf["one"]')
    assert read_json(str(tmp_path / "prompts.json"), "prompts") == ["one"]
