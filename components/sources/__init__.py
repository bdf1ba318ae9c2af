"""Where images come from. Light on purpose: ``alit plan`` lists a source without torch, Ray or an image library."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from components.config import DataConfig

DEMO = "demo"
MANIFESTS = (".csv", ".jsonl")  # suffixes of a file that lists images
TAR, TABLE = ".tar", ".parquet"
ALLOWED = "use 'demo', or, local or s3://, a folder of images, .tar shards, .parquet tables, a .csv or .jsonl manifest"
SPLITS = {"train": "train", "val": "val", "test": "val"}  # a test set is held out too


@dataclass(frozen=True)
class Targets:
    """What a source knows of an image besides its pixels; None: nothing."""

    label: str | None = None
    depth: str | None = None  # path within the source of a depth map
    mask: str | None = None  # and of a mask
    split: str | None = None  # train | val
    complexity: float | None = None  # as people judge it, in any unit; higher is more complex


@dataclass(frozen=True)
class SourceObject:
    """One image as its source lists it: the same ``size`` and ``etag`` mean the same content and targets."""

    path: str  # within the source, "/" between the parts
    size: int  # bytes, of the largest of its files
    etag: str
    targets: Targets = Targets()


def complexity_of(value: object) -> float | None:
    """A value of a source's column complexity; None for an empty one.

    Raises ValueError, which says so for people, when it is not a finite number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"complexity = {shown(value)}: a finite number is needed, or nothing")
    return number


def shown(value: object) -> str:
    """``value`` as an error shows it: not at any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


class Source(Protocol):
    """A collection of image files. Small and picklable: every decoding task gets one."""

    def list(self) -> Iterator[SourceObject]:
        """Every image, sorted by path, as they are found; raises ValueError when there is none."""

    def digest(self, listed: str = "") -> str:
        """A hash of the listing, for the key of what is made from it.

        ``listed``: the listing_digest of what ``list`` gave, which spares listing again.
        """

    def read(self, path: str, etag: str = "") -> bytes:
        """The content of an image, depth map or mask of the object with ``etag``; raises OSError."""

    def uri(self, path: str) -> str:
        """Where the file is, for people."""


def open_source(config: DataConfig) -> Source:
    """The source that ``data.source`` names; raises ValueError when there is no such source.

    A folder (local or s3://) has images, tar shards or Parquet tables in it: the first such file says which.
    """
    from components.sources.demo import DemoSource
    from components.sources.folder import SUFFIXES, FolderSource
    from components.sources.places import open_place

    source, limit = config.source, config.limit
    if source == DEMO:
        return DemoSource(crops=config.crops, limit=limit)
    if "://" in source and not source.startswith("s3://"):
        raise ValueError(f"data.source {source!r}: unknown kind of address; {ALLOWED}")
    is_folder = "://" not in source and Path(source).expanduser().is_dir()
    if not is_folder and source.lower().endswith((*MANIFESTS, TAR, TABLE)):
        return _open_files(source, limit)
    place = open_place(source)
    first = next(place.list((*SUFFIXES, TAR, TABLE)), None)
    if first is not None and first.path.lower().endswith((TAR, TABLE)):
        return _open_files(source, limit, kind=first.path.lower())
    return FolderSource(place, limit)


def _open_files(source: str, limit: int | None, kind: str = "") -> Source:
    """The source whose images are inside the files that ``source`` names, or are listed in it."""
    from components.sources.manifest import ManifestSource

    kind = kind or source.lower()
    if kind.endswith(MANIFESTS):
        return ManifestSource.open(source, limit=limit)
    if kind.endswith(TAR):
        from components.sources.tar import TarSource

        return TarSource.open(source, limit=limit)
    from components.sources.table import TableSource, has_images

    return TableSource.open(source, limit=limit) if has_images(source) else ManifestSource.open(source, limit=limit)


class Listing:
    """The objects of a listing as they stream by."""

    def __init__(self, objects: Iterator[SourceObject]) -> None:
        self._objects, self._digest = objects, hashlib.sha256()

    def __iter__(self) -> Iterator[SourceObject]:
        """Each object once."""
        for item in self._objects:
            self._digest.update(json.dumps([item.path, item.size, item.etag]).encode() + b"\n")
            yield item

    def digest(self) -> str:
        """sha256 over the path, size and etag of each object that came by, in order."""
        return self._digest.hexdigest()


def listing_digest(objects: Iterator[SourceObject]) -> str:
    """The digest of a whole Listing."""
    listing = Listing(objects)
    for _ in listing:
        pass
    return listing.digest()
