"""Readers of every kind of corpus: what becomes a document, what is left out and why, and who a document is."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.text.documents import Document, document_id, read_documents, split_of

DIALOGUE = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def source(kind: str, **settings: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "kind": kind,
        "text_column": None,
        "messages_column": None,
        "max_documents": None,
        **settings,
    }


def read(path: Path | str, settings: dict[str, Any]) -> list[Document]:
    return list(read_documents(str(path), settings))


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_lines_give_documents_and_reasons(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": " one "}, {"text": ""}, {"other": 1}, {"text": 5}, [1]])
    found = read(path, source("jsonl", text_column="text"))
    assert [document.text for document in found] == ["one", None, None, None, None]
    assert [document.reason for document in found] == ["", "empty", "column missing", "not text", "column missing"]
    assert found[0].num_characters == 3


def test_compressed_json_lines_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n\n')
    assert [d.text for d in read(tmp_path / "a.jsonl.gz", source("jsonl", text_column="text"))] == ["packed"]


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd"])
def test_every_compression_is_read_by_its_name(tmp_path: Path, codec: str) -> None:
    path = tmp_path / f"a.jsonl.{ {'gzip': 'gz', 'bz2': 'bz2', 'zstd': 'zst'}[codec] }"
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write(('{"text": "gepackt \u00e4"}\n' * 3).encode())
    assert [d.text for d in read(path, source("jsonl", text_column="text"))] == ["gepackt \u00e4"] * 3
    with_block = source("text", split_on="line")
    assert len(read(path, with_block)) == 3


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20]),
        ("wrong.jsonl.gz", b'{"text": "not packed"}\n'),
        ("wrong.jsonl.zst", b'{"text": "not packed"}\n'),
        ("latin.jsonl", '{"text": "\u00e4"}\n'.encode("latin-1")),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        InputError, match=rf"corpus 'mine': .*{name}: expected a readable file, got \w+.*; (replace|save) it"
    ):
        read(tmp_path / name, source("jsonl", text_column="text"))


def test_half_a_surrogate_pair_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    found = read(tmp_path / "a.jsonl", source("jsonl", text_column="text"))
    assert [document.reason for document in found] == ["", "not valid Unicode"]


def test_other_layouts_of_dialogues_are_read(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]}]
    layout = {"role_key": "from", "content_key": "value", "role_names": {"human": "user", "gpt": "assistant"}}
    (found,) = read(lines(tmp_path / "a.jsonl", rows), source("jsonl", messages_column="conversations", **layout))
    assert json.loads(found.messages or "") == DIALOGUE


def test_rows_are_chosen_by_other_columns(tmp_path: Path) -> None:
    rows = [{"text": "a", "lang": "en", "n": 1}, {"text": "b", "lang": "de", "n": 1}, {"text": "c", "n": 1}]
    path = lines(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for kind, name in (("jsonl", path), ("parquet", tmp_path / "a.parquet")):
        found = read(name, source(kind, text_column="text", where={"lang": "en", "n": 1}))
        assert [document.reason for document in found] == ["", "lang is not 'en'", "lang is not 'en'"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("split_on", ["file", "line", "blank_line"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, name: str, split_on: str) -> None:
    data = "".join(f"\ufeff{word}\n\n" for word in ("one", "two")).encode()  # two files that were joined
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = read(tmp_path / name, source("text", split_on=split_on))
    expected = ["one\n\n\ufefftwo"] if split_on == "file" else ["one", "two"]
    assert [document.text for document in found] == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_does_not_refuse_json_lines(tmp_path: Path, name: str) -> None:
    data = b"".join(b"\xef\xbb\xbf" * n + b'{"text": "\xef\xbb\xbfword %d"}\n' % n for n in (2, 0, 1))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = read(tmp_path / name, source("jsonl", text_column="text"))
    assert [document.text for document in found] == ["word 2", "word 0", "word 1"]


@pytest.mark.parametrize(
    "line", ['{"text": ' + "[" * 100_000, '{"a": ' * 100_000, '{"text": "a", "n": ' + "9" * 5000 + "}"]
)
def test_json_beyond_any_reader_is_one_short_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: ") as caught:
        read(tmp_path / "a.jsonl", source("jsonl", text_column="text"))
    assert len(str(caught.value)) < 500


TEXT = {"type": "text", "text": "say "}


@pytest.mark.parametrize(
    ("content", "read_as"),
    [
        ([TEXT, {"type": "text", "text": "it"}], "say it"),
        ([{"type": "input_text", "text": "say it"}], "say it"),
        ([{"type": "output_text", "text": "say it", "annotations": []}], "say it"),
        ([{"type": "text", "text": "say it", "image_url": None}], "say it"),
        (["say ", {"text": "it"}], "say it"),
        ({"type": "text", "text": "say it"}, "say it"),
    ],
)
def test_contents_in_parts_are_read(tmp_path: Path, content: Any, read_as: str) -> None:
    row = {"m": [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]}
    (found,) = read(lines(tmp_path / "a.jsonl", [row]), source("jsonl", messages_column="m"))
    assert json.loads(found.messages or "")[0]["content"] == read_as


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([TEXT, {"type": "image_url", "image_url": {"url": "u"}}], "image_url"),
        ([{"type": "image"}], "image"),
        ([{"type": "text", "text": None}], "without text"),
        ([{"type": ["text"]}], "type"),
        (None, "without content"),
        (5, "not a dialogue"),
    ],
)
def test_contents_that_are_no_text_are_counted_with_their_reason(tmp_path: Path, content: Any, named: str) -> None:
    row = {"m": [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]}
    (found,) = read(lines(tmp_path / "a.jsonl", [row]), source("jsonl", messages_column="m"))
    assert named in found.reason
    assert found.unusable


@pytest.mark.parametrize("arguments", ["[" * 900 + "]" * 900, json.loads("[" * 100 + "]" * 100), "[" * 100_000])
def test_arguments_of_tools_cannot_exhaust_the_stack_later(tmp_path: Path, arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    row = {"m": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    (found,) = read(lines(tmp_path / "a.jsonl", [row]), source("jsonl", messages_column="m"))
    is_text = found.messages is not None and isinstance(
        json.loads(found.messages)[1]["tool_calls"][0]["function"]["arguments"], str
    )
    assert is_text or "nested" in found.reason


@pytest.mark.parametrize(("wanted", "texts"), [(1, ["1", "1.0"]), (True, ["True"]), (0, ["0"]), (False, ["False"])])
def test_a_number_is_not_true_or_false(tmp_path: Path, wanted: Any, texts: list[str]) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": str(x), "x": x} for x in (1, True, 1.0, 0, False, "1", "true")])
    found = read(path, source("jsonl", text_column="text", where={"x": wanted}))
    assert [document.text for document in found if not document.reason] == texts


def test_dialogues_keep_roles_contents_and_labels_only(tmp_path: Path) -> None:
    label = {"name": "refuse", "start": 0, "end": 2, "turn_header": True}
    labelled = [DIALOGUE[0] | {"id": 7}, DIALOGUE[1] | {"labels": [label]}]
    rows = [{"m": labelled}, {"m": "text"}, {"m": [{"role": "user"}]}, {"m": [{"role": "user", "content": " "}]}]
    found = read(lines(tmp_path / "a.jsonl", rows), source("jsonl", messages_column="m"))
    assert json.loads(found[0].messages or "") == [DIALOGUE[0], DIALOGUE[1] | {"labels": [label]}]
    assert found[0].labels == {"refuse"}
    assert [document.reason for document in found] == ["", "not a dialogue", "not a dialogue", "empty"]


@pytest.mark.parametrize("labels", [["toxic"], "toxic", 3, {"name": "a"}, [{"start": 0, "end": 1}]])
def test_a_dialogue_with_labels_of_another_kind_is_counted_and_ends_nothing(tmp_path: Path, labels: Any) -> None:
    rows = [{"m": [DIALOGUE[0] | {"labels": labels}, DIALOGUE[1]]}, {"m": DIALOGUE}]
    found = read(lines(tmp_path / "a.jsonl", rows), source("jsonl", messages_column="m"))
    assert [document.reason for document in found] == ["labels are not {name, start, end}", ""]


def test_parquet_gives_the_same_documents_as_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "one", "m": DIALOGUE}, {"text": None, "m": DIALOGUE}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = lines(tmp_path / "a.jsonl", rows)
    for column in ({"text_column": "text"}, {"messages_column": "m"}):
        assert read(tmp_path / "a.parquet", source("parquet", **column)) == read(path, source("jsonl", **column))


@pytest.mark.parametrize(
    ("split_on", "expected"),
    [("file", ["a\nb\n\nc"]), ("line", ["a", "b", "c"]), ("blank_line", ["a\nb", "c"])],
)
def test_text_files_are_split_where_asked(tmp_path: Path, split_on: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n")
    found = read(tmp_path / "a.txt", source("text", split_on=split_on))
    assert [document.text for document in found if not document.reason] == expected


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_is_streamed_through_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", [{"text": f"document {n}"} for n in range(5)])
    settings = source("hub", dataset=str(folder), subset=None, split="train", revision=None, text_column="text")
    found = read_documents("", settings)
    assert [next(found).text for _ in range(3)] == ["document 0", "document 1", "document 2"]


def test_a_data_set_that_is_not_there_is_named() -> None:
    settings = source("hub", dataset="nobody/nothing", subset=None, split="train", revision=None, text_column="text")
    with pytest.raises(InputError, match=r"corpus 'mine': .*'nobody/nothing'"):
        read("", settings)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{oops\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: expected a JSON object"):
        read(tmp_path / "a.jsonl", source("jsonl", text_column="text"))
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="expected a readable Parquet file"):
        read(tmp_path / "a.parquet", source("parquet", text_column="text"))
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="expected a column 'text', got other"):
        read(tmp_path / "b.parquet", source("parquet", text_column="text"))
    with pytest.raises(InputError, match="expected a readable file"):
        read(tmp_path / "absent.txt", source("text", split_on="file"))


def test_identity_is_the_words_alone() -> None:
    labelled = [DIALOGUE[0], DIALOGUE[1] | {"labels": [{"name": "x", "start": 0, "end": 1}]}]
    plain, with_labels = (Document(messages=json.dumps(messages)) for messages in (DIALOGUE, labelled))
    assert document_id(plain) == document_id(with_labels)
    assert document_id(Document(text="a")) != document_id(Document(text="b"))
    assert 0 <= document_id(Document(text="a")) < 2**63


def test_the_split_depends_on_the_hash_alone_and_has_its_share() -> None:
    ids = [document_id(Document(text=str(n))) for n in range(4000)]
    held_out = [split_of(doc_id, 0.1) == "validation" for doc_id in ids]
    assert 0.08 < sum(held_out) / len(held_out) < 0.12
    grown = [split_of(doc_id, 0.2) == "validation" for doc_id in ids]
    assert all(more for less, more in zip(held_out, grown, strict=True) if less)
