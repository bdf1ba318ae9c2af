"""Where a source's files lie: a local folder here, a bucket in s3.py; and the patterns that name several of them."""

import errno
import fnmatch
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Protocol, Self

from components import buckets
from components.sources import ALLOWED

MAX_NAMES = 100_000  # that a pattern with braces may stand for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """A file as its place lists it: the same ``size`` and ``etag`` mean the same content."""

    path: str  # below the place, "/" between the parts
    size: int  # bytes
    etag: str  # of a bucket; of a local file its time of change, ns


class ChangedFile(OSError):
    """A file is not what was listed, so that offsets into it mean nothing; another try lists it anew."""


class Place(Protocol):
    """A folder or a prefix of a bucket. Small and picklable."""

    def list(self, suffixes: tuple[str, ...]) -> Iterator[File]:
        """Every file below with one of ``suffixes`` (lower case), sorted by path; hidden ones are left out."""

    def stats(self, paths: Sequence[str]) -> Mapping[str, File]:
        """Those of ``paths`` that are there and may be looked at; raises OSError for what can't be a path."""

    def read(self, path: str, etag: str = "") -> bytes:
        """All of a file, its newest content where that is no longer ``etag``'s; raises OSError."""

    def read_span(self, file: File, start: int, size: int) -> bytes:
        """``size`` bytes from byte ``start`` on and no others; raises ChangedFile, or another OSError."""

    def uri(self, path: str) -> str:
        """Where the file is, for people."""

    def __hash__(self) -> int: ...


def open_place(uri: str) -> Place:
    """The folder ``uri`` (local or s3://); raises ValueError when it can't be read."""
    if buckets.is_bucket(uri):
        from components.sources.s3 import Bucket

        return Bucket.open(uri)
    return Folder.open(uri)


@dataclass(frozen=True)
class Folder:
    """A local folder and those below it.

    Hidden files and folders are skipped. A link to a file inside the root counts as a file; links to folders and links
    that leave the root are not followed: no loops, and nothing that a listing of the root would miss.
    """

    root: str  # absolute

    @classmethod
    def open(cls, folder: str) -> Self:
        """The place ``folder``; raises ValueError when it isn't one that can be read."""
        root = Path(folder).expanduser().absolute()
        if not root.is_dir():
            wrong = "it is not a folder" if root.exists() else "there is no such folder"
            raise ValueError(f"data.source {folder!r}: {wrong} (looked at {root}); {ALLOWED}")
        if not os.access(root, os.R_OK | os.X_OK):
            raise ValueError(f"data.source {folder!r}: it may not be read by this user; use a readable folder")
        return cls(str(root))

    def list(self, suffixes: tuple[str, ...]) -> Iterator[File]:
        """As Place's; one folder's names in memory at a time. Raises ValueError for a folder that can't be read."""
        return self._walk("", suffixes)

    def stats(self, paths: Sequence[str]) -> Mapping[str, File]:
        """As Place's; links are followed."""
        found = {}
        for path in paths:
            try:
                stat = os.stat(self.uri(path))
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            found[path] = File(path, stat.st_size, str(stat.st_mtime_ns))
        return found

    def read(self, path: str, etag: str = "") -> bytes:
        """The file's content."""
        file = Path(self.uri(path))
        if not file.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
        return file.read_bytes()

    def read_span(self, file: File, start: int, size: int) -> bytes:
        """As Place's."""
        with open(self.uri(file.path), "rb") as stream:
            stat = os.fstat(stream.fileno())
            if (stat.st_size, str(stat.st_mtime_ns)) != (file.size, file.etag):
                raise ChangedFile(errno.ESTALE, "it has changed since it was listed", self.uri(file.path))
            stream.seek(start)
            return stream.read(size)

    def uri(self, path: str) -> str:
        """The file's absolute path; ``path`` may be one already."""
        return path if path.startswith("/") else f"{self.root}/{path}"

    def _walk(self, folder: str, suffixes: tuple[str, ...]) -> Iterator[File]:
        try:
            with os.scandir(Path(self.root, folder)) as found:
                entries = sorted((_sortable(entry), entry) for entry in found if not entry.name.startswith("."))
        except PermissionError as error:
            raise ValueError(f"data.source {self.root!r}: {error}; every folder below it must be readable") from error
        for name, entry in entries:
            if name.endswith("/"):
                yield from self._walk(f"{folder}{name}", suffixes)
            elif name.lower().endswith(suffixes) and self._counts(entry):
                stat = entry.stat()
                yield File(_printable(f"{folder}{name}"), stat.st_size, str(stat.st_mtime_ns))

    def _counts(self, entry: os.DirEntry[str]) -> bool:
        """Whether it is a regular file, by itself or through a link that stays inside the root."""
        if not entry.is_symlink():
            return entry.is_file()
        if Path(entry.path).resolve().is_relative_to(Path(self.root).resolve()):
            return entry.is_file()
        logger.warning("%s: not followed, the link leaves the source's folder", entry.path)
        return False


class Spans(io.RawIOBase):
    """A file of a place as a stream that can be sought in; every read is one span."""

    def __init__(self, place: Place, file: File) -> None:
        super().__init__()
        self._place, self._file, self._at = place, file, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        """Fill ``buffer``, except at the file's end."""
        size = min(len(buffer), self._file.size - self._at)
        if size <= 0:
            return 0
        data = self._place.read_span(self._file, self._at, size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def stream(place: Place, file: File, *, buffer_bytes: int) -> io.BufferedReader:
    """``file`` as a buffered stream that can be sought in; what is skipped beyond the buffer is not read."""
    return io.BufferedReader(Spans(place, file), buffer_bytes)


def files_of(source: str, suffix: str) -> tuple[Place, list[File]]:
    """The files with ``suffix`` that ``source`` names: all below a folder, or those of a pattern in one folder.

    A pattern is a path whose last part is a name, may have braces (``train-{000..146}.tar``, ``{a,b}.tar``) and
    wildcards (``*``, ``?``). Sorted as their members are, by path and a "/". Raises ValueError when there is none, when
    one that braces name is missing, or when images lie among them in a folder.
    """
    from components.sources.folder import SUFFIXES

    if source.lower().endswith(suffix):
        folder, _, pattern = source.rpartition("/")
        place = open_place(folder or "/")
        found = _matching(place, pattern, suffix)
    else:
        place = open_place(source)
        found = list(place.list((suffix, *SUFFIXES)))
        images = [file.path for file in found if not file.path.lower().endswith(suffix)]
        if images and len(images) < len(found):
            allowed = f"name the first as {source.rstrip('/')}/*{suffix}, or keep them apart"
            raise ValueError(f"data.source {source!r}: {suffix} files and images ({images[0]}) are below it; {allowed}")
    if not found:
        raise ValueError(f"data.source {source!r}: no {suffix} files there")
    return place, sorted(found, key=lambda file: f"{file.path}/")


def _matching(place: Place, pattern: str, suffix: str) -> list[File]:
    """The files of ``place`` itself that ``pattern`` names."""
    names = expand(pattern)
    if not set("*?[") & set(pattern):
        stats = place.stats(names)
        missing = [name for name in names if name not in stats]
        if missing:
            raise ValueError(f"data.source {place.uri(pattern)!r}: {missing[0]} is not there")
        return [stats[name] for name in names]
    wanted = re.compile("|".join(fnmatch.translate(name) for name in names))
    return [file for file in place.list((suffix,)) if "/" not in file.path and wanted.match(file.path)]


def expand(pattern: str) -> list[str]:
    """Every name that braces stand for, ``{a,b}`` and ``{08..11}``, as a shell does it; raises ValueError."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part, pattern) if number % 2 else [part] for number, part in enumerate(parts)]
    size = 1
    for one in choices:
        size *= len(one)
    if size > MAX_NAMES:
        raise ValueError(f"data.source …/{pattern}: {size} names; at most {MAX_NAMES} are allowed, or use *")
    return ["".join(names) for names in product(*choices)]


def _choices(braces: str, pattern: str) -> Sequence[str]:
    if "," in braces:
        return braces.split(",")
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
    if not ends or int(ends[1]) > int(ends[2]) or int(ends[2]) - int(ends[1]) >= MAX_NAMES:
        raise ValueError(f"data.source …/{pattern}: {{{braces}}}; {{first..last}} or {{one,other}} is needed")
    width = len(ends[1]) if ends[1].startswith("0") or len(ends[1]) == len(ends[2]) else 0
    return [str(number).zfill(width) for number in range(int(ends[1]), int(ends[2]) + 1)]


def _sortable(entry: os.DirEntry[str]) -> str:
    """Folders end in "/", so that names sort as whole paths do ("a.png" before "a/b.png")."""
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name


def _printable(path: str) -> str:
    """A name that is not UTF-8 is listed escaped; reading it fails, so it is counted and named among the rejected."""
    return path.encode(errors="backslashreplace").decode()
