"""The same run through Ray's job API, against a head node with its dashboard."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, SMALL, environment, settings

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))
STARTED_S = 90


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str  # of the dashboard
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` in a process of its own, with a token of its own, stopped by ending that process."""
    home = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets below it have at most 107 characters
    variables = environment() | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    subprocess.run([RAY, "get-auth-token", "--generate"], env=variables, check=True, capture_output=True)
    dashboard = free_port()
    arguments = ["--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    limits = ["--object-store-memory=200000000", f"--temp-dir={home}/r", "--disable-usage-stats"]
    node = subprocess.Popen([RAY, "start", *arguments, *limits], env=variables, stdout=subprocess.DEVNULL)
    try:
        running = Head(f"http://127.0.0.1:{dashboard}", variables)
        wait_until_ready(running, node)
        yield running
    finally:
        node.terminate()
        node.wait(timeout=60)
        shutil.rmtree(home, ignore_errors=True)


def wait_until_ready(head: Head, node: subprocess.Popen[bytes]) -> None:
    """Until the head takes jobs: its job agent starts after its dashboard."""
    deadline = time.monotonic() + STARTED_S
    while submit(head, [sys.executable, "-c", "pass"]).returncode != 0:
        assert node.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, "no job was taken"
        time.sleep(2)


def submit(head: Head, command: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [RAY, "job", "submit", "--address", head.address, "--working-dir", str(ROOT), *options, "--", *command]
    return subprocess.run(arguments, env=head.environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_submitted_run(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "run", "demo"]
    done = submit(head, [*command, *settings(f"workspace={tmp_path}/w", *SMALL, "training.cpus_per_worker=0.25")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pack.reconstruction" in done.stdout and "train done" in done.stdout
    for stage in ("ingest", "distill", "pack.reconstruction", "publish"):
        assert len(list((tmp_path / "w" / stage).glob("*/artifact.json"))) == 1
    assert list((tmp_path / "w" / "logs").glob("*/distill.log"))


def test_a_submitted_run_that_fails(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "run", "demo"]
    done = submit(head, [*command, *settings(f"workspace={tmp_path}/w", *SMALL, "data.image_size=66")])
    assert done.returncode == 1
    assert "data.image_size = (66, 66)" in done.stdout + done.stderr


def test_a_stopped_job_ends_cleanly(head: Head, tmp_path: Path) -> None:
    import mlflow

    workspace = tmp_path / "w"
    long = ("training.distill.further_steps=400", "training.cpus_per_worker=0.25")
    command = [sys.executable, "-m", "pipelines", "run", "demo", *settings(f"workspace={workspace}", *SMALL, *long)]
    assert submit(head, command, "--no-wait", "--submission-id", "to-stop").returncode == 0
    deadline = time.monotonic() + 300
    while not list(workspace.glob("scratch/distill/**/step-*")):
        assert time.monotonic() < deadline, "distill made no checkpoint"
        time.sleep(1)
    stop = [RAY, "job", "stop", "--address", head.address, "to-stop"]
    assert subprocess.run(stop, env=head.environment, capture_output=True, timeout=120, check=False).returncode == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workspace}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name == "alit"])
    states = {run.data.tags.get("alit.stage", "parent"): run.info.status for run in runs}
    assert states["parent"] == states["distill"] == "KILLED"
    assert not (workspace / ".lock").exists()
