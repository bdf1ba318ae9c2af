"""Where images come from. Light on purpose: ``alit plan`` lists a source without torch, Ray or an image library."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from components.config import DataConfig

DEMO = "demo"
MANIFESTS = (".csv", ".jsonl")  # suffixes of a file that lists images
ALLOWED = "use 'demo', a folder of images, or a .csv or .jsonl manifest"
SPLITS = {"train": "train", "val": "val", "test": "val"}  # a test set is held out too


@dataclass(frozen=True)
class Targets:
    """What a source knows of an image besides its pixels; None: nothing."""

    label: str | None = None
    depth: str | None = None  # path within the source of a depth map
    mask: str | None = None  # and of a mask
    split: str | None = None  # train | val


@dataclass(frozen=True)
class SourceObject:
    """One image as its source lists it: the same ``size`` and ``etag`` mean the same content and targets."""

    path: str  # within the source, "/" between the parts
    size: int  # bytes, of the largest of its files
    etag: str
    targets: Targets = Targets()


class Source(Protocol):
    """A collection of image files. Small and picklable: every decoding task gets one."""

    def list(self) -> Iterator[SourceObject]:
        """Every image, sorted by path, as they are found; raises ValueError when there is none."""

    def digest(self) -> str:
        """A hash of the listing, for the key of what is made from it."""

    def read(self, path: str) -> bytes:
        """The content of an image, depth map or mask; raises OSError."""

    def uri(self, path: str) -> str:
        """Where the file is, for people."""


def open_source(config: DataConfig) -> Source:
    """The source that ``data.source`` names; raises ValueError when there is no such source."""
    from components.sources.demo import DemoSource
    from components.sources.folder import FolderSource
    from components.sources.manifest import ManifestSource

    if config.source == DEMO:
        return DemoSource(crops=config.crops, limit=config.limit)
    if config.source.startswith("s3://"):
        raise ValueError(f"data.source {config.source!r}: buckets are not supported yet; {ALLOWED}")
    if "://" in config.source:
        raise ValueError(f"data.source {config.source!r}: unknown kind of address; {ALLOWED}")
    if config.source.lower().endswith(MANIFESTS) and not Path(config.source).expanduser().is_dir():
        return ManifestSource.open(config.source, limit=config.limit)
    return FolderSource.open(config.source, limit=config.limit)


def listing_digest(objects: Iterator[SourceObject]) -> str:
    """sha256 over the path, size and etag of each object, in order."""
    digest = hashlib.sha256()
    for item in objects:
        digest.update(json.dumps([item.path, item.size, item.etag]).encode() + b"\n")
    return digest.hexdigest()
