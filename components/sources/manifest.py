"""Images as a table lists them, one row an image: a CSV file with a header, JSON lines, or Parquet."""

import csv
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Self

from components import buckets
from components.sources import ALLOWED, SPLITS, TABLE, SourceObject, Targets, complexity_of, listing_digest, shown
from components.sources.places import File, Folder, Place, stream

COLUMNS = ("uri", "label", "depth", "mask", "split", "complexity")  # others are ignored; only uri is needed
MAX_LINE = 1_000_000  # bytes: a file that is no table need not be read to its end
ROWS_AT_ONCE = 1000  # whose files are looked up together
BUFFER_BYTES = 1 << 20
GONE = "gone"  # in place of size and time, of a file that isn't there; ingest rejects the row


@dataclass(frozen=True)
class ManifestSource:
    """The rows of ``file`` (absolute, or s3://), with values of COLUMNS; an empty value says nothing.

    uri, depth and mask are paths of files: below the manifest's folder, absolute where that is local (links are
    followed), or s3://. split is train, val or test; a test set is held out, so it counts as val. One mistake in the
    file is a ValueError that names the line. The rows are held in memory once, packed, to be sorted: about 140 bytes
    each.
    """

    file: str
    limit: int | None = None

    @classmethod
    def open(cls, file: str, *, limit: int | None = None) -> Self:
        """The source of ``file``; raises ValueError when it isn't a file that can be read."""
        if buckets.is_bucket(file):
            source = cls(file, limit)
            if not source.place.stats([source.name]):
                buckets.check(source.place.uri(""), "data.source")
                raise ValueError(f"data.source {file!r}: there is no such object, or it may not be read; {ALLOWED}")
            return source
        path = Path(file).expanduser().absolute()
        if not path.is_file():
            raise ValueError(f"data.source {file!r}: there is no such file (looked at {path}); {ALLOWED}")
        if not os.access(path, os.R_OK):
            raise ValueError(f"data.source {file!r}: it may not be read by this user; use a readable file")
        return cls(file=str(path), limit=limit)

    @property
    def place(self) -> Place:
        """The manifest's folder."""
        folder = self.file.rpartition("/")[0]
        if not buckets.is_bucket(self.file):
            return Folder(folder or "/")
        from components.sources.s3 import Bucket

        return Bucket.at(folder)

    @property
    def name(self) -> str:
        """The manifest's name in its folder."""
        return self.file.rpartition("/")[2]

    def list(self) -> Iterator[SourceObject]:
        """Every row, sorted by path; raises ValueError for a mistake in the file, before the first is given."""
        rows = islice((_unpacked(packed) for packed in self._sorted()), self.limit)
        while chunk := [*islice(rows, ROWS_AT_ONCE)]:
            files = self._files(chunk)
            yield from (_object(path, targets, files) for path, targets, _ in chunk)

    def digest(self, listed: str = "") -> str:
        """sha256 over the listing."""
        return listed or listing_digest(self.list())

    def read(self, path: str, etag: str = "") -> bytes:
        """The file's content; raises OSError."""
        place, within = self._where(path)
        return place.read(within)

    def uri(self, path: str) -> str:
        """The file's absolute path or its address."""
        place, within = self._where(path)
        return place.uri(within)

    def _where(self, path: str) -> tuple[Place, str]:
        """The place of a file, and its path there."""
        if not buckets.is_bucket(path):
            return self.place, path
        from components.sources.s3 import Bucket

        bucket, _, key = path.removeprefix(buckets.SCHEME).partition("/")
        return Bucket(bucket), key

    def _files(self, rows: "Sequence[tuple[str, Targets, int]]") -> Mapping[str, File]:
        """What is known of the files of ``rows``, by their paths; those that aren't there are left out."""
        found: dict[str, File] = {}
        for column in zip(*((path, targets.depth, targets.mask) for path, targets, _ in rows), strict=True):
            by_place: dict[Place, dict[str, str]] = {}
            for path in filter(None, column):
                place, within = self._where(path)
                by_place.setdefault(place, {})[within] = path
            for place, paths in by_place.items():
                try:
                    found |= {paths[within]: file for within, file in place.stats([*paths]).items()}
                except OSError as error:
                    self._fail_for(error, rows)
        return found

    def _fail_for(self, error: OSError, rows: "Sequence[tuple[str, Targets, int]]") -> NoReturn:
        """Say in which line the path is that can't be one."""
        for path, targets, line in rows:
            for one in filter(None, (path, targets.depth, targets.mask)):
                if self.uri(one) == error.filename:
                    self._fail(line, f"{shown(one)}: {error.strerror}; a path of a file is needed")
        raise error

    def _sorted(self) -> Iterator[bytes]:
        """The rows packed as the values of COLUMNS and the line with NUL between, which sorts them by path."""
        rows = [self._packed(line, record) for line, record in self._records()]
        if not rows:
            raise ValueError(f"data.source {self.file!r}: no rows in it; one a line is needed, with a path as uri")
        rows.sort()
        before: list[bytes] = [b""]
        for row in rows:
            path, *_, line = row.split(b"\0")
            if path == before[0]:
                first, second = sorted(map(int, (before[-1], line)))
                self._fail(second, f"uri {shown(path.decode())} is that of line {first} too: once each is allowed")
            before = [path, line]
        yield from rows

    def _packed(self, line: int, record: Mapping[str, Any]) -> bytes:
        values = {name: self._text(line, name, record.get(name)) for name in COLUMNS}
        if not values["uri"]:
            self._fail(line, "uri is empty: the path of an image is needed")
        if values["split"] and values["split"] not in SPLITS:
            self._fail(line, f"split = {shown(values['split'])}: allowed are {', '.join(SPLITS)}, or nothing")
        paths = {name: self._path(line, name, values[name]) for name in ("uri", "depth", "mask") if values[name]}
        values |= paths | {"split": SPLITS.get(values["split"], "")}
        try:
            return "\0".join([*values.values(), str(line)]).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write
            self._fail(line, f"{shown(error.object)} can't be written as UTF-8: text is needed")

    def _text(self, line: int, name: str, value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and name == "label":
            return str(value)
        if name == "complexity":
            return self._number(line, value)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        if not isinstance(value, str) or "\0" in value:
            self._fail(line, f"{name} = {shown(value)}: text is needed")
        return value

    def _number(self, line: int, value: Any) -> str:
        try:
            number = complexity_of(value)
        except ValueError as error:
            self._fail(line, str(error))
        return "" if number is None else repr(number)

    def _path(self, line: int, name: str, value: str) -> str:
        """``value`` in the one form in which the same path is the same text."""
        if buckets.is_bucket(value) and value.removeprefix(buckets.SCHEME).strip("/").count("/"):
            return value
        path, local = posixpath.normpath(value), not buckets.is_bucket(self.file)
        if "://" in value or path.split("/")[0] in ("..", ".") or (path.startswith("/") and not local):
            other = "an absolute one or s3://BUCKET/KEY" if local else "s3://BUCKET/KEY"
            allowed = f"a path below {self.file.rpartition('/')[0]!r}, or {other}"
            self._fail(line, f"{name} = {shown(value)}: {allowed} is needed")
        return path

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Each row with the number of its first line."""
        if self.file.lower().endswith(TABLE):
            return self._table_rows()
        return self._json_rows() if self.file.lower().endswith(".jsonl") else self._csv_rows()

    def _table_rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Rows of Parquet count from 1, as there is no header."""
        import pyarrow.parquet as pq

        with self._stream() as opened:
            table = pq.ParquetFile(opened)
            self._check_header(table.schema_arrow.names)
            batches = table.iter_batches(columns=[name for name in table.schema_arrow.names if name in COLUMNS])
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)

    def _csv_rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        reader = csv.reader(self._lines(), strict=True)
        try:
            header = next(reader, [])
            self._check_header(header)
            line = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    self._fail(line, f"{len(values)} values; as many as the header's are needed, {len(header)}")
                if values:
                    yield line, dict(zip(header, values, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            self._fail(reader.line_num, f"not CSV: {error}")

    def _check_header(self, header: Sequence[str]) -> None:
        known = [name for name in header if name in COLUMNS]
        if "uri" not in known or len(set(known)) < len(known):
            allowed = f"uri is needed; {', '.join(COLUMNS[1:])} are allowed, each once; others are ignored"
            self._fail(1, f"the columns are {shown(header)}: {allowed}")

    def _json_rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for line, text in enumerate(self._lines(), start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                self._fail(line, f"not JSON: {error}")
            if not isinstance(record, dict):
                self._fail(line, f"{shown(record)}: an object is needed, with a path as uri")
            yield line, record

    def _lines(self) -> Iterator[str]:
        with self._stream() as opened:
            for number, line in enumerate(iter(lambda: opened.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    self._fail(number, f"too long: at most {MAX_LINE} bytes are allowed")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    self._fail(number, f"byte {line[error.start]:#04x} is not UTF-8, which is needed")

    def _stream(self) -> io.BufferedReader:
        found = self.place.stats([self.name])
        if not found:
            raise ValueError(f"data.source {self.file!r}: it is gone")
        return stream(self.place, found[self.name], buffer_bytes=BUFFER_BYTES)

    def _fail(self, line: int, wrong: str) -> NoReturn:
        raise ValueError(f"data.source {self.file!r}, line {line}: {wrong}")


def _unpacked(packed: bytes) -> tuple[str, Targets, int]:
    """Path, targets and line of a row."""
    path, *values = packed.decode().split("\0")
    label, depth, mask, split, complexity, line = (value or None for value in values)
    return path, Targets(label, depth, mask, split, complexity_of(complexity)), int(line or 0)


def _object(path: str, targets: Targets, files: Mapping[str, File]) -> SourceObject:
    names = [name for name in (path, targets.depth, targets.mask) if name is not None]
    stats = [(files[name].size, files[name].etag) if name in files else (0, GONE) for name in names]
    etag = hashlib.sha256(repr((targets, stats)).encode()).hexdigest()[:32]
    return SourceObject(path, max(size for size, _ in stats), etag, targets)
