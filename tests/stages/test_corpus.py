"""Files become parts: every document once, and every one that is left out counted under its corpus and reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import CorpusSection
from pipeline.errors import InputError
from pipeline.stages.corpus import ReadFile, SourceFile, remove_duplicates, unusable_of
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import read_table
from pipeline.text.documents import Document, document_id


def read(folder: Path, files: dict[str, list[list[str]]], *, part_characters: int = 10**9, **settings: Any) -> Any:
    """Counts and the rows of all parts of corpora, each with some files of texts."""
    storage = Storage(str(folder / "runs"))
    sources, items = [], []
    for name, texts in files.items():
        source: dict[str, Any] = {"name": name, "kind": "jsonl", "text_column": "text", "paths": []} | settings
        for rows in texts:
            path = folder / f"{name}-{len(items)}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
            source["paths"].append(str(path))
            items.append(SourceFile(len(items), str(path), source))
        sources.append(source)
    section = CorpusSection(sources=sources)
    worker = ReadFile(storage, "corpus/x", 0.5, part_characters)
    counts = remove_duplicates(storage, "corpus/x", [worker(item) for item in items], section)
    tables = [read_table(storage, f"corpus/x/{part}").to_pandas() for part in counts["parts"]]
    return counts, [(name, text) for table in tables for name, text in zip(table["corpus"], table["text"], strict=True)]


def test_doubles_go_within_a_file_across_files_and_across_corpora(tmp_path: Path) -> None:
    counts, rows = read(tmp_path, {"a": [["1", "2", "1"], ["2", "3"]], "b": [["3", "4", " 4 "], ["", "5"]]})
    assert rows == [("a", "1"), ("a", "2"), ("a", "3"), ("b", "4"), ("b", "5")]
    assert counts["num_documents"] == {"a": 3, "b": 2}
    assert counts["dropped"] == {"a": {"duplicate": 2}, "b": {"duplicate": 2, "empty": 1}}
    assert counts["num_characters"] == {"a": 3, "b": 2}


def test_max_documents_holds_for_the_corpus_and_doubles_do_not_count(tmp_path: Path) -> None:
    counts, rows = read(tmp_path, {"a": [["1", "1", "2"], ["2", "3", "4", "5"]]}, max_documents=3)
    assert [text for _, text in rows] == ["1", "2", "3"]
    assert counts["dropped"] == {"a": {"duplicate": 2, "beyond max_documents": 1}}  # 5 was never read


def test_filters_are_counted_under_their_corpus(tmp_path: Path) -> None:
    counts, rows = read(tmp_path, {"a": [["long enough", "x"]], "b": [["y"]]}, filters={"min_characters": 3})
    assert rows == [("a", "long enough")]
    assert counts["dropped"] == {"a": {"fewer than min_characters": 1}, "b": {"fewer than min_characters": 1}}


@pytest.mark.parametrize("part_characters", [1, 7, 10**9])
def test_a_large_file_becomes_several_parts_with_the_same_rows(tmp_path: Path, part_characters: int) -> None:
    texts = [f"document {n % 30}" for n in range(40)]
    counts, rows = read(tmp_path, {"a": [texts, ["new"]]}, part_characters=part_characters)
    assert [text for _, text in rows] == [*(f"document {n}" for n in range(30)), "new"]
    assert len(counts["parts"]) == (2 if part_characters == 10**9 else 31)
    assert counts["dropped"] == {"a": {"duplicate": 10}}


def test_the_split_is_the_hash_of_the_words(tmp_path: Path) -> None:
    read(tmp_path, {"a": [[str(n) for n in range(200)]]})
    table = read_table(Storage(str(tmp_path / "runs")), "corpus/x/part-00000-00000.parquet").to_pandas()
    expected = ["validation" if document_id(Document(text=t)) % 2**32 < 2**31 else "train" for t in table["text"]]
    assert table["split"].tolist() == expected
    assert 70 < expected.count("train") < 130


def test_documents_that_cannot_be_used_are_told_with_reasons_and_examples_and_limited(tmp_path: Path) -> None:
    rows = [{"text": "fine"}] * 2 + [{"text": 5}] * 3 + [{"body": "x"}, {"text": "shrt"}, {"text": "fine too"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "a", "kind": "jsonl", "text_column": "text", "filters": {"min_characters": 4}}
    read = ReadFile(Storage(str(tmp_path / "runs")), "corpus/x", 0.5)(SourceFile(0, str(path), source))
    assert read.dropped == {"not text": 3, "column missing": 1, "duplicate": 1}
    unusable = unusable_of([read], {"a": 3})
    assert unusable.num_read == {"a": 7}
    (line,) = unusable.remarks("corpus")
    assert line.startswith("corpus: corpus 'a': 4 of 7 documents")
    assert "3 not text (such as 5)" in line
    unusable.check(4 / 7)
    with pytest.raises(InputError, match=r"max_unusable_frac.* 4 of 7 .*3 not text"):
        unusable.check(0.5)
    assert unusable_of([read._replace(unusable={})], {"a": 3}).remarks("corpus") == []


def test_what_filters_and_duplicates_leave_out_is_told_and_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the same"}\n' * 38 + '{"text": "x"}\n{"text": 5}\n')
    source = {"name": "a", "kind": "jsonl", "text_column": "text", "filters": {"min_characters": 4}}
    read = ReadFile(Storage(str(tmp_path / "runs")), "corpus/x", 0.5)(SourceFile(0, str(path), source))
    unusable = unusable_of([read], {"a": 1})
    (line,) = unusable.left_out({"a": read.dropped}, "corpus")
    assert "38 of 40 documents" in line
    assert "37 duplicate" in line
    assert "1 fewer than min_characters" in line
    assert unusable.left_out({"a": {"not text": 1}}, "corpus") == []
