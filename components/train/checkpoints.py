"""Checkpoints of a training: written behind its back, verified when read, the newest and the best kept.

Each is a folder ``step-NNNNNNNN`` with ``state.pt`` and, written last, ``checkpoint.json`` (sha256, bytes, score):
without that file it isn't one. The same on a local disk and in a bucket. Only rank 0 writes.
"""

import errno
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from tempfile import TemporaryFile
from typing import IO, Any, cast

import torch
from pyarrow import fs

from components.store import filesystem, join, read_json, remove, write_json

STATE, MARK = "state.pt", "checkpoint.json"
NAME = re.compile(r"step-(\d{8})")
CHUNK_BYTES = 8 << 20
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


class CheckpointError(RuntimeError):
    """The last checkpoint, which is the result, can't be written or read back."""


@dataclass(frozen=True)
class Checkpoint:
    """What ``checkpoint.json`` says."""

    step: int
    sha256: str
    bytes: int
    score: float | None = None  # lower is better; None: not evaluated at this step


class Checkpoints:
    """Those of one training, in folder ``uri``; ``say`` takes one line for people when something is wrong."""

    def __init__(self, uri: str, *, keep: int, say: Callable[[str], None]) -> None:
        self.uri, self.keep, self.say = uri, keep, say
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[bool] | None = None

    def standing(self) -> list[Checkpoint]:
        """Every complete checkpoint, the oldest first."""
        found = [_read_mark(join(self.uri, name)) for name in sorted(self._names())]
        return [mark for mark in found if mark is not None]

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint, or None; a damaged one is told of and removed.

        Raises OSError when the storage can't be read.
        """
        for mark in reversed(self.standing()):
            state = self._verified(mark)
            if state is not None:
                return state
            remove(self._folder(mark.step))
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The state after ``step``; raises CheckpointError when it isn't there or is damaged, OSError as newest."""
        mark = _read_mark(self._folder(step))
        state = self._verified(mark) if mark is not None else None
        if state is None:
            raise CheckpointError(f"{self._folder(step)}: no whole checkpoint")
        return state

    def best(self) -> int:
        """The step of the one with the lowest score, the newest where none has one; raises CheckpointError."""
        standing = self.standing()
        if not standing:
            raise CheckpointError(f"{self.uri}: no whole checkpoint")
        scored = [mark for mark in standing if mark.score is not None]
        return min(scored, key=lambda mark: (mark.score, -mark.step)).step if scored else standing[-1].step

    def clean(self) -> None:
        """Remove what a killed process left half written; call before training begins."""
        for name in self._names():
            if _read_mark(join(self.uri, name)) is None:
                remove(join(self.uri, name))

    def save(self, state: Mapping[str, Any], *, step: int, score: float | None) -> None:
        """Copy ``state`` now and write it later; waits for the checkpoint before this one to be written."""
        self.settle()
        self._writing = self._writer.submit(self._write, _copied(state), step, score)

    def settle(self) -> bool:
        """Wait for what is being written; whether it was."""
        return self._writing is None or self._writing.result()

    def close(self) -> None:
        """Wait for the last checkpoint; raises CheckpointError when it could not be written."""
        written = self.settle()
        self._writer.shutdown()
        if not written:
            raise CheckpointError(f"{self.uri}: the last checkpoint could not be written, and with it the result")

    def _write(self, state: Mapping[str, Any], step: int, score: float | None) -> bool:
        try:
            while not self._fits(state, step, score):
                pass
        except OSError as error:
            standing = self.standing()
            last = f"the last good one is that of step {standing[-1].step}" if standing else "there is none before it"
            reason = str(error).splitlines()[0]
            self.say(f"no checkpoint at step {step}: {reason}; training goes on, {last}")
            return False
        self._prune()
        return True

    def _fits(self, state: Mapping[str, Any], step: int, score: float | None) -> bool:
        """Write; False when the disk was full and an older checkpoint has made room since."""
        try:
            self._put(state, step, score)
        except OSError as error:
            if any(text in str(error) for text in FULL) and self._make_room():
                return False
            raise
        return True

    def _put(self, state: Mapping[str, Any], step: int, score: float | None) -> None:
        folder = self._folder(step)
        store, path = filesystem(folder)
        remove(folder)
        try:
            store.create_dir(path, recursive=True)
            with store.open_output_stream(f"{path}/{STATE}") as stream:
                hashing = _Hashing(stream)
                torch.save(state, cast(IO[bytes], hashing))
            write_json(join(folder, MARK), asdict(Checkpoint(step, hashing.digest.hexdigest(), hashing.bytes, score)))
        except (OSError, RuntimeError) as error:  # torch's zip writer tells of a full disk as a RuntimeError
            remove(folder)
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(str(cause)) from error

    def _make_room(self) -> bool:
        """Drop the oldest checkpoint, the best only when nothing else but the newest is left; whether there was one."""
        older = [mark.step for mark in self.standing()[:-1]]
        if not older:
            return False
        best = self.best()
        step = next((step for step in older if step != best), best)
        if step == best:
            self.say(f"the disk is full: the checkpoint of step {step}, the best so far, makes room")
        remove(self._folder(step))
        return True

    def _prune(self) -> None:
        standing = self.standing()
        kept = {mark.step for mark in standing[-self.keep :]} | {self.best()}
        for mark in standing:
            if mark.step not in kept:
                remove(self._folder(mark.step))

    def _verified(self, mark: Checkpoint) -> dict[str, Any] | None:
        """None when it is damaged; raises OSError when it can't be read now, which says nothing of it."""
        store, path = filesystem(join(self._folder(mark.step), STATE))
        try:
            with store.open_input_file(path) as stream, TemporaryFile() as copy:
                far = not isinstance(store, fs.LocalFileSystem)  # torch.load asks for every tensor by itself
                digest = hashlib.sha256()
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    if far:
                        copy.write(chunk)
                if digest.hexdigest() != mark.sha256:
                    raise ValueError("its content is not what was written (sha256 differs)")
                whole = copy if far else stream
                whole.seek(0)
                return torch.load(whole, map_location="cpu", weights_only=True)
        except (FileNotFoundError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            self.say(f"the checkpoint of step {mark.step} is damaged: {reason}; the one before it is used")
            return None
        except OSError as error:
            raise OSError(f"{path} can't be read: {error}") from error

    def _names(self) -> list[str]:
        store, path = filesystem(self.uri)
        infos = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return [info.base_name for info in infos if NAME.fullmatch(info.base_name)]

    def _folder(self, step: int) -> str:
        return join(self.uri, f"step-{step:08d}")


class _Hashing:
    """A file to write to that knows the sha256 of what it was given."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        self._stream.write(data)
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


def _read_mark(folder: str) -> Checkpoint | None:
    try:
        return Checkpoint(**read_json(join(folder, MARK)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _copied(value: Any) -> Any:
    """``value`` with every tensor as a copy of its own in memory, so that training may go on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value
