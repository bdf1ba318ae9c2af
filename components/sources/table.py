"""Parquet tables that hold the images themselves.

Columns: ``image`` (the file's bytes, or a struct with ``bytes`` as Hugging Face's data sets have it), and, where they
are there, ``label`` (text or whole numbers), ``depth`` and ``mask`` (bytes, as a manifest's files), ``split``,
``complexity`` (numbers). Others are ignored. A table with ``uri`` instead of ``image`` is a manifest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from components.sources import SPLITS, TABLE, SourceObject, Targets, complexity_of, listing_digest
from components.sources.places import File, Place, files_of, stream

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BUFFER_BYTES = 1 << 16
MAX_GROUP_BYTES = 1 << 30  # of images in a row group, which is read as a whole
BYTES = ("image", "depth", "mask")
FACTS = ("label", "split", "complexity")


def has_images(source: str) -> bool:
    """Whether the first table of ``source`` holds images, and is not a manifest; raises ValueError for neither."""
    place, tables = files_of(source, TABLE)
    names = _open(place, tables[0]).schema_arrow.names
    if "image" not in names and "uri" not in names:
        where = place.uri(tables[0].path)
        raise ValueError(f"data.source {where!r}: the columns are {names}; image or uri is needed")
    return "image" in names


@dataclass(frozen=True)
class TableSource:
    """The rows of ``tables``, which lie in ``place``, in order; a row's path is its table and its number.

    The digest is that of the tables, so planning reads no rows. Listing reads no images. A row is read with its row
    group, which stays in memory for the next one: small row groups (about 100 images) are best.
    """

    place: Place
    tables: tuple[File, ...]
    limit: int | None = None

    @classmethod
    def open(cls, source: str, *, limit: int | None = None) -> Self:
        """A folder of tables, one table, or a pattern of them; raises ValueError when there is none."""
        place, tables = files_of(source, TABLE)
        return cls(place, tuple(tables), limit)

    def list(self) -> Iterator[SourceObject]:
        """Every row; raises ValueError for a table of another kind, for too large row groups, and for no rows."""
        found = False
        for row in islice((row for table in self.tables for row in self._rows(table)), self.limit):
            found = True
            yield row
        if not found:
            raise ValueError(f"data.source {self.place.uri(self.tables[0].path)!r}: no rows")

    def digest(self, listed: str = "") -> str:
        """sha256 over the listing of the tables."""
        return listing_digest(SourceObject(file.path, file.size, file.etag) for file in self.tables)

    def read(self, path: str, etag: str = "") -> bytes:
        """One value; raises ChangedFile when its table is no longer what was listed, or another OSError."""
        size, version, group, row = etag.split(" ")
        table, _, name = path.rpartition("/")
        column = name.partition(".")[2] or "image"
        value = _column(self.place, File(table, int(size), version), int(group), column)[int(row)].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        return content or b""

    def uri(self, path: str) -> str:
        """The table's, then the row's number."""
        return self.place.uri(path)

    def _rows(self, table: File) -> Iterator[SourceObject]:
        where = f"data.source {self.place.uri(table.path)!r}"
        file = _open(self.place, table)
        _check(file, where)
        names, number = file.schema_arrow.names, 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            read = file.read_row_group(group, columns=[name for name in FACTS if name in names])
            labels, splits = (_texts(read, name, rows, where) for name in ("label", "split"))
            complexities = _complexities(read, rows, where)
            depths, masks = (_there(file, group, name) for name in ("depth", "mask"))
            for row in range(rows):
                path = f"{table.path}/{number + row:09d}"
                split = splits[row]
                if split and split not in SPLITS:
                    raise ValueError(f"{where}, row {number + row}: split = {split!r}: allowed are {', '.join(SPLITS)}")
                depth, mask = f"{path}.depth" if depths[row] else None, f"{path}.mask" if masks[row] else None
                targets = Targets(labels[row], depth, mask, SPLITS.get(split or ""), complexities[row])
                yield SourceObject(path, 0, f"{table.size} {table.etag} {group} {row}", targets)
            number += rows


def _open(place: Place, table: File) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(stream(place, table, buffer_bytes=BUFFER_BYTES))
    except pa.ArrowInvalid as error:
        raise ValueError(f"data.source {place.uri(table.path)!r}: not a Parquet table: {error}") from error


@lru_cache(maxsize=len(BYTES))
def _column(place: Place, table: File, group: int, column: str) -> "pa.ChunkedArray":
    return _open(place, table).read_row_group(group, columns=[column]).column(0)


def _check(file: "pq.ParquetFile", where: str) -> None:
    import pyarrow as pa

    schema = file.schema_arrow
    if "image" not in schema.names:
        raise ValueError(f"{where}: the columns are {schema.names}; image is needed")
    for name in (name for name in BYTES if name in schema.names):
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(f"{where}: column {name} is {kind}; bytes are needed (paths as uri, in a manifest)")
    for group in range(file.num_row_groups):
        size = sum(chunk.total_uncompressed_size for chunk in _chunks(file, group, "image"))
        if size > MAX_GROUP_BYTES:
            raise ValueError(
                f"{where}: row group {group} has {size} bytes of images, at most {MAX_GROUP_BYTES} are allowed; "
                "write the table with smaller row groups"
            )


def _chunks(file: "pq.ParquetFile", group: int, name: str) -> Iterator[Any]:
    """The metadata of a column in a row group, of each of its fields if it is a struct."""
    metadata = file.metadata.row_group(group)
    chunks = (metadata.column(number) for number in range(metadata.num_columns))
    return (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == name)


def _texts(table: "pa.Table", name: str, rows: int, where: str) -> "list[str | None]":
    import pyarrow as pa

    if name not in table.column_names:
        return [None] * rows
    kind = table.schema.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"{where}: column {name} is {kind}; text or whole numbers are needed")
    return [str(value) if value not in (None, "") else None for value in table[name].to_pylist()]


def _complexities(table: "pa.Table", rows: int, where: str) -> "list[float | None]":
    if "complexity" not in table.column_names:
        return [None] * rows
    try:
        return [complexity_of(value) for value in table["complexity"].to_pylist()]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _there(file: "pq.ParquetFile", group: int, name: str) -> "list[bool]":
    """Which rows of a row group have a value; the column is read only where the statistics can't tell."""
    rows = file.metadata.row_group(group).num_rows
    if name not in file.schema_arrow.names:
        return [False] * rows
    for chunk in _chunks(file, group, name):
        is_value = chunk.path_in_schema in (name, f"{name}.bytes")
        if is_value and chunk.statistics is not None and chunk.statistics.null_count in (0, rows):
            return [chunk.statistics.null_count == 0] * rows
    return file.read_row_group(group, columns=[name]).column(0).is_valid().to_pylist()
