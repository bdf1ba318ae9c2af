"""A prefix of a bucket as a place: listed page by page, read whole or in spans, every body checked."""

import errno
import hashlib
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from components import buckets
from components.sources.places import ChangedFile, File

PAGE = 1000  # keys in an answer of S3
HEADS = 16  # requests at once
PAUSE_S, LONGEST_PAUSE_S = 0.2, 20.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    """``s3://bucket/prefix/``. Files whose path below it has a part that begins with "." are left out of the listing.

    A body is whole when it has the length and, where the ETag is an MD5, the MD5 that its header promised; else it is
    fetched again, with backoff. Clients are made per process, so it may be sent to others.
    """

    bucket: str
    prefix: str = ""  # ends in "/" unless empty

    @classmethod
    def open(cls, uri: str) -> Self:
        """The place ``uri``; raises ValueError, in one line, for wrong credentials, no such bucket, no permission.

        Raises ConnectionError for a server that is down or overloaded beyond the tries that the settings allow.
        """
        buckets.check(uri, "data.source")
        return cls.at(uri)

    @classmethod
    def at(cls, uri: str) -> Self:
        """The place ``uri``, unchecked."""
        bucket, prefix = buckets.split(uri)
        return cls(bucket, f"{prefix}/" if prefix else "")

    def list(self, suffixes: tuple[str, ...]) -> Iterator[File]:
        """As S3 lists, by key in the order of UTF-8; one page of keys in memory. Raises as :meth:`open`."""
        first = True
        for file in self._pages():
            hidden = file.path.startswith(".") or "/." in file.path
            if hidden or not file.path.lower().endswith(suffixes):
                continue
            if first:
                self._check_readable(file)
                first = False
            yield file

    def stats(self, paths: Sequence[str]) -> Mapping[str, File]:
        """Those of ``paths`` that are there: by a listing where they lie close together, else by HEAD requests."""
        wanted, found = sorted(set(paths)), dict[str, File]()
        left = set(wanted)
        if wanted:
            budget = len(wanted) // 10 + PAGE  # other keys among them that may be listed too
            for file in self._pages(after=wanted[0][:-1]):
                if file.path in left:
                    left.discard(file.path)
                    found[file.path] = file
                budget -= file.path not in found
                if file.path >= wanted[-1]:
                    return found
                if not budget:
                    break
            else:
                return found
        with ThreadPoolExecutor(HEADS) as pool:
            heads = pool.map(self._stat_or_none, [path for path in wanted if path in left])
            return found | {file.path: file for file in heads if file is not None}

    def read(self, path: str, etag: str = "") -> bytes:
        """The object's content: whole, of one version, the newest."""
        try:
            return self._fetch(path, {"IfMatch": f'"{etag}"'} if etag else {})
        except ChangedFile:
            logger.warning("%s has changed since it was listed; what it is now is read", self.uri(path))
            return self._fetch(path, {})

    def read_span(self, file: File, start: int, size: int) -> bytes:
        """A ranged request for the version that was listed."""
        if not size:
            return b""
        asked = {"IfMatch": f'"{file.etag}"', "Range": f"bytes={start}-{start + size - 1}"}
        data = self._fetch(file.path, asked)
        if len(data) != size:
            raise OSError(
                errno.EIO, f"the server gave {len(data)} bytes where {size} were asked for", self.uri(file.path)
            )
        return data

    def uri(self, path: str) -> str:
        """``s3://bucket/prefix/path``."""
        return f"{buckets.SCHEME}{self.bucket}/{self.prefix}{path}"

    def _pages(self, after: str = "") -> Iterator[File]:
        from botocore.exceptions import BotoCoreError, ClientError

        start = {"StartAfter": self.prefix + after} if after else {}
        pages = (
            buckets.client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.bucket, Prefix=self.prefix, PaginationConfig={"PageSize": PAGE}, **start)
        )
        try:
            for page in pages:
                for item in page.get("Contents", ()):
                    yield File(item["Key"][len(self.prefix) :], item["Size"], item["ETag"].strip('"'))
        except (BotoCoreError, ClientError) as error:
            kind = ConnectionError if buckets.is_passing(error) else ValueError
            raise kind(f"data.source {self.uri('')!r}: {buckets.reason(error)}") from error

    def _check_readable(self, file: File) -> None:
        """Who may list a bucket may not always read it; better said before any work starts."""
        try:
            self._stat(file.path)
        except PermissionError as error:
            raise ValueError(f"data.source {self.uri('')!r}: it may be listed, not read: {error.strerror}") from error
        except FileNotFoundError:
            return  # deleted since; found out again when it is read

    def _stat(self, path: str) -> File:
        with self._as_os_error(path):
            answer = buckets.client().head_object(Bucket=self.bucket, Key=self.prefix + path)
        return File(path, answer["ContentLength"], answer["ETag"].strip('"'))

    def _stat_or_none(self, path: str) -> File | None:
        try:
            return self._stat(path)
        except (FileNotFoundError, PermissionError):
            return None

    def _fetch(self, path: str, asked: Mapping[str, str]) -> bytes:
        """One object or span of it, tried as often as the settings say; raises OSError."""
        get = partial(buckets.client().get_object, Bucket=self.bucket, Key=self.prefix + path, **asked)
        attempts, before = buckets.attempts(), b""
        for attempt in range(1, attempts + 1):
            with self._as_os_error(path):
                answer = get()
            try:
                data = answer["Body"].read()
            except buckets.broken_bodies() as error:
                wrong = " ".join(str(error).split())
            else:
                wrong = _damage(answer, data, whole="Range" not in asked)
                if not wrong or data == before:  # twice the same: on this server an ETag is no MD5
                    return data
                before = data
            logger.info("%s: try %d of %d: %s", self.uri(path), attempt, attempts, wrong)
            if attempt < attempts:
                time.sleep(random.uniform(0.5, 1.0) * min(LONGEST_PAUSE_S, PAUSE_S * 2**attempt))
        raise ConnectionError(errno.ECONNABORTED, f"no whole body in {attempts} tries: {wrong}", self.uri(path))

    @contextmanager
    def _as_os_error(self, path: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            name, said, uri = buckets.code(error), buckets.reason(error), self.uri(path)
            if name in buckets.GONE:
                raise FileNotFoundError(errno.ENOENT, "No such object", uri) from error
            if name in buckets.CHANGED:
                raise ChangedFile(errno.ESTALE, "it has changed since it was listed", uri) from error
            if name in buckets.FORBIDDEN or name == "InvalidObjectState":  # archived
                raise PermissionError(errno.EACCES, said, uri) from error
            kind = ConnectionError if buckets.is_passing(error) else OSError
            raise kind(errno.EIO, said, uri) from error


def _damage(answer: Mapping[str, Any], data: bytes, *, whole: bool) -> str:
    """What shows that a body is not what its header promised; empty when nothing does."""
    if len(data) != answer["ContentLength"]:
        return f"{len(data)} bytes of {answer['ContentLength']}"
    etag = answer["ETag"].strip('"')
    is_md5 = len(etag) == 32 and answer.get("ServerSideEncryption", "AES256") == "AES256"
    if whole and is_md5 and "SSECustomerAlgorithm" not in answer:
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return "" if found == etag.lower() else f"its MD5 is {found}, its ETag {etag}"
    return ""
