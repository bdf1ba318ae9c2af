"""Files and tables by URI: a path of a local disk, or ``s3://bucket/key``.

One file is written whole or not at all, and a folder in a bucket is a local one for as long as a block lasts.
"""

import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from components import buckets


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of ``uri`` (local path or ``s3://bucket/key``) and the path within it."""
    if buckets.is_bucket(uri):
        bucket, key = buckets.split(uri)
        return buckets.filesystem(bucket), f"{bucket}/{key}".rstrip("/")
    if "://" in uri:
        return fs.FileSystem.from_uri(uri)
    return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """``uri`` extended by ``parts``; raises ValueError when a part would leave the folder."""
    for part in parts:
        if ".." in part.split("/") or part.startswith("/"):
            raise ValueError(f"path part {part!r}: it must stay inside {uri!r}")
    return "/".join([uri.rstrip("/"), *parts])


def read_bytes(uri: str) -> bytes:
    """The whole of one file; raises FileNotFoundError."""
    store, path = filesystem(uri)
    with store.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes) -> None:
    """One file, whole or not at all: a local file is renamed into place, an object store puts it whole."""
    store, path = filesystem(uri)
    if not isinstance(store, fs.LocalFileSystem):
        with store.open_output_stream(path) as stream:
            stream.write(data)
        return
    store.create_dir(path.rsplit("/", 1)[0], recursive=True)
    partial = f"{path}.{uuid.uuid4().hex}.part"
    with store.open_output_stream(partial) as stream:
        stream.write(data)
    store.move(partial, path)


def read_json(uri: str) -> Any:
    """Parsed JSON; raises FileNotFoundError."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """``value`` as indented JSON, whole or not at all."""
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True, default=str).encode())


def exists(uri: str) -> bool:
    """Whether a file or folder stands at ``uri``."""
    store, path = filesystem(uri)
    return store.get_file_info(path).type != fs.FileType.NotFound


def remove(uri: str) -> None:
    """Delete the folder at ``uri`` if it is there."""
    store, path = filesystem(uri)
    if store.get_file_info(path).type == fs.FileType.Directory:
        store.delete_dir(path)


def folder_bytes(uri: str) -> int:
    """Bytes in the files below ``uri``; 0 when it is not there."""
    store, path = filesystem(uri)
    infos = store.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return sum(info.size for info in infos if info.type == fs.FileType.File)


@contextmanager
def local_folder(uri: str) -> Iterator[str]:
    """Folder ``uri`` as a local path, copied from a bucket for as long as the block lasts."""
    store, path = filesystem(uri)
    if isinstance(store, fs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as copy:
        fs.copy_files(path, copy, source_filesystem=store, destination_filesystem=fs.LocalFileSystem())
        yield copy


@contextmanager
def filled_folder(uri: str) -> Iterator[str]:
    """A local folder to write into: ``uri`` itself, or what becomes ``uri`` in a bucket if the block ends well."""
    store, path = filesystem(uri)
    if isinstance(store, fs.LocalFileSystem):
        store.create_dir(path, recursive=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as made:
        yield made
        fs.copy_files(made, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=store)


def write_table(uri: str, table: pa.Table) -> None:
    """A small table as ``part-0.parquet`` in the folder ``uri``."""
    store, path = filesystem(uri)
    store.create_dir(path, recursive=True)
    pq.write_table(table, f"{path}/part-0.parquet", filesystem=store, compression="zstd")


def read_batches(uri: str, *, columns: list[str] | None = None, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
    """The Parquet files of folder ``uri`` in name order, at most ``batch_rows`` rows in memory at a time."""
    store, path = filesystem(uri)
    for info in sorted(store.get_file_info(fs.FileSelector(path, recursive=True)), key=lambda info: info.path):
        if info.path.endswith(".parquet"):
            with store.open_input_file(info.path) as stream:
                yield from pq.ParquetFile(stream).iter_batches(batch_size=batch_rows, columns=columns)


def read_table(uri: str, *, columns: list[str] | None = None) -> pa.Table:
    """The whole of folder ``uri``; for tables known to be small."""
    store, path = filesystem(uri)
    return pq.read_table(path, filesystem=store, columns=columns)
