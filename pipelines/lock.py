"""One run at a time in a workspace.

``<workspace>/.lock`` names the holder, and its modification time is the holder's heartbeat. On a file system every
change of it happens under ``flock`` of a guard file, held for moments only, so two runs can't both take over the lock
of a dead one; bucket_lock.py is the same for a bucket.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from components import buckets
from components.artifacts import WorkspaceError

LOCK = ".lock"
GUARD = ".lock.guard"
HEARTBEAT_S = 5.0
STALE_S = 60.0  # a heartbeat older than this is a dead holder's, where its process can't be looked up
POLL_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a workspace."""

    run_id: str
    host: str
    pid: int
    started: str  # local time
    birth: str  # tells the process from a later one with the same pid; empty where the system doesn't say
    place: str  # machine and its pid namespace: only there does the pid mean anything

    def __str__(self) -> str:
        return f"run {self.run_id} (host {self.host}, pid {self.pid}, since {self.started})"

    @classmethod
    def me(cls, run_id: str) -> "Holder":
        """This process."""
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(run_id, socket.gethostname(), os.getpid(), started, _birth(os.getpid()) or "", _place())


class WorkspaceHeld(WorkspaceError):
    """Another run holds the workspace; ``holder`` says which."""

    def __init__(self, workspace: str, holder: Holder) -> None:
        super().__init__(f"workspace {workspace} is in use by {holder}")
        self.holder = holder


class Lock(Protocol):
    """A held workspace."""

    previous: Holder | None  # the dead run it was taken from

    def take(self) -> Holder | None:
        """Take the lock if it is free or its holder is dead; otherwise return the holder."""

    def held(self) -> bool:
        """Whether it is still ours; false after another run took it for dead."""

    def beat(self) -> None:
        """Show that this run is alive; raises OSError, or ValueError for refused credentials."""

    def release(self) -> None:
        """Give the workspace back."""


@dataclass
class LocalLock:
    """The lock of a workspace on a file system."""

    folder: Path
    me: Holder
    previous: Holder | None = None

    def take(self) -> Holder | None:
        """Take the lock if it is free or its holder is dead; otherwise return the holder."""
        with _guarded(self.folder) as now:
            holder = _read(self.folder)
            if holder is not None and _alive(self.folder, holder, now):
                return holder
            self.previous = holder
            partial = self.folder / f"{LOCK}.part"
            partial.write_text(json.dumps(asdict(self.me), indent=2))
            partial.replace(self.folder / LOCK)
            return None

    def held(self) -> bool:
        """Whether it is still ours; false after another run took it for dead."""
        return _read(self.folder) == self.me

    def beat(self) -> None:
        """Show that this run is alive."""
        with _guarded(self.folder):
            if self.held():
                os.utime(self.folder / LOCK)

    def release(self) -> None:
        """Give the workspace back."""
        with _guarded(self.folder):
            if self.held():
                (self.folder / LOCK).unlink()


@contextmanager
def hold(workspace: str, run_id: str, wait_s: float = 0.0) -> Iterator[Lock]:
    """Hold ``workspace`` for the length of a ``with``.

    Waits up to ``wait_s`` seconds for another run to end. Raises WorkspaceHeld naming the holder when it doesn't.
    """
    lock = _lock_of(workspace, Holder.me(run_id))
    _wait_for(lock, workspace, wait_s)
    done = threading.Event()
    heart = threading.Thread(target=_beat_until, args=(lock, workspace, done), name="workspace-lock", daemon=True)
    heart.start()
    try:
        yield lock
    finally:
        done.set()
        heart.join()
        _release(lock, workspace)


def holder_of(workspace: str) -> Holder | None:
    """The live run that holds a workspace, or None."""
    if buckets.is_bucket(workspace):
        from pipelines.bucket_lock import holder_in_bucket

        return holder_in_bucket(workspace)
    folder = Path(workspace)
    if not (folder / LOCK).exists():
        return None
    with _guarded(folder) as now:
        holder = _read(folder)
        return holder if holder is not None and _alive(folder, holder, now) else None


def _lock_of(workspace: str, me: Holder) -> Lock:
    if buckets.is_bucket(workspace):
        from pipelines.bucket_lock import BucketLock

        return BucketLock(workspace, me)
    folder = Path(workspace)
    folder.mkdir(parents=True, exist_ok=True)
    return LocalLock(folder, me)


def _release(lock: Lock, workspace: str) -> None:
    try:
        lock.release()
    except (OSError, ValueError) as error:  # the run is over; the lock goes stale by itself
        _log.warning("the lock of %s could not be given back: %s", workspace, error)


def _wait_for(lock: Lock, workspace: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    told = False
    while (holder := lock.take()) is not None:
        if time.monotonic() >= deadline:
            raise WorkspaceHeld(workspace, holder)
        if not told:
            _log.info("waiting up to %.0f s for %s to end", wait_s, holder)
            told = True
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    if lock.previous is not None:
        _log.warning("took over the workspace from %s, which is dead", lock.previous)


def _beat_until(lock: Lock, workspace: str, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_S):
        try:
            lock.beat()
        except (OSError, ValueError) as error:  # ValueError: credentials that ran out, and may be renewed
            _log.warning("the heartbeat of %s could not be written: %s", workspace, error)


@contextmanager
def _guarded(folder: Path) -> Iterator[float]:
    """Alone with the lock file for a moment. Yields the file system's own time, so that clocks need not agree."""
    with open(folder / GUARD, "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        os.utime(folder / GUARD)
        yield (folder / GUARD).stat().st_mtime


def _read(folder: Path) -> Holder | None:
    try:
        return Holder(**json.loads((folder / LOCK).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / LOCK} is not a lock this software wrote ({error}); delete it if no run is on"
        ) from error


def is_alive(holder: Holder, *, silent: bool) -> bool:
    """Whether the process is there, where that can be looked up; elsewhere, whether it has a heartbeat."""
    if holder.place == _place():
        birth = _birth(holder.pid)
        return birth is not None and birth == holder.birth
    return not silent


def _alive(folder: Path, holder: Holder, now: float) -> bool:
    return is_alive(holder, silent=now - (folder / LOCK).stat().st_mtime >= STALE_S)


def _place() -> str:
    """Machine, boot and pid namespace, as far as the system tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _birth(pid: int) -> str | None:
    """When process ``pid`` began, in the system's own count; None when there is no such process or it is a zombie."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _birth_without_proc(pid)
    return None if state in "ZX" else numbers[18]


def _birth_without_proc(pid: int) -> str | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""
