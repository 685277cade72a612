"""Parts of Parquet files, local and on an object store."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ArtifactError
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import read_part, table_columns

TABLE = pa.table({"latent": [0, 0, 1, 2, 2, 2], "tokens": [["a"], ["b"], [], ["c"], ["d"], ["e"]], "f": range(6)})


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    pq.write_table(TABLE, tmp_path / "table.parquet", row_group_size=2)
    return Storage(str(tmp_path))


def test_columns_come_in_the_order_asked_for(storage: Storage) -> None:
    assert table_columns(storage, "table.parquet") == ["latent", "tokens", "f"]
    assert read_part(storage, "table.parquet").equals(TABLE)
    assert read_part(storage, "table.parquet", ["f", "latent"]).equals(TABLE.select(["f", "latent"]))


@pytest.mark.parametrize(("latent", "expected"), [(0, [0, 1]), (1, [2]), (2, [3, 4, 5]), (7, []), (-1, [])])
def test_rows_of_one_value_are_those_of_the_whole_table(storage: Storage, latent: int, expected: list[int]) -> None:
    part = read_part(storage, "table.parquet", ["f", "tokens"], ("latent", latent))
    assert part["f"].to_pylist() == expected and part.column_names == ["f", "tokens"]


def test_a_missing_column_and_a_damaged_file_are_named(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="nu"):
        read_part(storage, "table.parquet", ["nu"])
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ArtifactError, match="damaged"):
        read_part(storage, "damaged.parquet")


@pytest.mark.s3
def test_only_what_is_asked_for_is_fetched(s3_root: str, tmp_path: Path) -> None:
    rows = 200_000
    wide = pa.table({f"column_{number}": [float(i * number) for i in range(rows)] for number in range(6)})
    pq.write_table(wide, tmp_path / "wide.parquet", compression="none", use_dictionary=False)
    storage = Storage(f"{s3_root}/parts")
    storage.write_bytes("wide.parquet", (tmp_path / "wide.parquet").read_bytes())
    assert read_part(storage, "wide.parquet", ["column_3"]).equals(wide.select(["column_3"]))
    fetched = storage.read_with("wide.parquet", _fetched_bytes)
    assert fetched < 2.5 * 8 * rows


def _fetched_bytes(file: object) -> int:
    """Bytes that a read of one column asks the store for."""
    sizes: list[int] = []
    fetch = file.cache.fetcher  # type: ignore[attr-defined]

    def counted(start: int, end: int) -> bytes:
        sizes.append(end - start)
        content: bytes = fetch(start, end)
        return content

    file.cache.fetcher = counted  # type: ignore[attr-defined]
    pq.ParquetFile(file, pre_buffer=True).read(columns=["column_3"])
    return sum(sizes)
