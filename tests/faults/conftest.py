"""The run that nothing happens to; what others end with is compared with it."""

import shutil
from pathlib import Path

import pytest

from tests.faults.nodes import start
from tests.integration.conftest import SMALL, settings

EVERY = 5  # steps between checkpoints
LONG = (*SMALL, "training.distill.further_steps=20", f"training.checkpoint_every={EVERY}", "training.eval_every=20")
STREAMED = (*LONG, "training.cache_mb=0")


def run_of(path: Path, *values: str) -> list[str]:
    """Arguments of `alit run` for training alone."""
    return ["demo", *settings(f"workspace={path}", *values), "--until", "distill"]


def weights(workspace: Path) -> bytes:
    """Of the distilled tokenizer."""
    (found,) = (workspace / "distill").glob("*/weights.safetensors")
    return found.read_bytes()


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its workspace; images are streamed, over more than two epochs, to two workers."""
    path = tmp_path_factory.mktemp("unbroken")
    run = start(run_of(path / "w", *STREAMED), path / "log")
    assert run.finish() == 0, run.said
    return path / "w"


@pytest.fixture
def prepared(tmp_path: Path, unbroken: Path) -> Path:
    """A workspace where distill is all that is left to do, with the unbroken run's images and base."""
    for stage in ("ingest", "base"):
        shutil.copytree(unbroken / stage, tmp_path / "w" / stage)
    return tmp_path / "w"
