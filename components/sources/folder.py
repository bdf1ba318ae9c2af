"""Images in a folder or below a prefix of a bucket, and below those."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from components.sources import SPLITS, SourceObject, Targets, listing_digest
from components.sources.places import File, Place

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class FolderSource:
    """Every file below ``place`` with the suffix of an image; the content is judged when it is read."""

    place: Place
    limit: int | None = None

    def list(self) -> Iterator[SourceObject]:
        """Every image file, sorted by path, as the place lists them. Raises ValueError for none."""
        found = False
        for file in islice(self.place.list(SUFFIXES), self.limit):
            found = True
            yield _object(file)
        if not found:
            where, allowed = self.place.uri("").rstrip("/"), " ".join(SUFFIXES)
            raise ValueError(f"data.source {where!r}: no image files in it or below; suffixes that count: {allowed}")

    def digest(self, listed: str = "") -> str:
        """sha256 over the listing."""
        return listed or listing_digest(self.list())

    def read(self, path: str, etag: str = "") -> bytes:
        """The file's content, the newest; raises OSError."""
        return self.place.read(path, etag)

    def uri(self, path: str) -> str:
        """The file's absolute path or its address."""
        return self.place.uri(path)


def targets_of(path: str) -> Targets:
    """What the folders of ``path`` say: the first one's name may be a split; the last one's, if none, is the label."""
    folders = path.split("/")[:-1]
    label = folders[-1] if folders and folders[-1] not in SPLITS else None
    return Targets(label=label, split=SPLITS.get(folders[0]) if folders else None)


def _object(file: File) -> SourceObject:
    return SourceObject(file.path, file.size, file.etag, targets_of(file.path))
