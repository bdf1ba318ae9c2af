"""Images in a local folder and the folders below it."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from components.sources import ALLOWED, SPLITS, SourceObject, Targets, listing_digest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource:
    """Every regular file below ``root`` (absolute) with the suffix of an image; the content is judged when it is read.

    Hidden files and folders are skipped. A link to a file inside the root counts as a file; links to folders and links
    that leave the root are not followed: no loops, and nothing that a listing of the root would miss.
    """

    root: str
    limit: int | None = None

    @classmethod
    def open(cls, folder: str, *, limit: int | None = None) -> Self:
        """The source of ``folder``; raises ValueError when it isn't one that can be read."""
        root = Path(folder).expanduser().absolute()
        if not root.is_dir():
            wrong = "it is not a folder" if root.exists() else "there is no such folder"
            raise ValueError(f"data.source {folder!r}: {wrong} (looked at {root}); {ALLOWED}")
        if not os.access(root, os.R_OK | os.X_OK):
            raise ValueError(f"data.source {folder!r}: it may not be read by this user; use a readable folder")
        return cls(root=str(root), limit=limit)

    def list(self) -> Iterator[SourceObject]:
        """Every image file, sorted by path; one folder's names in memory at a time. Raises ValueError for none."""
        found = False
        for found_object in islice(self._walk(""), self.limit):
            found = True
            yield found_object
        if not found:
            allowed = " ".join(SUFFIXES)
            raise ValueError(
                f"data.source {self.root!r}: no image files in it or below; suffixes that count: {allowed}"
            )

    def digest(self) -> str:
        """sha256 over the listing."""
        return listing_digest(self.list())

    def read(self, path: str) -> bytes:
        """The file's content; raises OSError."""
        return Path(self.root, path).read_bytes()

    def uri(self, path: str) -> str:
        """The file's absolute path."""
        return f"{self.root}/{path}"

    def _walk(self, folder: str) -> Iterator[SourceObject]:
        try:
            with os.scandir(Path(self.root, folder)) as found:
                entries = sorted((_sortable(entry), entry) for entry in found if not entry.name.startswith("."))
        except PermissionError as error:
            raise ValueError(f"data.source {self.root!r}: {error}; every folder below it must be readable") from error
        for name, entry in entries:
            if name.endswith("/"):
                yield from self._walk(f"{folder}{name}")
            elif name.lower().endswith(SUFFIXES) and self._counts(entry):
                stat = entry.stat()
                path = _printable(f"{folder}{name}")
                yield SourceObject(path, stat.st_size, str(stat.st_mtime_ns), targets_of(path))

    def _counts(self, entry: os.DirEntry[str]) -> bool:
        """Whether it is a regular file, by itself or through a link that stays inside the root."""
        if not entry.is_symlink():
            return entry.is_file()
        if Path(entry.path).resolve().is_relative_to(Path(self.root).resolve()):
            return entry.is_file()
        logger.warning("%s: not followed, the link leaves the source's folder", entry.path)
        return False


def targets_of(path: str) -> Targets:
    """What the folders of ``path`` say: the first one's name may be a split; the last one's, if none, is the label."""
    folders = path.split("/")[:-1]
    label = folders[-1] if folders and folders[-1] not in SPLITS else None
    return Targets(label=label, split=SPLITS.get(folders[0]) if folders else None)


def _sortable(entry: os.DirEntry[str]) -> str:
    """Folders end in "/", so that names sort as whole paths do ("a.png" before "a/b.png")."""
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name


def _printable(path: str) -> str:
    """A name that is not UTF-8 is listed escaped; reading it fails, so it is counted and named among the rejected."""
    return path.encode(errors="backslashreplace").decode()
