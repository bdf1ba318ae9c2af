"""One small run of the main job that the tests of this folder look at, made once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALIT = [sys.executable, "-m", "pipelines"]
SMALL = (
    "data.crops=90",
    "training.distill.further_steps=4",
    "training.distill.batch_size=8",
    "training.checkpoint_every=2",
    "training.eval_every=4",
    "training.log_every=1",
    "training.distill.eval_images=8",
    "publish.pictures=2",
)


@dataclass(frozen=True)
class Result:
    """What a command said."""

    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    """This process's, without what would send a run elsewhere, the job workers of an MLflow server, and the 30 s that
    a Ray node which is told to end waits for Ray Serve.
    """
    dropped = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}


def settings(*values: str) -> list[str]:
    """--set arguments."""
    return [argument for value in values for argument in ("--set", value)]


def alit(*arguments: str, timeout_s: float = 600) -> Result:
    """Run the command as a person would."""
    done = subprocess.run(
        [*ALIT, *arguments], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, env=environment(), check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Workspace:
    """A workspace with a finished run, and the arguments that made it."""

    path: Path
    arguments: list[str]
    result: Result

    def artifact(self, stage: str) -> Path:
        """The folder of the stage's artifact, the one that the run made; `alit select` may have added others since."""
        found = (self.path / stage).glob("*/artifact.json")
        return min(found, key=lambda manifest: manifest.stat().st_mtime_ns).parent


@pytest.fixture(scope="package")
def own_ray() -> Iterator[None]:
    """A small Ray in this process, for stages that are called by themselves; commands start others."""
    import ray

    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The demo, small."""
    path = tmp_path_factory.mktemp("main") / "workspace"
    arguments = ["demo", *settings(f"workspace={path}", *SMALL)]
    result = alit("run", *arguments)
    assert result.code == 0, result.out + result.err
    return Workspace(path, arguments, result)
