"""Parquet in and out of the storage, with the schema's metadata in every file."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ArtifactError
from pipeline.schema import CORPUS_COLUMNS, TABLE_METADATA, TOKEN_COLUMNS, Column
from pipeline.storage.filesystem import Storage

_TYPES = {
    "int64": pa.int64(),
    "int32": pa.int32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "list<int32>": pa.list_(pa.int32()),
    "list<float32>": pa.list_(pa.float32()),
    "list<string>": pa.list_(pa.string()),
}


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """The Arrow schema of documented columns; each column's doc is its field metadata."""
    fields = [pa.field(column.name, _TYPES[column.dtype], metadata={"doc": column.doc}) for column in columns]
    return pa.schema(fields, metadata=TABLE_METADATA)


CORPUS_SCHEMA = arrow_schema(CORPUS_COLUMNS)
TOKEN_SCHEMA = arrow_schema(TOKEN_COLUMNS)


def write_table(storage: Storage, key: str, rows: pa.Table | Mapping[str, Any], schema: pa.Schema) -> None:
    """Publish rows (columns by name, or a table) as one Parquet file of this schema."""
    if isinstance(rows, pa.Table):
        table = rows.select(schema.names).cast(schema)
    else:
        table = pa.table({name: pa.array(rows[name], schema.field(name).type) for name in schema.names}, schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(schema.metadata), buffer, compression="zstd")
    storage.write_bytes(key, buffer.getvalue())


def read_table(storage: Storage, key: str) -> pa.Table:
    """A Parquet file of the storage; an ArtifactError where it is damaged."""
    data = storage.read_bytes(key)
    try:
        return pq.read_table(io.BytesIO(data))
    except pa.ArrowException as error:
        raise _damaged(storage, key, error) from error


def read_part(
    storage: Storage, key: str, columns: Sequence[str] | None = None, where: tuple[str, Any] | None = None
) -> pa.Table:
    """Some columns of a Parquet file, in the order asked for, and the rows of one value; the rest is not fetched.

    Args:
        storage: where it is.
        key: the file.
        columns: names; None for all.
        where: a column and the value that it must have.

    Raises KeyError for a column that the file lacks, ArtifactError where it is damaged.
    """

    def read(file: Any) -> pa.Table:
        parquet = pq.ParquetFile(file, pre_buffer=True)
        known = parquet.schema_arrow.names
        wanted = known if columns is None else list(columns)
        missing = [name for name in wanted if name not in known]
        if missing:
            raise KeyError(missing[0])
        if where is None:
            return parquet.read(columns=wanted).select(wanted)
        column, value = where
        read_too = list(dict.fromkeys([*wanted, column]))
        groups = [parquet.read_row_group(place, columns=read_too) for place in _groups_with(parquet, column, value)]
        empty = parquet.schema_arrow.empty_table().select(read_too)
        table = pa.concat_tables([empty, *groups])
        return table.filter(pc.equal(table[column], value)).select(wanted)

    try:
        return storage.read_with(key, read)
    except pa.ArrowException as error:
        raise _damaged(storage, key, error) from error


def table_columns(storage: Storage, key: str) -> list[str]:
    """Names of the columns of a Parquet file; ArtifactError where it is damaged."""
    try:
        return storage.read_with(key, lambda file: list(pq.read_schema(file).names))
    except pa.ArrowException as error:
        raise _damaged(storage, key, error) from error


def _groups_with(parquet: pq.ParquetFile, column: str, value: Any) -> list[int]:
    """Row groups that may hold the value, by their statistics."""
    place = parquet.schema_arrow.names.index(column)
    found = []
    for group in range(parquet.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(place).statistics
        if statistics is None or not statistics.has_min_max or statistics.min <= value <= statistics.max:
            found.append(group)
    return found


def _damaged(storage: Storage, key: str, error: pa.ArrowException) -> ArtifactError:
    return ArtifactError(
        f"{storage.url(key)}: expected a Parquet file, got a damaged one ({error}); remove its folder to make it again"
    )


def write_frame(storage: Storage, key: str, frame: pd.DataFrame, schema: pa.Schema) -> None:
    """Publish a pandas table with the columns of `schema`."""
    write_table(storage, key, {name: frame[name].tolist() for name in schema.names}, schema)


def numbers_of(frame: pd.DataFrame, column: str, *, by: Sequence[str]) -> dict[str, float]:
    """One column as numbers named by others (`a/b`), without NaN: what a record and the tracker hold of a table."""
    names = frame[list(by)].astype(str).agg("/".join, axis=1)
    values = frame[column].to_numpy(dtype=float)
    return {name: float(value) for name, value in zip(names, values, strict=True) if value == value}
