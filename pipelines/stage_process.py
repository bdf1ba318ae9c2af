"""What happens in the process of a stage, and how it speaks to the terminal."""

import importlib
import logging
import os
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from components import artifacts
from components.artifacts import Artifact, Figures, Job
from pipelines.failures import Failure, diagnose

BOARD_LINES = 1000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """Everything that one try of a stage needs."""

    function: str  # "package.module:function"
    config: BaseModel
    resources: BaseModel | None
    inputs: Mapping[str, tuple[str, str]]  # argument name -> class of components.artifacts, URI
    job: Job
    log: str  # file that the process's output goes to


@dataclass(frozen=True)
class Outcome:
    """What became of one try."""

    figures: Figures = field(default_factory=dict)
    failure: Failure | None = None


class Board:
    """An actor that holds progress lines until the terminal asks for them."""

    def __init__(self) -> None:
        self.lines: deque[tuple[str, str]] = deque(maxlen=BOARD_LINES)

    def post(self, stage: str, line: str) -> None:
        """Hang up one line."""
        self.lines.append((stage, line))

    def drain(self) -> list[tuple[str, str]]:
        """Take every line down."""
        lines, self.lines = list(self.lines), deque(maxlen=BOARD_LINES)
        return lines


@dataclass(frozen=True)
class Progress:
    """``job.progress``: one line to the board and to the log; it can be sent to other processes."""

    board: Any  # handle of a Board actor
    stage: str

    def __call__(self, line: str) -> None:
        """Say ``line``."""
        self.board.post.remote(self.stage, line)
        _log.info("%s", line)


def execute(order: Order) -> Outcome:
    """Run a stage's function in this process. A failure is an outcome with its trace in the log, not an exception."""
    with output_to(order.log):
        try:
            figures = _figures(order.job.stage, _call(order))
            _flush_progress(order.job)
            return Outcome(figures)
        except Exception as error:
            traceback.print_exc()
            return Outcome(failure=diagnose(error))
        except KeyboardInterrupt:
            _log.info("cancelled")
            raise


def _call(order: Order) -> Any:
    module, _, name = order.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    inputs = {argument: _open(kind, uri) for argument, (kind, uri) in order.inputs.items()}
    return function(order.job, config=order.config, resources=order.resources, **inputs)


def _open(kind: str, uri: str) -> Artifact:
    cls: type[Artifact] = getattr(artifacts, kind)
    return cls.open(uri)


def _figures(stage: str, returned: Any) -> Figures:
    """The figures as plain numbers and strings; raises TypeError when a stage returns anything else."""
    if not isinstance(returned, dict):
        raise TypeError(f"stage {stage!r} must return its figures as a dict, not {type(returned).__name__}")
    plain = {str(name): value.item() if hasattr(value, "item") else value for name, value in returned.items()}
    for name, value in plain.items():
        if not isinstance(value, int | float | str):
            raise TypeError(f"figure {name!r} of stage {stage!r} must be a number or a string, not {value!r}")
    return plain


def _flush_progress(job: Job) -> None:
    """Wait until the board has every line: the terminal shows them before the stage's end."""
    if isinstance(job.progress, Progress):
        import ray

        ray.wait([job.progress.board.post.remote(job.stage, "")], timeout=5)


@contextmanager
def output_to(path: str) -> Iterator[None]:
    """Append all output of this process, C libraries' included, to the file at ``path``."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", buffering=1, encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        level = root.level
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            root.setLevel(level)
            root.removeHandler(handler)
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)
