"""Parquet in and out of the storage, with the schema's metadata in every file."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
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
        raise ArtifactError(
            f"{storage.url(key)}: expected a Parquet file, got a damaged one ({error}); "
            "remove its folder to make it again"
        ) from error


def write_frame(storage: Storage, key: str, frame: pd.DataFrame, schema: pa.Schema) -> None:
    """Publish a pandas table with the columns of `schema`."""
    write_table(storage, key, {name: frame[name].tolist() for name in schema.names}, schema)


def numbers_of(frame: pd.DataFrame, column: str, *, by: Sequence[str]) -> dict[str, float]:
    """One column as numbers named by others (`a/b`), without NaN: what a record and the tracker hold of a table."""
    names = frame[list(by)].astype(str).agg("/".join, axis=1)
    values = frame[column].to_numpy(dtype=float)
    return {name: float(value) for name, value in zip(names, values, strict=True) if value == value}
