"""Where images come from. Light on purpose: ``alit plan`` lists a source without torch, Ray or an image library."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Protocol

from components.config import DataConfig

DEMO = "demo"


@dataclass(frozen=True)
class SourceObject:
    """One file as its source lists it: the same ``size`` and ``etag`` mean the same content."""

    path: str  # within the source, "/" between the parts
    size: int  # bytes
    etag: str


class Source(Protocol):
    """A collection of image files. Small and picklable: every decoding task gets one."""

    def list(self) -> Iterator[SourceObject]:
        """Every file, sorted by path, as they are found; raises ValueError when there is none."""

    def digest(self) -> str:
        """A hash of the listing, for the key of what is made from it."""

    def read(self, path: str) -> bytes:
        """The file's content; raises OSError."""

    def uri(self, path: str) -> str:
        """Where the file is, for people."""

    def label(self, path: str) -> str | None:
        """The file's class, or None when the source names none."""

    def split(self, path: str) -> str | None:
        """``train`` or ``val``, or None when the source leaves it open."""


def open_source(config: DataConfig) -> Source:
    """The source that ``data.source`` names; raises ValueError when there is no such source."""
    from components.sources.demo import DemoSource
    from components.sources.folder import FolderSource

    if config.source == DEMO:
        return DemoSource(crops=config.crops, limit=config.limit)
    if config.source.startswith("s3://"):
        raise ValueError(f"data.source {config.source!r}: buckets are not supported yet; use 'demo' or a local folder")
    if "://" in config.source:
        raise ValueError(f"data.source {config.source!r}: unknown kind of address; use 'demo' or a local folder")
    return FolderSource.open(config.source, limit=config.limit)


def listing_digest(objects: Iterator[SourceObject]) -> str:
    """sha256 over the path, size and etag of each object, in order."""
    digest = hashlib.sha256()
    for item in objects:
        digest.update(json.dumps(astuple(item)).encode() + b"\n")
    return digest.hexdigest()
