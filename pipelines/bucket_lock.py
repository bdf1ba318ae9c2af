"""The lock of a workspace in a bucket: the object ``.lock``, changed by conditional writes only.

It names the holder; its time of change, by the server's own clock, is the heartbeat. ``If-None-Match: *`` makes it,
``If-Match`` renews it or takes it from a dead holder, so of two runs that try at once one is refused.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from components import buckets
from components.artifacts import WorkspaceError
from pipelines.config import ConfigError
from pipelines.lock import LOCK, STALE_S, Holder, is_alive


@dataclass
class BucketLock:
    """The lock of the workspace ``s3://bucket/prefix``."""

    workspace: str
    me: Holder
    previous: Holder | None = None
    _version: str = ""  # the object's ETag as we wrote it last

    def take(self) -> Holder | None:
        """Take the lock if it is free or its holder is dead; otherwise return the holder."""
        while True:
            found = _read(self.workspace)
            if found is not None and found.holder == self.me:  # the answer to our write was lost, its retry refused
                self._version = found.version
                return None
            if found is not None and found.alive:
                return found.holder
            self.previous = found.holder if found else None
            if self._write(found.version if found else None):
                return None

    def held(self) -> bool:
        """Whether it is still ours; false after another run took it for dead."""
        found = _read(self.workspace)
        if found is None or found.holder != self.me:
            return False
        self._version = found.version  # an answer to our own write may have been lost
        return True

    def beat(self) -> None:
        """Show that this run is alive."""
        if not self._write(self._version) and self.held():
            self._write(self._version)

    def release(self) -> None:
        """Give the workspace back. Nobody takes a lock that has just been renewed, so it is ours until it is gone."""
        if self.held() and self._write(self._version):
            with _errors(self.workspace):
                buckets.client().delete_object(**_place(self.workspace))

    def _write(self, version: str | None) -> bool:
        """Whether the object was still ``version`` (None: not there), and is ours now."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        body = json.dumps(asdict(self.me), indent=2).encode()
        from botocore.exceptions import ClientError

        try:
            with _errors(self.workspace):
                answer = buckets.client().put_object(**_place(self.workspace), Body=body, **condition)
        except ClientError:
            return False
        self._version = answer["ETag"]
        return True


def holder_in_bucket(workspace: str) -> Holder | None:
    """The live run that holds the workspace, or None."""
    found = _read(workspace)
    return found.holder if found is not None and found.alive else None


@dataclass(frozen=True)
class _Found:
    holder: Holder
    version: str
    age_s: float  # since the last heartbeat

    @property
    def alive(self) -> bool:
        return is_alive(self.holder, silent=self.age_s >= STALE_S)


def _read(workspace: str) -> _Found | None:
    try:
        with _errors(workspace):
            answer = buckets.client().get_object(**_place(workspace))
            text = answer["Body"].read()
    except FileNotFoundError:
        return None
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{workspace}/{LOCK} is not a lock this software wrote ({error}); delete it if no run is on"
        ) from error
    return _Found(holder, answer["ETag"], (now - answer["LastModified"]).total_seconds())


def _place(workspace: str) -> dict[str, Any]:
    bucket, prefix = buckets.split(workspace)
    return {"Bucket": bucket, "Key": f"{prefix}/{LOCK}".lstrip("/")}


@contextmanager
def _errors(workspace: str) -> Iterator[None]:
    """One line for what is wrong with the bucket; a condition that does not hold stays a ClientError."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        name = buckets.code(error)
        if name in buckets.GONE:
            raise FileNotFoundError(f"{workspace}/{LOCK}") from error
        if name in buckets.CHANGED or name == "ConditionalRequestConflict":
            raise
        said = f"workspace {workspace!r}: {buckets.reason(error)}"
        if name in buckets.REFUSED | buckets.FORBIDDEN:
            raise ConfigError(said) from error
        if name == "NotImplemented":
            said += "; its lock needs a server that does conditional writes (If-Match, If-None-Match)"
        raise LockUnreachable(said) from error


class LockUnreachable(WorkspaceError, ConnectionError):
    """The lock can't be read or written now; a later try may succeed."""
