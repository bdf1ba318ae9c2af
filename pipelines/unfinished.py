"""What interrupted writes leave in a workspace: ``*.part`` files, and in a bucket uploads that were never completed."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from pyarrow import fs

from components import buckets
from components.artifacts import DRAFTS
from components.store import filesystem
from components.tracking import ARTIFACTS

PART = ".part"
NOT_OURS = (DRAFTS, ARTIFACTS)  # drafts go as whole folders; MLflow may be writing to its own

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartialFile:
    """One that was to be renamed when it is whole."""

    uri: str
    bytes: int
    why: str = "was never written to its end"

    def remove(self) -> None:
        """Delete it."""
        store, path = filesystem(self.uri)
        if store.get_file_info(path).is_file:
            store.delete_file(path)


@dataclass(frozen=True)
class PartialUpload:
    """Parts that S3 keeps, and no listing of objects shows."""

    uri: str
    upload: buckets.Upload
    why: str = "upload that was never completed"

    @property
    def bytes(self) -> int:
        """Of the parts that have arrived."""
        return self.upload.bytes

    def remove(self) -> None:
        """Let S3 drop the parts."""
        self.upload.abort()


def unfinished(workspace: str, before: float | None = None) -> Iterator[PartialFile | PartialUpload]:
    """What was last written to before ``before`` (s since 1970, by the store's clock; None: at any time).

    Only while nothing else writes to ``workspace`` is it certain that nobody will complete it.
    """
    store, root = filesystem(workspace)
    for folder in _tops(store, root):
        for info in store.get_file_info(folder):
            if info.is_file and info.path.endswith(PART) and (before is None or (info.mtime_ns or 0) < before * 1e9):
                yield PartialFile(f"{workspace}{info.path.removeprefix(root)}", info.size)
    if buckets.is_bucket(workspace):
        yield from _uploads(workspace, before)


def _tops(store: fs.FileSystem, root: str) -> Iterator[fs.FileSelector]:
    """The workspace's own files, and its folders with all that is in them."""
    top = fs.FileSelector(root, allow_not_found=True)
    yield top
    for info in store.get_file_info(top):
        if info.type == fs.FileType.Directory and info.base_name not in NOT_OURS:
            yield fs.FileSelector(info.path, recursive=True)


def _uploads(workspace: str, before: float | None) -> Iterator[PartialUpload]:
    until = None if before is None else datetime.fromtimestamp(before, UTC)
    try:
        for upload in buckets.unfinished_uploads(workspace):
            uri = f"{buckets.SCHEME}{upload.bucket}/{upload.key}"
            top = uri.removeprefix(workspace).strip("/").partition("/")[0]
            if top not in NOT_OURS[1:] and (until is None or upload.initiated < until):
                yield PartialUpload(uri, upload)
    except PermissionError as error:
        _log.warning("uploads that were never completed stay: %s", error)
