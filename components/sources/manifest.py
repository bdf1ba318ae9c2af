"""Images as a table lists them, one row an image: a CSV file with a header, or JSON lines."""

import csv
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Self

from components.sources import ALLOWED, SPLITS, SourceObject, Targets, listing_digest

COLUMNS = ("uri", "label", "depth", "mask", "split")  # others are ignored; only uri is needed
MAX_LINE = 1_000_000  # bytes: a file that is no table need not be read to its end
GONE = "gone"  # in place of size and time, of a file that isn't there; ingest rejects the row


@dataclass(frozen=True)
class ManifestSource:
    """The rows of ``file`` (absolute): uri, label, depth, mask, split; an empty value says nothing.

    uri, depth and mask are paths of files, absolute or below the manifest's folder; links are followed. split is train,
    val or test; a test set is held out, so it counts as val. One mistake in the file is a ValueError that names the
    line. The rows are held in memory once, packed, to be sorted: about 140 bytes each.
    """

    file: str
    limit: int | None = None

    @classmethod
    def open(cls, file: str, *, limit: int | None = None) -> Self:
        """The source of ``file``; raises ValueError when it isn't a file that can be read."""
        path = Path(file).expanduser().absolute()
        if not path.is_file():
            raise ValueError(f"data.source {file!r}: there is no such file (looked at {path}); {ALLOWED}")
        if not os.access(path, os.R_OK):
            raise ValueError(f"data.source {file!r}: it may not be read by this user; use a readable file")
        return cls(file=str(path), limit=limit)

    def list(self) -> Iterator[SourceObject]:
        """Every row, sorted by path; raises ValueError for a mistake in the file, before the first is given."""
        for packed in islice(self._sorted(), self.limit):
            path, *values = packed.decode().split("\0")
            label, depth, mask, split, line = (value or None for value in values)
            yield self._object(path, Targets(label, depth, mask, split), int(line or 0))

    def digest(self) -> str:
        """sha256 over the listing."""
        return listing_digest(self.list())

    def read(self, path: str) -> bytes:
        """The file's content; raises OSError."""
        file = Path(self.uri(path))
        if not file.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
        return file.read_bytes()

    def uri(self, path: str) -> str:
        """The file's absolute path."""
        return path if path.startswith("/") else f"{self.file.rpartition('/')[0]}/{path}"

    def _object(self, path: str, targets: Targets, line: int) -> SourceObject:
        stats = [self._stat(file, line) for file in (path, targets.depth, targets.mask) if file is not None]
        etag = hashlib.sha256(repr((targets, stats)).encode()).hexdigest()[:32]
        return SourceObject(path, max(size for size, _ in stats), etag, targets)

    def _stat(self, path: str, line: int) -> tuple[int, str]:
        """Size in bytes and time of the last change."""
        try:
            stat = os.stat(self.uri(path))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return 0, GONE
        except OSError as error:
            self._fail(line, f"{_shown(path)}: {error.strerror}; a path of a file is needed")
        return stat.st_size, str(stat.st_mtime_ns)

    def _sorted(self) -> Iterator[bytes]:
        """The rows packed as path, label, depth, mask, split and line with NUL between, which sorts them by path."""
        rows = [self._packed(line, record) for line, record in self._records()]
        if not rows:
            raise ValueError(f"data.source {self.file!r}: no rows in it; one a line is needed, with a path as uri")
        rows.sort()
        before: list[bytes] = [b""]
        for row in rows:
            path, *_, line = row.split(b"\0")
            if path == before[0]:
                first, second = sorted(map(int, (before[-1], line)))
                self._fail(second, f"uri {_shown(path.decode())} is that of line {first} too: once each is allowed")
            before = [path, line]
        yield from rows

    def _packed(self, line: int, record: Mapping[str, Any]) -> bytes:
        values = {name: self._text(line, name, record.get(name)) for name in COLUMNS}
        if not values["uri"]:
            self._fail(line, "uri is empty: the path of an image is needed")
        if values["split"] and values["split"] not in SPLITS:
            self._fail(line, f"split = {_shown(values['split'])}: allowed are {', '.join(SPLITS)}, or nothing")
        paths = {name: self._path(line, name, values[name]) for name in ("uri", "depth", "mask") if values[name]}
        values |= paths | {"split": SPLITS.get(values["split"], "")}
        try:
            return "\0".join([*values.values(), str(line)]).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write
            self._fail(line, f"{_shown(error.object)} can't be written as UTF-8: text is needed")

    def _text(self, line: int, name: str, value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and name == "label":
            return str(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        if not isinstance(value, str) or "\0" in value:
            self._fail(line, f"{name} = {_shown(value)}: text is needed")
        return value

    def _path(self, line: int, name: str, value: str) -> str:
        """``value`` in the one form in which the same path is the same text."""
        path = os.path.normpath(value)
        if "://" in value or path.split("/")[0] in ("..", "."):
            allowed = f"a path below {os.path.dirname(self.file)!r}, or an absolute one"
            self._fail(line, f"{name} = {_shown(value)}: {allowed} is needed")
        return path

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Each row with the number of its first line."""
        return self._json_rows() if self.file.lower().endswith(".jsonl") else self._csv_rows()

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
            allowed = "uri is needed; label, depth, mask and split are allowed, each once; others are ignored"
            self._fail(1, f"the columns are {_shown(header)}: {allowed}")

    def _json_rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for line, text in enumerate(self._lines(), start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                self._fail(line, f"not JSON: {error}")
            if not isinstance(record, dict):
                self._fail(line, f"{_shown(record)}: an object is needed, with a path as uri")
            yield line, record

    def _lines(self) -> Iterator[str]:
        with open(self.file, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    self._fail(number, f"too long: at most {MAX_LINE} bytes are allowed")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    self._fail(number, f"byte {line[error.start]:#04x} is not UTF-8, which is needed")

    def _fail(self, line: int, wrong: str) -> NoReturn:
        raise ValueError(f"data.source {self.file!r}, line {line}: {wrong}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
